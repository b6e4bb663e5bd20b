"""Which rollouts of a group are judged, and when: as soon as it is known that the verdict matters.

While a group is still generating, its first right solution waits: alone it could not change an advantage
(`algorithm.advantages.needs_verdict`). When a second, different right solution lands, both are asked at once, and
each later one on arrival. So where the skip is lossless no call is wasted, and only that one waits.
"""

import asyncio
import hashlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_fapo.algorithm.advantages import needs_verdict
from megatron_fapo.algorithm.rewards import PERFECT, Rates, flaw_penalty, shaped
from megatron_fapo.algorithm.settings import AlgorithmSettings
from megatron_fapo.errors import JudgeError
from megatron_fapo.judge.ask import Asker
from megatron_fapo.judge.audit import Audit
from megatron_fapo.judge.settings import JudgeSettings
from megatron_fapo.records import Group, NotJudged, Outcome, Prompt, Rollout, Verdict
from megatron_fapo.trace import Clock, SystemClock

VerdictTask = asyncio.Task[Verdict | NotJudged]

MIXED, ALL_RIGHT_SO_FAR = 0, 1
"""Urgency of a verdict: λ acts in groups of three classes, so those with a wrong rollout go first."""

ENOUGH_TO_TELL = 16
"""Below this many asked verdicts a share of failures says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What decides whether a verdict is asked."""

    judge: JudgeSettings
    algorithm: AlgorithmSettings
    group_size: int
    max_tokens: int
    """The response limit, for overlong shaping."""

    @property
    def rates(self) -> Rates:
        """The judge's error rates, as far as they are known."""
        known = self.judge.rates
        return PERFECT if known is None else Rates(tpr=known.tpr, fpr=known.fpr)

    def matters(self, step: int, distinct_right: int, landed: Sequence[tuple[Rollout, Outcome]], rates: Rates) -> bool:
        """Whether a verdict can change an advantage in a group of this step with so many right solutions so far.

        `rates` are those that the step's rewards will be corrected by.
        """
        reward = self.algorithm.reward
        lengths = [len(rollout.token_ids) for rollout, _ in landed]
        graded = any(outcome.score != (1.0 if outcome.right else -1.0) for _, outcome in landed)
        return not self.judge.skip or needs_verdict(
            distinct_right=distinct_right,
            group_size=self.group_size,
            penalty=flaw_penalty(step, reward),
            algorithm=self.algorithm,
            rates=rates,
            uneven=graded or shaped(lengths, self.max_tokens, reward.overlong),
        )


@dataclass(slots=True)
class GroupJudge:
    """The verdicts of one group. Consumes rollouts as they land; is unblocked by the judge's servers."""

    asker: Asker
    rules: Rules
    step: int
    prompt: Prompt
    end: "StepEnd"
    rates: Rates
    _landed: list[tuple[Rollout, Outcome]] = field(default_factory=list)
    _asked: dict[str, VerdictTask] = field(default_factory=dict)
    """By the solution's text: identical solutions share their verdict."""
    _probes: dict[str, VerdictTask] = field(default_factory=dict)
    """By rollout id."""

    def add(self, rollout: Rollout, outcome: Outcome) -> None:
        """Take in a finished rollout; starts verdicts, never waits for one."""
        self._landed.append((rollout, outcome))
        self._start()

    async def verdicts(self) -> dict[str, Verdict | NotJudged]:
        """{rollout id: verdict} of all rollouts added; waits for those that were asked."""
        self._start()
        for rollout, outcome in self._landed:
            if outcome.right and rollout.text not in self._asked and self._drawn(rollout):
                self._probes[rollout.id] = self._ask(rollout)
        return {rollout.id: await self._verdict(rollout, outcome) for rollout, outcome in self._landed}

    async def cancel(self) -> None:
        """Stop what is still being asked."""
        tasks = [*self._asked.values(), *self._probes.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self) -> None:
        right: dict[str, Rollout] = {}
        for rollout, outcome in self._landed:
            if outcome.right:
                right.setdefault(rollout.text, rollout)
        if self.rules.matters(self.step, len(right), self._landed, self.rates):
            for text, rollout in right.items():
                if text not in self._asked:
                    self._asked[text] = self._ask(rollout)

    async def _verdict(self, rollout: Rollout, outcome: Outcome) -> Verdict | NotJudged:
        if not outcome.right:
            return NotJudged(reason="wrong")
        if rollout.text in self._asked:
            return await self._asked[rollout.text]
        if rollout.id in self._probes:
            probe = await self._probes[rollout.id]
            tokens = probe.tokens
            return NotJudged(reason="skipped", probe=probe if isinstance(probe, Verdict) else None, tokens=tokens)
        return NotJudged(reason="skipped")

    def _ask(self, rollout: Rollout) -> VerdictTask:
        mixed = not all(outcome.right for _, outcome in self._landed)
        urgency = MIXED if mixed else ALL_RIGHT_SO_FAR
        return asyncio.ensure_future(
            self.end.unless_over(self.asker.ask(self.prompt, rollout.text, rollout.id, urgency))
        )

    def _drawn(self, rollout: Rollout) -> bool:
        """Whether a skipped rollout is drawn for a probe; the draw depends on its id alone."""
        draw = int.from_bytes(hashlib.blake2b(rollout.id.encode(), digest_size=4).digest(), "big") / 2**32
        return draw < self.rules.judge.probe_share


