"""Ranks as plain processes of this machine, without Ray: for tests, tools and the supervised warm-up."""

import importlib
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Literal, Self, cast

from megatron_fapo.batch.layout import Layout
from megatron_fapo.errors import FapoError, PolicyError
from megatron_fapo.policy.settings import PolicySettings

Kind = Literal["died", "ours", "foreign", "done"]
KINDS: tuple[Kind, ...] = ("died", "ours", "foreign", "done")
"""How a call can end, the likeliest cause of the others first."""
Answer = tuple[Kind, Any]
"""A rank's answer to a call: a result, or the error that it became."""
KIND = "megatron_fapo.policy.rank:PolicyRank"
"""What answers in a rank's process."""
GRACE = 2.0
"""Seconds in which further failures are awaited after one: a rank that dies takes its peers along."""


class LocalRanks:
    """All ranks of a policy, each in a process of its own. Use as a context manager.

    Consumes: method names and arguments. Waits for: all ranks' answers. Unblocked by: the last answer, or GRACE
    seconds after a failure or a rank's death; then the other ranks, which may wait for the failed one, are ended.
    """

    def __init__(self, settings: PolicySettings, seed: int = 0) -> None:
        self._pipes, self._processes = spawn(settings.parallel.world, settings.threads)
        self._running = ""
        self._meet(settings, seed)

    def _meet(self, settings: PolicySettings, seed: int) -> None:
        world = settings.parallel.world
        try:
            host, port = self.one(0, "address")
            layouts = self.call_each("setup", [(rank, world, host, port, settings, seed) for rank in range(world)])
        except BaseException:
            self.end()
            raise
        self.layout: Layout = layouts[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._pipes)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of `PolicyRank` on all ranks with the same arguments; answers in the order of ranks.

        Of several failures it raises the likely cause: a rank's death, else an error of ours, else a foreign one.
        """
        self.start(method, *args)
        return self.finish()

    def call_each(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The same with arguments of its own for each rank."""
        self._send(method, args)
        return self.finish()

    def start(self, method: str, *args: Any) -> None:
        """Let all ranks begin; `finish` must follow before the next call."""
        self._send(method, [args] * len(self._pipes))

    def finish(self) -> list[Any]:
        """Wait for the answers to what was started."""
        method, self._running = self._running, ""
        answers: dict[int, Answer] = {}
        while waiting := [rank for rank in range(len(self)) if rank not in answers]:
            failed = any(kind != "done" for kind, _ in answers.values())
            ready = wait([self._pipes[rank] for rank in waiting], GRACE if failed else None)
            if not ready:
                break
            answers |= {rank: self._receive(rank, method) for rank in waiting if self._pipes[rank] in ready}
        return self._settle(answers)

    def _send(self, method: str, args: Sequence[tuple[Any, ...]]) -> None:
        if not self._pipes or self._running:
            state = f"{self._running}() is running" if self._running else "the ranks have ended"
            raise PolicyError(f"{method}() cannot start: {state}")
        self._running = method
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send((method, args[rank]))
            except OSError:
                self._settle({rank: self._death(rank, method)})

    def close(self) -> None:
        """Let the ranks leave their groups and end."""
        if self._pipes:
            try:
                if not self._running:
                    self.call("shutdown")
            finally:
                self.end()

    def end(self) -> None:
        """End the processes at once."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()
        self._pipes, self._processes, self._running = [], [], ""

    def one(self, rank: int, method: str, *args: Any) -> Any:
        """Call a method of one rank, while no call of all runs; its answer."""
        self._pipes[rank].send((method, args))
        return self._settle({rank: self._receive(rank, method)})[0]

    def _receive(self, rank: int, method: str) -> Answer:
        try:
            answer: Answer = self._pipes[rank].recv()
        except (EOFError, ConnectionError):
            return self._death(rank, method)
        return answer

    def _death(self, rank: int, method: str) -> Answer:
        self._processes[rank].join(timeout=5)
        code = self._processes[rank].exitcode
        return "died", PolicyError(f"a rank died in {method}() with exit code {code}", rank=rank)

    def _settle(self, answers: Mapping[int, Answer]) -> list[Any]:
        """The answers in the order of ranks, or the likely cause of the failures among them."""
        kind, worst = min((answers[rank] for rank in sorted(answers)), key=lambda answer: KINDS.index(answer[0]))
        if kind == "done":
            return [answers[rank][1] for rank in sorted(answers)]
        self.end()
        raise cast(Exception, worst)


def spawn(ranks: int, threads: int = 1, kind: str = KIND) -> tuple[list[Connection], list[BaseProcess]]:
    """So many processes that answer calls, each a `kind` ("module:class"), and the pipes to them."""
    # they are forked from a clean server that has loaded Megatron once and started nothing
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_fapo.policy.rank"])
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, kind), name=f"policy-rank-{rank}", daemon=False)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    return pipes, processes


def serve(pipe: Connection, kind: str = KIND) -> None:
    """The body of a rank's process: answer calls until the other end is gone.

    Consumes: (method, args). Waits for: the driver. Unblocked by: a call, or the end of the pipe.
    """
    module, name = kind.split(":")
    rank = getattr(importlib.import_module(module), name)()  # loads torch and Megatron, here and not in the driver
    while True:
        try:
            method, args = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer: Answer = ("done", getattr(rank, method)(*args))
        except FapoError as error:
            answer = ("ours", error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it reaches the driver, which raises it
            answer = ("foreign", _translated(error, method, args))
        pipe.send(answer)


def _translated(error: Exception, method: str, args: tuple[Any, ...]) -> PolicyError:
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else args[0] if method == "setup" else "?"
    failure = PolicyError(f"{method}() failed: {type(error).__name__}: {error}", rank=rank)
    failure.add_note("".join(_lines(error)))
    return failure


def _lines(error: Exception) -> list[str]:
    import traceback

    return traceback.format_exception(error)
