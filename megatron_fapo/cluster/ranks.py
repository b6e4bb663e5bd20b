"""The processes of a model for as long as all of them live: calls to all, and whose fault it is when that ends.

Ray is imported where it is used, because `ray_session` sets its environment first.

A rank is watched in three ways, each with its own limit:

| what happens | found by | within |
|---|---|---|
| its process dies | Ray, when it is next asked | a quarter of `alive_within` |
| its process is frozen | a question that another of its threads answers, whatever the rank is doing | `alive_within` |
| it waits for ever | the process group's timeout on the rank, else ours on the call | `policy.timeout`, `deadline` |
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NoReturn

from megatron_fapo.cluster.placement import Placement
from megatron_fapo.cluster.rank_actor import ALIVE
from megatron_fapo.errors import FapoError, PolicyError, RankLost
from megatron_fapo.records import Role

COLOURS = re.compile(r"\x1b\[\d+m")
"""Ray paints its tracebacks."""

GRACE = 2.0
"""Seconds in which further failures are awaited after the first: a rank that dies takes its peers along."""

Doing = Literal["start", "publish", "generate", "train", "save"]
"""The phases of a run, as its ranks see them: in `generate` they wait for the servers."""

PHASES: dict[str, Doing] = {
    "address": "start",
    "setup": "start",
    "load": "start",
    "open_export": "publish",
    "next_bucket": "publish",
    "expected": "publish",
    "update": "train",
    "begin_save": "save",
    "save_written": "save",
    "end_save": "save",
    "save_hf": "save",
}
"""The phase of each verb."""


class Ranks:
    """One life of a model's ranks: a failure of one ends all, and each call from then on raises it.

    A rank's own error arrives as it was raised there, with the rank's traceback as a note. A rank that dies, is frozen
    or stays silent past a deadline becomes a RankLost that names rank, verb, phase and step. Of several failures the
    likely cause is raised: a death, else a freeze, else an error of ours, else a foreign one, else a lost peer.
    """

    def __init__(
        self,
        role: Role,
        actors: Sequence[Any],
        deadline: float,
        placement: Placement | None = None,
    ) -> None:
        self.role = role
        self.deadline = deadline
        self.step: int | None = None
        """The step that the loop is at, for errors; and its phase:"""
        self.phase: Doing = "start"
        self.failure: BaseException | None = None
        self._actors = list(actors)
        self._placement = placement
        self._verbs: list[str] = []
        """What the ranks have been asked and not answered."""
        self._ended = asyncio.Event()
        self._alive_within: float | None = None
        self._watch: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._actors)

    @property
    def nodes(self) -> list[str]:
        """Ray's ids of the nodes that the ranks are on."""
        return [] if self._placement is None else self._placement.nodes()

    def watch(self, deadline: float, alive_within: float) -> None:
        """From now on verbs have `deadline` seconds, and each rank shows a sign of life every `alive_within`."""
        self.deadline, self._alive_within = deadline, alive_within
        self._watch = asyncio.create_task(self._watching(alive_within), name=f"watch-{self.role}")

    async def one(self, rank: int, verb: str, *arguments: Any) -> Any:
        """A method of one rank."""
        self._check()
        return (await self.gather(verb, [self._actors[rank].call.remote(verb, *arguments)]))[0]

    async def all(self, verb: str, *arguments: Any) -> list[Any]:
        """A method of all ranks, with the same arguments."""
        self._check()
        return await self.gather(verb, [actor.call.remote(verb, *arguments) for actor in self._actors])

    async def each(self, verb: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """A method of all ranks, with arguments of their own."""
        self._check()
        pairs = zip(self._actors, arguments, strict=True)
        return await self.gather(verb, [actor.call.remote(verb, *own) for actor, own in pairs])

    async def gather(self, verb: str, references: Sequence[Any]) -> list[Any]:
        """The answers to what was asked of the ranks, in their order."""
        futures = [_answer(reference) for reference in references]
        self._verbs.append(verb)
        try:
            done, silent = await asyncio.wait(futures, timeout=self.deadline, return_when=asyncio.FIRST_EXCEPTION)
            if any(future.exception() is not None for future in done):
                raise self._end(await self._cause(futures, verb))
            if silent:
                names = ", ".join(str(rank) for rank, future in enumerate(futures) if future in silent)
                said = f"no answer within {self.deadline:g} s (cluster.phase_deadline)"
                raise self._end(RankLost(said, **self._where(names, verb)))
        finally:
            self._verbs.remove(verb)
        return [future.result() for future in futures]

    async def lost(self) -> NoReturn:
        """Wait until the ranks have failed, and raise why."""
        await self._ended.wait()
        assert self.failure is not None
        raise self.failure

    def stop(self) -> None:
        """End all ranks."""
        import ray

        if self._watch is not None:
            self._watch.cancel()
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []
        if self._placement is not None:
            self._placement.release()
            self._placement = None

    def _check(self) -> None:
        if self.failure is not None:  # a verb that ran beside another one ended the ranks: it says why
            raise self.failure

    def _found(self) -> BaseException | None:
        """What ended the ranks, if something has."""
        return self.failure

    def _end(self, failure: BaseException) -> BaseException:
        """End the ranks for this reason, unless they ended before; the reason that counts."""
        if self.failure is None:
            self.failure = failure
            self.stop()
            self._ended.set()
        return self.failure

    def _where(self, rank: int | str, verb: str | None = None) -> dict[str, object]:
        """The place of a failure, for an error."""
        phase = self.phase if verb is None else PHASES.get(verb, self.phase)
        found: dict[str, object] = {"role": self.role, "rank": rank}
        found |= {} if verb is None else {"verb": verb}
        found |= {"phase": phase}
        return found if self.step is None else found | {"step": self.step}

    async def _watching(self, within: float) -> None:
        """Ask every rank again and again whether it is alive; end all when one is not."""
        try:
            while not self._ended.is_set():
                await asyncio.sleep(within / 4)
                for lost in (await self._dead(range(len(self._actors)), 0.75 * within)).values():
                    self._end(lost)
        except Exception as error:  # noqa: BLE001 - whatever it is, ranks that nobody watches must not go on
            self._end(PolicyError(f"the ranks cannot be watched: {error!r}", **self._where("all")))

    async def _dead(self, ranks: Sequence[int], patience: float) -> dict[int, BaseException]:
        """{rank: how it was lost}, of those that do not say that they are alive."""
        verb = self._verbs[0] if self._verbs else None
        places = {rank: self._where(rank, verb) for rank in ranks}  # where they are now, not where the wait ends
        asked = {rank: self._actors[rank].alive.options(concurrency_group=ALIVE).remote() for rank in ranks}
        answers = {rank: _answer(reference) for rank, reference in asked.items()}
        await asyncio.wait(answers.values(), timeout=patience, return_when=asyncio.FIRST_EXCEPTION)
        found: dict[int, BaseException] = {}
        for rank, answer in answers.items():
            if answer.done() and (error := answer.exception()) is not None:
                found[rank] = self._translate(error, rank, verb)
        if found:
            return found
        for rank, answer in answers.items():
            if not answer.done():
                said = f"the rank's process is frozen: no sign of life for {self._alive_within:g} s"
                found[rank] = RankLost(f"{said} (cluster.rank_deadline)", **places[rank])
        return found

    async def _cause(self, futures: Sequence[asyncio.Future[Any]], verb: str) -> BaseException:
        """The likely cause of one or several failures, as one of our errors."""
        errors = await _failures(futures)
        if found := self._found():  # the watch has ended the ranks meanwhile, and knows why
            return found
        rank = min(errors, key=lambda rank: _order(errors[rank]))
        cause = self._translate(errors[rank], rank, verb)
        if _order(errors[rank]) == LOST_PEER and self._watch is not None:  # the watch will say which peer, if it froze
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), self._alive_within)
            if found := self._found():
                found.add_note(f"its peer said: {cause}")
                return found
        return cause

    def _translate(self, error: BaseException, rank: int, verb: str | None) -> BaseException:
        """A Ray error as one of ours; a rank's own error comes through as it is, with its traceback as a note."""
        import ray

        where = self._where(rank, verb)
        if isinstance(error, ray.exceptions.RayTaskError):
            cause: BaseException = error.cause
            if not isinstance(cause, FapoError) or isinstance(cause, RankLost):
                text = " ".join(str(cause).split())
                kind = RankLost if isinstance(cause, RankLost) else PolicyError
                cause = kind(text if kind is RankLost else f"{type(cause).__name__}: {text}", **where)
            cause.add_note(COLOURS.sub("", str(error)))
            return cause
        if isinstance(error, ray.exceptions.RayActorError):
            said = "".join(str(error).strip().splitlines()[-1:])
            said = said.partition(" Some common causes")[0]  # Ray's guesses are longer than what it knows
            return RankLost(f"the rank's process died: {said}", **where)
        if isinstance(error, ray.exceptions.RayError):
            return PolicyError(f"Ray: {error}", **where)
        return error