class StepEnd:
    """The deadline of a step's verdicts: `seconds` after the last of its groups has been generated.

    Use as an asynchronous context manager around the step; its end ends the timer.
    """

    def __init__(self, clock: Clock, seconds: float | None, groups: int) -> None:
        self._clock = clock
        self._seconds = seconds
        self._generating = groups
        self._timer: asyncio.Task[None] | None = None
        self._over = asyncio.Event()

    async def __aenter__(self) -> "StepEnd":
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            await asyncio.gather(self._timer, return_exceptions=True)

    def generated(self) -> None:
        """One group more is generated; after the last the time runs."""
        self._generating -= 1
        if self._generating == 0 and self._seconds is not None:
            self._timer = asyncio.ensure_future(self._wait(self._seconds))

    async def unless_over(self, work: Coroutine[Any, Any, Verdict | NotJudged]) -> Verdict | NotJudged:
        """The result of `work`, or a failed verdict when the step's time is over first."""
        if self._seconds is None:
            return await work
        task, over = asyncio.ensure_future(work), asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else NotJudged(reason="failed", why="step deadline")
        finally:
            task.cancel()
            over.cancel()
            await asyncio.gather(task, over, return_exceptions=True)

    async def _wait(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
        self._over.set()


class NoJudge:
    """Plain GRPO: every right rollout stays unjudged."""

    def __init__(self) -> None:
        self._results: dict[str, Verdict | NotJudged] = {}

    def add(self, rollout: Rollout, outcome: Outcome) -> None:
        """Take in a finished rollout."""
        self._results[rollout.id] = NotJudged(reason="off" if outcome.right else "wrong")

    async def verdicts(self) -> dict[str, Verdict | NotJudged]:
        """{rollout id: NotJudged}."""
        return self._results

    async def cancel(self) -> None:
        """Nothing to stop."""


class Judge:
    """Opens a `GroupJudge` for each group, or a `NoJudge` when there are no judge servers."""

    def __init__(
        self, asker: Asker | None, rules: Rules, clock: Clock | None = None, audit: Audit | None = None
    ) -> None:
        self.audit = audit
        """The judge's error rates as they are measured, where the run audits it."""
        self._asker = asker
        self._clock = clock or SystemClock()
        self._rules = rules
        self._asked = self._failed = 0

    def step(self, groups: int) -> "StepEnd":
        """What ends the verdicts of a step of that many groups; an asynchronous context manager."""
        return StepEnd(self._clock, self._rules.judge.step_deadline, groups)

    def open(self, step: int, prompt: Prompt, end: "StepEnd") -> GroupJudge | NoJudge:
        """A judge for one group."""
        if self._asker is None:
            return NoJudge()
        return GroupJudge(self._asker, self._rules, step, prompt, end, self.rates)

    @property
    def rates(self) -> Rates:
        """The judge's error rates as measured, or else as the settings know them. A step's rewards take those from
        before it, which are also those by which its verdicts were left out."""
        measured = self.audit.rates if self.audit is not None else None
        return measured or self._rules.rates

    def check(self, groups: Sequence[Group]) -> None:
        """Raise JudgeError when too many verdicts failed to trust the run.

        They are counted over as many steps as it takes until there are enough to tell.
        """
        verdicts = [judged.verdict for group in groups for judged in group]
        failed = [v for v in verdicts if isinstance(v, NotJudged) and v.reason == "failed"]
        self._failed += len(failed)
        self._asked += len(failed) + sum(isinstance(v, Verdict) for v in verdicts)
        if self._asked < ENOUGH_TO_TELL:
            return
        if self._failed > self._rules.judge.max_failed_share * self._asked:
            last = f"; the last one: {failed[-1].why}" if failed else ""
            raise JudgeError(
                f"{self._failed} of {self._asked} verdicts failed, more than judge.max_failed_share = "
                f"{self._rules.judge.max_failed_share}{last}. Look at the judge server's log"
            )
        self._asked = self._failed = 0
