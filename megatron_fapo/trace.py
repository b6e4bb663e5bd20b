"""Time and measurements as types, importable by every room: the clock, spans, and the counters a step collects."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from megatron_fapo.records import Role


class Clock(Protocol):
    """Where sampler and judge get time from, so that a test or a simulator can run them in virtual time."""

    def now(self) -> float:
        """Seconds on a monotonic scale."""

    async def sleep(self, seconds: float) -> None:
        """Come back `seconds` later on the same scale."""


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        """Seconds on a monotonic scale."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Come back `seconds` later."""
        await asyncio.sleep(seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of time with a name, in seconds of the clock that measured it.

    Example: `Span(name="generate", start=12.0, end=13.5)`.
    """

    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


Kind = Literal["parameters", "gradients", "optimizer"]
KINDS: tuple[Kind, ...] = ("parameters", "gradients", "optimizer")
"""What a training rank holds of a device's memory."""

Phase = Literal["publish", "generate", "train"]
"""Who owns the devices' memory, where ranks and servers share them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """A change of phase: how long it took and what it moved, in seconds and bytes."""

    phase: Phase
    """The phase that it led to."""
    seconds: float
    freed: int
    taken: int
    resident: Mapping[str, int]
    """Bytes by owner afterwards, as each owner counts them itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stint:
    """How long the servers of a role have worked on devices that two roles share, until they were taken or given back.

    Example: `Stint(role="policy", lent=True, seconds=12.5, handed_over=True, nbytes=40 * 2**30)`.
    """

    role: Role
    lent: bool
    """Whether the devices are the other role's."""
    seconds: float
    handed_over: bool
    """Whether the devices went to the other role's servers then; else the phase ended."""
    nbytes: int
    """KV cache memory that was given back for them."""


@dataclass(slots=True)
class Spans:
    """The spans of one step, collected as they end."""

    clock: Clock
    ended: list[Span] = field(default_factory=list)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the body of a `with` block; it is recorded even when the body raises."""
        start = self.clock.now()
        try:
            yield
        finally:
            self.ended.append(Span(name=name, start=start, end=self.clock.now()))

    def seconds(self, name: str) -> float:
        """Total seconds of all spans called `name`."""
        return sum(span.seconds for span in self.ended if span.name == name)