LOST_PEER = 3


def _order(error: BaseException) -> int:
    """How likely an error is the cause of the others: the least first."""
    import ray

    if isinstance(error, ray.exceptions.RayActorError):
        return 0
    cause = getattr(error, "cause", None)
    if isinstance(cause, RankLost):
        return LOST_PEER
    return 1 if isinstance(cause, FapoError) else 2


def _answer(reference: Any) -> asyncio.Future[Any]:
    """What a rank was asked for. One that still runs when the ranks are ended fails later, and nobody asks why."""
    future = asyncio.wrap_future(reference.future())
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


async def _failures(futures: Sequence[asyncio.Future[Any]]) -> Mapping[int, BaseException]:
    """{rank: its error}, of all ranks that fail within the grace time; no wait once a rank is known to have died."""
    import ray

    end = asyncio.get_running_loop().time() + GRACE
    while True:
        found = {rank: f.exception() for rank, f in enumerate(futures) if f.done() and f.exception() is not None}
        errors = {rank: error for rank, error in found.items() if error is not None}
        running = [future for future in futures if not future.done()]
        left = end - asyncio.get_running_loop().time()
        if not running or left <= 0 or any(isinstance(e, ray.exceptions.RayActorError) for e in errors.values()):
            return errors
        await asyncio.wait(running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
