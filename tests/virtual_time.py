"""Servers that live in virtual time (`plan.virtual_time`).

They are models: they take virtual seconds to answer and can fail on purpose. Sampler and judge are the real ones.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_fapo.plan.virtual_time import LoopClock, run_virtual
from megatron_fapo.records import Generation, GenerationRequest, Message, VersionSpan, floats, ints

__all__ = ["LoopClock", "ModelledServer", "Words", "run_virtual"]


class Words:
    """A codec in which token i is character i, so that a test can read what was sent."""

    eos_ids = (0,)

    def encode_chat(self, messages: tuple[Message, ...]) -> Any:
        return ints([ord(character) for message in messages for character in message.content])

    def encode(self, text: str) -> Any:
        return ints([ord(character) for character in text])

    def decode(self, token_ids: Any) -> str:
        return "".join(chr(token) for token in token_ids if token)


@dataclass
class ModelledServer:
    """Answers with `answer(request, index)` -> (text, virtual seconds); records when each request came and went."""

    answer: Callable[[GenerationRequest, int], tuple[str, float]]
    likely: Callable[[str], dict[str, float]] = lambda text: {}
    log: list[tuple[float, str, str]] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    """Raised by the next requests, one each."""

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Generation]:
        clock = LoopClock()
        self.log.append((clock.now(), "asked", request.ids[0]))
        if self.failures:
            raise self.failures.pop(0)
        pending: list[Awaitable[Generation]] = [
            asyncio.ensure_future(self._one(request, index, clock)) for index in range(len(request.ids))
        ]
        for finished in asyncio.as_completed(pending):
            yield await finished
        self.log.append((clock.now(), "answered", request.ids[0]))

    async def choices(self, rid: str, token_ids: Any, choices: Any) -> list[float]:
        """Log-probs by `likely(what was asked)` -> {character: probability}; at once."""
        self.log.append((LoopClock().now(), "scored", rid))
        if self.failures:
            raise self.failures.pop(0)
        likely = self.likely(Words().decode(token_ids))
        return [math.log(likely[chr(token)]) for token in choices]

    async def _one(self, request: GenerationRequest, index: int, clock: LoopClock) -> Generation:
        text, seconds = self.answer(request, index)
        await clock.sleep(seconds)
        tokens = [*map(ord, text), 0]
        return Generation(
            id=request.ids[index],
            token_ids=ints(tokens),
            logprobs=floats([-1.0] * len(tokens)),
            versions=(VersionSpan(start=0, version=0),),
            finish_reason="stop",
        )
