"""math-verify behind a process border: sympy may hang or eat memory on what a model writes; a process can be killed."""

import asyncio
import json
import math
import sys
from typing import Literal, cast

from megatron_fapo import lifeline
from megatron_fapo.errors import TaskError

Comparison = Literal["equal", "different", "unreadable", "timeout"]

START_SECONDS = 120.0
"""How long a worker may take to import sympy, on a busy machine."""


class MathsChecker:
    """A few worker processes, each kept alive over many comparisons and replaced when it misses the deadline.

    `compare` waits for a free worker, then at most `deadline` seconds for its answer. Workers start on first use.
    """

    def __init__(self, *, workers: int, deadline: float) -> None:
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._workers = [_Worker(deadline) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def compare(self, reference: str, answer: str) -> Comparison:
        """Whether two answers, LaTeX or plain, are mathematically equal. Raises TaskError when no worker can start."""
        worker = await self._idle.get()
        try:
            return await worker.compare(reference, answer)
        finally:
            self._idle.put_nowait(worker)

    async def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            await worker.stop()


class _Worker:
    """One process, started when it is first needed and again after each end; one comparison at a time."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._process: asyncio.subprocess.Process | None = None

    async def compare(self, reference: str, answer: str) -> Comparison:
        process = self._process or await self._start()
        question = json.dumps({"reference": reference, "answer": answer})
        try:
            reply = await asyncio.wait_for(_exchange(process, question), self._deadline)
        except TimeoutError:
            await self.stop()
            return "timeout"
        except BaseException:
            # Cancelled in the middle of an exchange: the next reply would be to the wrong question.
            await self.stop()
            raise
        if not reply:
            await self.stop()
            return "unreadable"  # the comparison took the process down with it, by memory or by recursion
        return cast(Comparison, reply)

    async def _start(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "megatron_fapo.tasks.maths_worker",
            str(lifeline.launcher()), str(math.ceil(self._deadline) + 1),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._process = process
        try:
            ready = await asyncio.wait_for(_line(process), START_SECONDS)
        except TimeoutError:
            ready = ""
        if ready != "ready":
            await self.stop()
            raise TaskError(f"the math-verify worker did not start: it said {ready!r}; see its output above")
        return process

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _exchange(process: asyncio.subprocess.Process, question: str) -> str:
    """The worker's reply; empty when it died."""
    assert process.stdin is not None
    process.stdin.write(question.encode() + b"\n")
    try:
        await process.stdin.drain()
    except ConnectionError:
        return ""
    return await _line(process)


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()
