"""Generation that runs ahead of training: later steps' groups are drawn while earlier ones are trained on.

One number says how far, `train.max_lead`. The groups of step s are begun when the weights after s - max_lead steps are
on the servers, and all that follow reach them in the middle of answers: generation is paused, the weights change,
and unfinished rollouts go on, each token with the version that drew it. So no token is older than max_lead
steps when it is trained on; with 0 a step's groups are begun when its own weights have arrived.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fapo.algorithm.rewards import Rates
from megatron_fapo.records import Group
from megatron_fapo.rollout.sampler import Sampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The groups of a step."""

    groups: list[Group]
    """All of them."""
    trainable: list[Group]
    """Those that the update uses."""
    too_old: int
    """Groups left out because a token was drawn with weights older than the lead allows."""
    rates: Rates
    """The judge's error rates as they were when the groups were begun: those that decided which verdicts to ask."""


class Ahead:
    """The groups of each step, begun up to `max_lead` steps before they are asked for.

    Use as an asynchronous context manager: its end ends what is still being drawn. Consumes prompts in the order of the
    steps, `prompts_per_step` each; `groups` waits for the step's own, and raises what their drawing raised.
    """

    def __init__(self, sampler: Sampler, *, max_lead: int, steps: int) -> None:
        self._sampler, self._lead, self._steps = sampler, max_lead, steps
        self._drawing: dict[int, asyncio.Task[tuple[list[Group], Rates]]] = {}

    async def __aenter__(self) -> "Ahead":
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._drawing.values():
            task.cancel()
        await asyncio.gather(*self._drawing.values(), return_exceptions=True)

    async def groups(self, step: int, cursor: int) -> Drawn:
        """The groups of a step whose first prompt is at `cursor`; the weights after `step` steps are on the servers."""
        for later in range(step, min(step + self._lead, self._steps - 1) + 1):
            if later not in self._drawing:
                first = cursor + (later - step) * self._sampler.prompts_per_step
                self._drawing[later] = asyncio.create_task(self._draw(later, first), name=f"groups-{later}")
        groups, rates = await self._drawing[step]
        del self._drawing[step]
        if self._sampler.judge.audit is not None:
            self._sampler.judge.audit.note(groups)
        fresh = self._fresh(groups, step)
        return Drawn(
            groups=groups, trainable=self._sampler.trainable(fresh), too_old=len(groups) - len(fresh), rates=rates
        )

    async def _draw(self, step: int, cursor: int) -> tuple[list[Group], Rates]:
        rates = self._sampler.judge.rates
        return await self._sampler.collect(step, cursor), rates

    def _fresh(self, groups: Sequence[Group], step: int) -> Sequence[Group]:
        """Those without a token that is too old: of a server that missed an update, or does not name its weights."""
        if not self._lead:
            return groups
        return [g for g in groups if all(s.version >= step - self._lead for j in g for s in j.rollout.versions)]
