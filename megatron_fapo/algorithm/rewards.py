"""Rewards of a group: the task's outcome, FAPO's penalty for flawed positives, overlong shaping.

Equations are of FAPO (arXiv:2510.22543); overlong shaping is DAPO's (arXiv:2503.14476).
"""

import math
from dataclasses import dataclass

import numpy as np

from megatron_fapo.algorithm.settings import AlgorithmSettings, OverlongSettings, RewardSettings
from megatron_fapo.records import Floats, Group, Judged, NotJudged, Verdict, floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How often a judge flags.  Example: `Rates(tpr=0.914, fpr=0.058)`, whose J is .856."""

    tpr: float
    """Of flawed right answers."""
    fpr: float
    """Of clean right answers."""

    @property
    def j(self) -> float:
        """Youden's J, TPR - FPR: 1 for a perfect judge, 0 for one that says nothing."""
        return self.tpr - self.fpr

    def corrected(self, flag: float) -> float:
        """(flag - FPR) / J: over a judge's errors its mean is 1 for a flawed solution and 0 for a clean one."""
        return (flag - self.fpr) / self.j


PERFECT = Rates(tpr=1.0, fpr=0.0)


def flaw_penalty(step: int, settings: RewardSettings) -> float:
    """λ at a step."""
    plan = settings.schedule
    if plan is None:
        return settings.flaw_penalty
    progress = min(max((step - plan.begin) / (plan.end - plan.begin), 0.0), 1.0)
    if plan.shape == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return plan.initial + progress * (settings.flaw_penalty - plan.initial)


def rewards(group: Group, algorithm: AlgorithmSettings, *, max_tokens: int, rates: Rates = PERFECT) -> Floats:
    """[n] R = R_RLVR + R_Δ (Eq. 8) + overlong shaping, one reward for each rollout of the group.

    `max_tokens` is the response limit that overlong shaping counts from; `rates` are the judge's, where the settings
    correct by them. A failed verdict counts as `failed_verdict` says; a group that must be dropped is not for this
    function (see `usable`).
    """
    shares = flaw_shares(group, algorithm, rates)
    penalty = flaw_penalty(group.step, algorithm.reward)
    return floats(outcome_rewards(group, algorithm.reward, max_tokens=max_tokens) - penalty * shares)


def outcome_rewards(group: Group, settings: RewardSettings, *, max_tokens: int) -> Floats:
    """[n] R_RLVR (Eq. 4) + overlong shaping: the reward without the judge."""
    return floats(
        [
            judged.outcome.score + overlong_penalty(len(judged.rollout.token_ids), max_tokens, settings.overlong)
            for judged in group
        ]
    )


def flaw_shares(group: Group, algorithm: AlgorithmSettings, rates: Rates = PERFECT) -> Floats:
    """[n] how flawed each rollout counts, which λ multiplies: 1 or 0 when hard, p when soft; 0 for wrong answers.

    Corrected by the judge's rates it lies outside [0, 1] and is right on average (Rogan & Gladen 1978; as a reward:
    Natarajan et al. 2013, Lemma 1). A verdict that was skipped or switched off counts as 0: nothing is corrected there.
    """
    all_right = all(judged.outcome.right for judged in group)
    unanimous = all_right and algorithm.advantage.all_right == "agreed"
    return floats([_flaw_share(judged, algorithm.reward, rates, unanimous) for judged in group])


def _flaw_share(judged: Judged, settings: RewardSettings, rates: Rates, unanimous: bool) -> float:
    verdict = judged.verdict
    if not judged.outcome.right:
        return 0.0
    if isinstance(verdict, NotJudged):
        return float(settings.failed_verdict == "as_flawed" and verdict.reason == "failed")
    share = verdict.p_flawed if settings.penalty == "soft" else float(flagged(verdict, unanimous))
    return rates.corrected(share) if settings.correct_rates else share


def flagged(verdict: Verdict, unanimous: bool = False) -> bool:
    """Whether the verdict counts as a flag; `unanimous` asks for all votes."""
    return verdict.flawed and (verdict.p_flawed == 1.0 or not unanimous)


def usable(group: Group, settings: RewardSettings) -> bool:
    """Whether the group may be trained on: false when a verdict failed and `failed_verdict` is `drop_group`."""
    return settings.failed_verdict != "drop_group" or not any(
        isinstance(judged.verdict, NotJudged) and judged.verdict.reason == "failed" for judged in group
    )


def informative(group: Group, algorithm: AlgorithmSettings, *, max_tokens: int) -> bool:
    """Whether the group teaches anything: false when all its rewards are equal (DAPO's dynamic sampling, Eq. 11).

    DAPO asks for a right and a wrong answer; with flawed positives a group of right answers teaches too.
    """
    values = rewards(group, algorithm, max_tokens=max_tokens)
    return bool(values.max() > values.min())


def overlong_penalty(length: int, max_tokens: int, settings: OverlongSettings | None) -> float:
    """DAPO's soft punishment: 0 up to `max_tokens - buffer`, then falling linearly to `-factor` at `max_tokens`."""
    if settings is None:
        return 0.0
    excess = length - (max_tokens - settings.buffer)
    return float(np.minimum(-excess / settings.buffer * settings.factor, 0.0))


def shaped(lengths: list[int], max_tokens: int, settings: OverlongSettings | None) -> bool:
    """Whether overlong shaping touches any response of these lengths."""
    return any(overlong_penalty(length, max_tokens, settings) != 0.0 for length in lengths)
