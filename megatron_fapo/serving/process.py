"""A server as a process: whether it lives, what it said last, how it is ended. Knows no engine."""

import asyncio
import contextlib
import os
import re
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_fapo.errors import ServerError

_STOP_SECONDS = 15.0
_LOG_LINES = 15
_RAISED = re.compile(r"^[\w.]*(Error|Exception)\b.*")
"""The last line of a traceback."""


class Server(Protocol):
    """A running server, wherever it runs."""

    @property
    def url(self) -> str:
        """Where it listens."""

    async def wait(self) -> None:
        """Return when it has ended."""

    def check(self) -> None:
        """Raise ServerError with the last lines of its log when it has ended."""

    def kill(self) -> None:
        """End it at once."""

    async def stop(self) -> None:
        """Ask it to end; kill it when it does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerProcess:
    """A server on this machine."""

    url: str
    pid: int
    log: Path
    process: asyncio.subprocess.Process

    def check(self) -> None:
        """Raise ServerError with the last lines of its log when the server has ended."""
        status = self.process.returncode
        if status is None:
            # asyncio learns of an end one turn of its loop late; the kernel knows, and keeps it for asyncio.
            try:
                ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                raise died(self.pid, None, self.log) from None
            if ended is None:
                return
            status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        raise died(self.pid, status, self.log)

    async def wait(self) -> None:
        """Return when it has ended."""
        await self.process.wait()

    def kill(self) -> None:
        """End it at once."""
        _send(self.process, signal.SIGKILL)

    async def stop(self) -> None:
        """Ask it to end; kill it when it does not."""
        await stop(self.process)


def died(pid: int, code: int | None, log: Path) -> ServerError:
    """The error for a server that has ended: its exit status and what it said last."""
    status = "an unknown status" if code is None else f"status {code}"
    return ServerError(f"server ended with {status}; the end of {log}:\n{tail(log)}", pid=pid)


def _send(process: asyncio.subprocess.Process, what: signal.Signals) -> None:
    """Signal a process that may have ended. Its own methods would take the status of one that has from asyncio, which
    then calls it 255."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, what)


async def stop(process: asyncio.subprocess.Process) -> None:
    """End a server that leads a session of its own, and whatever it has started in there."""
    for end in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            break
        _send(process, end)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def tail(log: Path) -> str:
    """The end of a log; before it the last exception, where later lines have pushed that out of sight."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return "(no log)"
    end = lines[-_LOG_LINES:]
    raised = next((line for line in reversed(lines[:-_LOG_LINES]) if _RAISED.match(line)), None)
    return "\n".join(end if raised is None or any(map(_RAISED.match, end)) else [raised, "...", *end])


def free_port(host: str) -> int:
    """A port that is free now, for programs that cannot say which one they took."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
