"""Held-out evaluation: how often the policy is right, and how often it is right for the right reasons."""

import math
from collections.abc import Sequence

from megatron_fapo.records import Evaluation, Group, Judged, NotJudged, Prompt, Verdict
from megatron_fapo.rollout.sampler import Sampler


async def evaluate(sampler: Sampler, prompts: Sequence[Prompt], step: int = 0) -> Evaluation:
    """Sample a group for each held-out prompt, check all rollouts, judge the right ones.

    `sampler` has the evaluation's temperature and group size, and its judge (if any) skips nothing: here every
    verdict counts.
    """
    return summarise(await sampler.sample(step, prompts))


def summarise(groups: Sequence[Group]) -> Evaluation:
    """The shares over groups of equal size."""
    judged = [one for group in groups for one in group]
    by_judge = [[_sound_by_judge(one) for one in group] for group in groups]
    by_oracle = [[_sound_by_oracle(one) for one in group] for group in groups]
    right = [one for one in judged if one.outcome.right]
    with_judge = not any(isinstance(one.verdict, NotJudged) and one.verdict.reason == "off" for one in judged)
    with_oracle = any(one.oracle is not None for one in judged)
    return Evaluation(
        prompts=len(groups),
        samples=len(groups[0]),
        right_share=len(right) / len(judged),
        pass_at=_pass_at([[one.outcome.right for one in group] for group in groups]),
        sound_share_judge=_mean(by_judge) if with_judge else None,
        verified_pass_at_judge=_pass_at(by_judge) if with_judge else None,
        unjudged_share=_unjudged(right) if with_judge else None,
        sound_share_oracle=_mean(by_oracle) if with_oracle else None,
        verified_pass_at_oracle=_pass_at(by_oracle) if with_oracle else None,
    )


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """Unbiased estimate of the chance that k samples hold a success: 1 - C(n - c, k) / C(n, k)."""
    return 1.0 - math.comb(samples - successes, k) / math.comb(samples, k)


def _pass_at(successes: Sequence[Sequence[bool]]) -> dict[int, float]:
    samples = len(successes[0])
    powers = [2**power for power in range(samples.bit_length()) if 2**power < samples]
    return {
        k: sum(pass_at_k(samples, sum(group), k) for group in successes) / len(successes) for k in [*powers, samples]
    }


def _unjudged(right: Sequence[Judged]) -> float:
    return sum(not isinstance(one.verdict, Verdict) for one in right) / len(right) if right else 0.0


def _mean(successes: Sequence[Sequence[bool]]) -> float:
    return sum(sum(group) for group in successes) / sum(len(group) for group in successes)


def _sound_by_judge(one: Judged) -> bool:
    return one.outcome.right and isinstance(one.verdict, Verdict) and not one.verdict.flawed


def _sound_by_oracle(one: Judged) -> bool:
    return one.outcome.right and one.oracle == -1
