"""What is asked and answered in a simulation: prompts of different difficulty, long-tailed lengths, verdicts.

Every draw follows from a seed that the sampler or the judge gives its request, as in a run; so a rollout is the same
with and without a judge, on any number of GPUs, whichever server writes it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from statistics import NormalDist

import numpy as np

from megatron_fapo.critique.boxed import OPENING
from megatron_fapo.plan.assumptions import Assumptions
from megatron_fapo.records import Ints, Message, Outcome, Prompt, ints

PLAIN = NormalDist()

JUDGE_WORDS = 300
"""Tokens of the judge's prompt around problem and solution (`critique.prompt`)."""

FLAWED, CLEAN = -1, -2
"""First token of a verdict here; no seed is negative."""


@dataclass(frozen=True)
class Lengths:
    """A log-normal distribution, cut at a limit, whose mean after the cut is given."""

    mean: float
    spread: float
    limit: int

    @cached_property
    def centre(self) -> float:
        """Mean of the logarithm before the cut."""
        if self.spread == 0:
            return math.log(self.mean)
        low, high = math.log(self.mean) - 20, math.log(self.limit) + 20
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self._cut_mean(middle) < self.mean else (low, middle)
        return (low + high) / 2

    def at(self, share: float) -> int:
        """The length below which this share of all lies."""
        drawn = math.exp(self.centre + self.spread * PLAIN.inv_cdf(min(max(share, 1e-9), 1 - 1e-9)))
        return int(min(max(drawn, 2), self.limit))

    def quantiles(self, count: int) -> list[int]:
        """`count` lengths that stand for the whole distribution, in an order without pattern."""
        found = [self.at((index + 0.5) / count) for index in range(count)]
        Random("lengths").shuffle(found)
        return found

    def _cut_mean(self, centre: float) -> float:
        edge, spread = math.log(self.limit), self.spread
        inside = math.exp(min(centre + spread * spread / 2, 700)) * PLAIN.cdf(
            (edge - centre - spread * spread) / spread
        )
        return inside + self.limit * (1 - PLAIN.cdf((edge - centre) / spread))


@dataclass(eq=False)
class Workload:
    """A task in the form of `tasks.interface.Task`, and a codec for policy and judge."""

    assume: Assumptions
    responses: Lengths
    verdicts: Lengths
    name: str = "simulated"
    eos_ids: tuple[int, ...] = (0,)

    # The task.

    def prompt(self, index: int) -> Prompt:
        """Prompt `index`: as long as all are, with a difficulty of its own."""
        tokens = np.zeros(int(self.assume.prompt_tokens), np.int32)
        return Prompt(
            id=f"p{index}",
            task=self.name,
            question=f"p{index}",
            messages=(),
            token_ids=ints(tokens),
            reference_answer=repr(self._chance(index)),
        )

    def held_out(self, count: int) -> list[Prompt]:
        """None is needed."""
        return []

    async def check(self, prompt: Prompt, text: str) -> Outcome:
        """Right with the chance of its prompt; cut at the limit it has no answer."""
        cut = text.endswith(f" of {self.responses.limit} tokens")
        right = not cut and Random(f"right/{text}").random() < float(prompt.reference_answer)
        why = "equal" if right else "different"
        return Outcome(right=right, score=1.0 if right else -1.0, answer=None, why=why)

    def oracle(self, prompt: Prompt, text: str) -> int | None:
        """Nobody knows."""
        return None

    async def close(self) -> None:
        """Nothing is held."""

    def _chance(self, index: int) -> float:
        mean, sharp = self.assume.right, self.assume.concentration
        if mean in (0.0, 1.0):
            return mean
        return Random(f"chance/{index}").betavariate(mean * sharp, (1 - mean) * sharp)

    # What servers answer.

    def response(self, seed: int) -> Ints:
        """[T] tokens of a rollout; the first two say which it is and how long."""
        length = self.responses.at(Random(f"length/{seed}").random())
        tokens = np.zeros(length, np.int32)
        tokens[:2] = seed, length
        return ints(tokens)

    def verdict(self, seed: int, asked: Ints) -> Ints:
        """[T] tokens of a verdict on the solution that `asked` shows."""
        tokens = np.zeros(self.verdicts.at(Random(f"verdict/{seed}").random()), np.int32)
        tokens[0] = FLAWED if Random(f"flawed/{asked[0]}").random() < self.assume.flawed else CLEAN
        return ints(tokens)

    def clear(self, asked: Ints) -> bool:
        """Whether the judge is sure about a solution without reasoning."""
        return Random(f"clear/{asked[0]}").random() < self.assume.clear

    # The codec: a rollout's text is its seed and length, a judge's prompt as long as what it shows.

    def encode_chat(self, messages: Sequence[Message]) -> Ints:
        """[T] tokens of a judge's prompt, the first of which says whose solution it shows."""
        found = re.search(r"rollout (\d+) of (\d+) tokens", messages[-1].content)
        seed, length = (int(found[1]), int(found[2])) if found else (0, 0)
        tokens = np.zeros(int(self.assume.prompt_tokens) + JUDGE_WORDS + length, np.int32)
        tokens[0] = seed
        return ints(tokens)

    def encode(self, text: str) -> Ints:
        """[T] a token a character."""
        return ints([ord(character) for character in text])

    def decode(self, token_ids: Ints) -> str:
        """A verdict's text, or that of a rollout; of a part of a rollout nothing."""
        if len(token_ids) and token_ids[0] in (FLAWED, CLEAN):
            return f"{OPENING}{0 if token_ids[0] == FLAWED else -1}}}"
        return f"rollout {token_ids[0]} of {token_ids[1]} tokens" if len(token_ids) > 1 else ""


def workload(assume: Assumptions, limit: int, verdict_limit: int, mean: float | None = None) -> Workload:
    """For responses of at most `limit` tokens, `mean` on average."""
    return Workload(
        assume=assume,
        responses=Lengths(min(mean or assume.mean_share * limit, limit), assume.spread, limit),
        verdicts=Lengths(min(assume.verdict_tokens, verdict_limit), assume.verdict_spread, verdict_limit),
    )
