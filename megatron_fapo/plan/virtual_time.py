"""An event loop whose time jumps to its next timer: what takes minutes on GPUs takes as long as its bookkeeping."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _NeverWaiting(selectors.SelectSelector):
    """Asks which files are ready, and waits for none."""

    def __init__(self, loop: "VirtualLoop") -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As ever, but the loop's time moves on instead of the machine's."""
        if timeout is None:
            raise RuntimeError("everything in virtual time waits for something that will never happen")
        self._loop.skip(timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs callbacks in the order of their times, and never sleeps."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_NeverWaiting(self))
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def skip(self, seconds: float) -> None:
        """Let so much time pass."""
        self._now += max(seconds, 0.0)


class LoopClock:
    """The running loop's time, as sampler and judge see it."""

    def now(self) -> float:
        """Seconds since the loop was made."""
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        """Come back `seconds` later."""
        await asyncio.sleep(seconds)


def run_virtual(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end in virtual time. Raises RuntimeError where all that is left waits for nothing."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
