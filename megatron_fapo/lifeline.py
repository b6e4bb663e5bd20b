"""Child processes that are deaf to the terminal's Ctrl-C and still end with their parent, however that ends.

The parent decides when they end: it starts each in a session of its own (`start_new_session=True`), so that a Ctrl-C
reaches the parent alone, which may still need them to save its work; and it passes `launcher()` on to the child.
The child calls `end_with(launcher)` first of all; a program that is not ours is started by this module as a script,
`python lifeline.py LAUNCHER COMMAND...`, since what the kernel was told outlives the change of program.
"""

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


_LASTING: set[int] = set()


def this_thread_lasts() -> None:
    """Say of the running thread that it lives as long as its process, as the main thread does."""
    _LASTING.add(threading.get_native_id())


def launcher() -> int:
    """The process that a child started here and now can be tied to; 0 where it cannot.

    The kernel ties a child to the *thread* that started it; only the main thread is known to live as long as its
    process, and those of `this_thread_lasts`.
    """
    lasting = threading.current_thread() is threading.main_thread() or threading.get_native_id() in _LASTING
    return os.getpid() if lasting else 0


def end_with(launcher: int) -> None:
    """Have the kernel kill this process when its launcher ends, whatever either is doing then. Linux only."""
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            sys.exit("the launcher is gone")


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
