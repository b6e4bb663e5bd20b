"""Is the judge still to be trusted? On a share of the rollouts it is compared with a reference, over the last steps.

A frozen judge meets a policy that learns what it overlooks. Its error rates on the rollouts of *this* policy are
measured while the run goes on, with intervals; the reward may use them, and a Youden's J that has certainly fallen
raises an alarm.
"""

import hashlib
import logging
import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace

from megatron_fapo.algorithm.rewards import Rates
from megatron_fapo.errors import JudgeError
from megatron_fapo.judge.ask import Asker
from megatron_fapo.judge.settings import AuditSettings, CascadeSettings
from megatron_fapo.records import AuditCounts, Group, Interval, JudgeAudit, Prompt, Rollout, ShortAudit, Verdict

log = logging.getLogger(__name__)

Z = 1.96
"""Standard deviations of a two-sided 95 % interval."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Verdicts against the reference."""

    tp: int = 0
    fn: int = 0
    fp: int = 0
    tn: int = 0
    short_fn: int = 0
    """Of `fn`, those that the cascade ended."""
    short_fp: int = 0
    """Of `fp`, those that the cascade ended."""
    p_flawed: float = 0.0
    """Sum of the judge's P(flawed) over the flawed rollouts."""
    p_clean: float = 0.0
    """The same over the clean ones."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def of(cls, pairs: Iterable[tuple[bool, bool]]) -> "Counts":
        """From (flagged by the judge, flawed by the reference)."""
        found = Counter(pairs)
        return cls(found[True, True], found[False, True], found[True, False], found[False, False])

    @classmethod
    def of_verdicts(cls, audited: Sequence[tuple[Verdict, bool]]) -> "Counts":
        """From (verdict, flawed by the reference)."""
        short = [(verdict, flawed) for verdict, flawed in audited if verdict.short]
        return replace(
            cls.of((verdict.flawed, flawed) for verdict, flawed in audited),
            short_fn=sum(flawed and not verdict.flawed for verdict, flawed in short),
            short_fp=sum(verdict.flawed and not flawed for verdict, flawed in short),
            p_flawed=sum(verdict.p_flawed for verdict, flawed in audited if flawed),
            p_clean=sum(verdict.p_flawed for verdict, flawed in audited if not flawed),
        )

    @property
    def flawed(self) -> int:
        """Flawed by the reference."""
        return self.tp + self.fn

    @property
    def clean(self) -> int:
        """Clean by the reference."""
        return self.fp + self.tn


def wilson(hits: float, trials: float) -> Interval:
    """A share with Wilson's 95 % score interval (Wilson 1927); trials need not be whole (an effective number)."""
    if trials == 0:
        return Interval(value=math.nan, low=0.0, high=1.0)
    share, z2 = hits / trials, Z * Z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return Interval(value=share, low=max(centre - half, 0.0), high=min(centre + half, 1.0))


def difference(one: Interval, other: Interval) -> Interval:
    """`one` - `other` for independent shares, by Newcombe's hybrid score interval (Newcombe 1998, method 10)."""
    value = one.value - other.value
    return Interval(
        value=value,
        low=value - math.hypot(one.value - one.low, other.high - other.value),
        high=value + math.hypot(one.high - one.value, other.value - other.low),
    )


