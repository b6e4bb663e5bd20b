"""Modelled servers in virtual time, for the real `ServerGroup`, sampler and judge to ask."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field

from megatron_fapo.errors import ServerUnreachable
from megatron_fapo.plan.engine import Engine, Sample
from megatron_fapo.plan.workload import Workload
from megatron_fapo.records import Generation, GenerationRequest, Ints, VersionSpan, floats

Answers = Callable[[int, Ints], Ints]
"""What a server writes for a seed and a prompt."""


@dataclass(eq=False)
class ModelledServer:
    """A server as `ServerGroup` sees one, with an engine's model in place of a process.

    `neighbours` are servers on its GPUs: while one of them has work too, it runs at half its speed. A closed `gate`
    lets requests in and nothing out.
    """

    url: str
    engine: Engine
    answers: Answers
    workload: Workload
    neighbours: list["ModelledServer"] = field(default_factory=list)
    gate: bool = True
    version: int = 0
    """Of the weights that it draws with."""
    failing: bool = False
    dead: bool = False
    busy: float = 0.0
    """Seconds with something running."""
    _lengths: dict[str, int] = field(default_factory=dict)
    _waiting: dict[str, asyncio.Future[tuple[str, int]]] = field(default_factory=dict)
    _timer: asyncio.TimerHandle | None = None
    _since: float = 0.0
    _speed: float = 1.0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Generation, None]:
        """As `Generator.generate`. Raises ServerUnreachable when the server dies."""
        drawn = request.drawn
        asked = request.token_ids[: len(request.token_ids) - drawn]
        texts = {name: self.answers(seed, asked)[drawn:] for name, seed in zip(request.ids, request.seeds, strict=True)}
        prompt = len(request.token_ids)
        samples = [
            Sample(name, prompt, len(text), 0 if index else prompt) for index, (name, text) in enumerate(texts.items())
        ]
        try:
            for finished in asyncio.as_completed(self._queue(samples)):
                name, tokens = await finished
                text = texts[name][:tokens]
                yield Generation(
                    id=name,
                    token_ids=text,
                    logprobs=floats(text * 0.0),
                    versions=(VersionSpan(start=0, version=self.version),),
                    finish_reason="stop" if tokens == len(texts[name]) else "abort",
                )
            self.failing = False
        finally:
            self._drop(sample.name for sample in samples)

    async def choices(self, rid: str, token_ids: Ints, choices: Sequence[int]) -> list[float]:
        """As `Scorer.choices`: a prefill, and a judge who is sure that all is well or does not know."""
        sample = Sample(rid, len(token_ids), 1, len(token_ids))
        try:
            _, tokens = await self._queue([sample])[0]
        finally:
            self._drop([rid])
        if not tokens:
            raise ServerUnreachable(f"{self.url} ended what it was asked", request=rid)
        sure = math.log(1e-6) if self.workload.clear(token_ids) else math.log(0.5)
        return [sure if choice != ord("-") else math.log1p(-math.exp(sure)) for choice in choices]

    async def abort(self, rid: str | None = None) -> None:
        """End the sample of this name, or all, with what is written of them."""
        self._advance()
        for name, future in self._waiting.items():
            if rid in (None, name) and not future.done():
                future.set_result((name, int(self.engine.drop(name))))
        self._schedule()

    def die(self) -> None:
        """Answer nothing from now on."""
        self._advance()
        self.dead = self.failing = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ServerUnreachable(f"{self.url} is dead"))
        self._schedule()

    def open_gate(self) -> None:
        """Let out what waits."""
        self._advance()
        self.gate = True
        self._schedule()

    @property
    def active(self) -> bool:
        """Whether something runs."""
        return self.gate and not self.dead and self.engine.running > 0

    def _queue(self, samples: Sequence[Sample]) -> list[asyncio.Future[tuple[str, int]]]:
        if self.dead:
            self.failing = True
            raise ServerUnreachable(f"{self.url} is dead")
        self._advance()
        loop = asyncio.get_running_loop()
        for sample in samples:
            self._waiting[sample.name] = loop.create_future()
            self._lengths[sample.name] = sample.length
            self.engine.add(sample)
        self._schedule()
        return [self._waiting[sample.name] for sample in samples]

    def _drop(self, names: Iterable[str]) -> None:
        """Whoever asked is gone."""
        left = [name for name in names if name in self._waiting]
        unfinished = [name for name in left if not self._waiting[name].done()]
        if unfinished:
            self._advance()
            for name in unfinished:
                self._waiting[name].cancel()
                self.engine.drop(name)
            self._schedule()
        for name in left:
            future = self._waiting.pop(name)
            del self._lengths[name]
            if not future.cancelled():
                future.exception()  # or asyncio would report that nobody had looked

    def _advance(self) -> None:
        """Bring the engine to the present."""
        now = asyncio.get_running_loop().time()
        if self.active:
            self.busy += now - self._since
            for name in self.engine.advance((now - self._since) * self._speed):
                future = self._waiting.get(name)
                if future is not None and not future.done():
                    future.set_result((name, self._lengths[name]))
        self._since = now

    def _schedule(self) -> None:
        """Wake at the engine's next event; neighbours whose share has changed are told."""
        self._rate()
        for other in self.neighbours:
            if other._speed != other._fair():
                other._advance()
                other._rate()

    def _fair(self) -> float:
        return 0.5 if self.active and any(other.active for other in self.neighbours) else 1.0

    def _rate(self) -> None:
        self._speed = self._fair()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wait = self.engine.until_event() if self.active else None
        if wait is not None:
            self._timer = asyncio.get_running_loop().call_later(wait / self._speed, self._wake)

    def _wake(self) -> None:
        self._advance()
        self._schedule()


@dataclass(frozen=True, slots=True)
class ModelledDevices:
    """Devices that always are the servers', and change hands in so many seconds."""

    seconds: float

    def room(self) -> AbstractAsyncContextManager[None]:
        """As `serving.lending.Devices`."""
        return nullcontext()

    async def hand_over(self, givers: Sequence[object], takers: Sequence[object]) -> int:
        """As `serving.lending.Devices`; bytes are not counted."""
        await asyncio.sleep(self.seconds)
        return 0