class Audit:
    """The counts of the last steps. `label` asks the reference; `note` takes a step in; `rates` is what they say.

    With `soft` the reward takes the judge's probability p of a flaw instead of its flag, so the rates that it is
    corrected by are the means of p: over votes they are those of one vote, not of what the votes decide. Of a `cascade`
    it measures what its short verdicts get wrong.
    """

    def __init__(
        self,
        settings: AuditSettings,
        reference: Asker | None,
        *,
        soft: bool = False,
        cascade: CascadeSettings | None = None,
    ) -> None:
        self._settings = settings
        self._reference = reference
        """None where the task's own oracle is the reference."""
        self._soft = soft
        self._cascade = cascade
        self._steps: deque[Counts] = deque(maxlen=settings.window)
        self._audited = 0

    async def label(
        self, prompt: Prompt, rollout: Rollout, verdict: Verdict | object, oracle: int | None
    ) -> int | None:
        """The reference's first wrong paragraph for a judged rollout that is drawn for the audit, else None.

        A reference that fails gives no label. The draw depends on the rollout's id alone.
        """
        if not isinstance(verdict, Verdict) or not self._drawn(rollout.id):
            return None
        if self._reference is None:
            return oracle
        found = await self._reference.ask(prompt, rollout.text, f"{rollout.id}-audit")
        return found.first_wrong if isinstance(found, Verdict) else None

    def note(self, groups: Sequence[Group]) -> None:
        """Take in a step. Raises JudgeError when the settings say that an alarm stops the run."""
        audited = [
            (judged.verdict, judged.audit != -1)
            for group in groups
            for judged in group
            if judged.audit is not None and isinstance(judged.verdict, Verdict)
        ]
        self._audited = len(audited)
        self._steps.append(Counts.of_verdicts(audited))
        found = self.found
        if found.alarm:
            said = (
                f"the judge's Youden's J over the last {len(self._steps)} steps is {found.j.value:.2f} "
                f"({found.j.low:.2f} to {found.j.high:.2f}), surely less than judge.audit.min_j = "
                f"{self._settings.min_j}"
            )
            if self._settings.stop:
                raise JudgeError(f"{said}; refresh the judge, or lower the bar")
            log.warning(said)
        if found.short is not None and found.short.alarm:
            log.warning(
                f"over the last {len(self._steps)} steps the cascade ended {found.short.missed.value:.1%} of the "
                f"flawed solutions as clean and {found.short.invented.value:.1%} of the clean ones as flawed, surely "
                "more than judge.cascade.max_error: choose its thresholds again (tools/calibrate_judge.py)"
            )

    @property
    def found(self) -> JudgeAudit:
        """What the window says now."""
        total = self._total
        tpr, fpr = wilson(total.tp, total.flawed), wilson(total.fp, total.clean)
        j = difference(tpr, fpr)
        alarm = self._settings.min_j is not None and j.high < self._settings.min_j
        return JudgeAudit(audited=self._audited, tpr=tpr, fpr=fpr, j=j, alarm=alarm, short=self._short(total))

    def _short(self, total: Counts) -> ShortAudit | None:
        if self._cascade is None:
            return None
        missed, invented = wilson(total.short_fn, total.flawed), wilson(total.short_fp, total.clean)
        most = self._cascade.max_error
        alarm = most is not None and max(missed.low, invented.low) > most
        return ShortAudit(missed=missed, invented=invented, alarm=alarm)

    @property
    def rates(self) -> Rates | None:
        """The measured rates, pulled a little to the middle (Laplace); None until both classes have `enough`.

        Raises JudgeError when the verdicts say nothing: no reward can be corrected by them.
        """
        total = self._total
        if min(total.flawed, total.clean) < self._settings.enough:
            return None
        hits, false = (total.p_flawed, total.p_clean) if self._soft else (total.tp, total.fp)
        rates = Rates(tpr=(hits + 1) / (total.flawed + 2), fpr=(false + 1) / (total.clean + 2))
        if rates.j <= 0:
            raise JudgeError(
                f"the judge flags flawed solutions ({rates.tpr:.0%}) no more often than clean ones ({rates.fpr:.0%}), "
                "by the audit of the last steps: its verdicts say nothing"
            )
        return rates

    @property
    def counts(self) -> AuditCounts:
        """The window, for the run's state."""
        return tuple(astuple(counts) for counts in self._steps)

    def restore(self, counts: AuditCounts) -> None:
        """Go on from a run's state."""
        self._steps.clear()
        self._steps.extend(Counts(*row) for row in counts)

    @property
    def _total(self) -> Counts:
        return sum(self._steps, Counts())

    def _drawn(self, rollout_id: str) -> bool:
        digest = hashlib.blake2b(f"audit/{rollout_id}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") / 2**32 < self._settings.share
