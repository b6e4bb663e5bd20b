"""From rewards to an advantage for each response token, and when a verdict can change one.

An estimator gives each rollout a `Line`, which turns a reward into an advantage; the verdict acts through the reward
(FAPO Eq. 8), through a process advantage among right rollouts, or on the tokens after the first wrong step. Formulas
and sources side by side: docs/algorithm.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_fapo.algorithm.rewards import PERFECT, Rates, flaw_penalty, flaw_shares, outcome_rewards
from megatron_fapo.algorithm.settings import AdvantageSettings, AlgorithmSettings
from megatron_fapo.records import Floats, Group, floats

LOSSLESS = 5e-6
"""Relative change of an advantage below which leaving a verdict out counts as lossless (with float32, 1e-5 in all)."""

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Line:
    """A(r) = (r - centre) · scale for each rollout of a group."""

    centre: Doubles
    """[n]"""
    scale: float

    def of(self, rewards: npt.ArrayLike) -> Doubles:
        """[n] advantages of rewards [n]."""
        result: Doubles = (np.asarray(rewards, np.float64) - self.centre) * self.scale
        return result


def step_advantages(
    groups: Sequence[Group],
    rewards: Sequence[Floats],
    algorithm: AlgorithmSettings,
    *,
    max_tokens: int,
    rates: Rates = PERFECT,
) -> list[list[Floats | None]]:
    """The advantages of a step: for each rollout one array [T] over its response, or None to leave it out of the loss.

    `rewards` are those of `rewards.rewards`, [n] a group. `max_tokens` and `rates` as there.
    """
    settings = algorithm.advantage
    outcome = [outcome_rewards(group, algorithm.reward, max_tokens=max_tokens) for group in groups]
    paid = outcome if settings.flaw == "right_only" else rewards
    lengths = [np.array([len(judged.rollout.token_ids) for judged in group]) for group in groups]
    result = []
    for group, line, values, plain in zip(groups, lines(paid, lengths, settings), paid, outcome, strict=True):
        shrink = rates.j if settings.all_right == "shrunk" and all(judged.outcome.right for judged in group) else 1.0
        advantages = line.of(values)
        if settings.flaw == "right_only":
            right = np.array([judged.outcome.right for judged in group])
            process = process_advantage(flaw_shares(group, algorithm, rates), right, settings.epsilon)
            advantages = advantages + flaw_penalty(group.step, algorithm.reward) * process
        if_clean = line.of(plain)
        result.append(
            [
                None
                if algorithm.loss.mask_truncated and judged.rollout.finish_reason == "length"
                else over_tokens(
                    len(judged.rollout.token_ids),
                    shrink * advantages[place],
                    shrink * _bounded(if_clean[place], advantages[place], len(group), line),
                    judged.wrong_from if settings.flaw == "first_wrong_step" else None,
                    settings.concentration,
                )
                for place, judged in enumerate(group)
            ]
        )
    return result


def lines(
    rewards: Sequence[Floats], lengths: Sequence[npt.NDArray[np.int64]], settings: AdvantageSettings
) -> list[Line]:
    """The estimator's line for each group of the step; `rewards` and `lengths` (tokens) are [n] a group."""
    match settings.estimator:
        case "grpo":
            return [grpo(values, settings.epsilon) for values in rewards]
        case "dr_grpo":
            return [dr_grpo(values) for values in rewards]
        case "rloo":
            return [rloo(values) for values in rewards]
        case "reinforce_pp":
            return reinforce_pp(rewards, lengths, settings.epsilon, baseline=False)
        case "reinforce_pp_baseline":
            return reinforce_pp(rewards, lengths, settings.epsilon, baseline=True)


def grpo(rewards: Floats, epsilon: float) -> Line:
    """Â = (r - mean) / (std + ε), unbiased std of the group (DeepSeekMath, arXiv:2402.03300, §4.1.2; FAPO §3.1)."""
    std = float(rewards.std(ddof=1, dtype=np.float64))
    return Line(_mean(rewards), 0.0 if rewards.min() == rewards.max() else 1.0 / (std + epsilon))


def dr_grpo(rewards: Floats) -> Line:
    """Â = r - mean (Dr.GRPO, arXiv:2503.20783)."""
    return Line(_mean(rewards), 1.0)


def rloo(rewards: Floats) -> Line:
    """Â = r - mean of the group's others = n/(n - 1) · (r - mean) (RLOO, arXiv:2402.14740)."""
    values = rewards.astype(np.float64)
    return Line((values.sum() - values) / (len(values) - 1), 1.0)


def reinforce_pp(
    rewards: Sequence[Floats], lengths: Sequence[npt.NDArray[np.int64]], epsilon: float, *, baseline: bool
) -> list[Line]:
    """Â = (x - mean) / (std + ε) over all tokens of the batch (REINFORCE++, arXiv:2501.03262).

    x is the reward, or with `baseline` the reward less its group's mean. Mean and std weight a rollout by its tokens,
    as the method normalises token advantages.
    """
    means = [_mean(values) if baseline else np.zeros(len(values)) for values in rewards]
    whole = np.concatenate([values - mean for values, mean in zip(rewards, means, strict=True)])
    weights = np.concatenate(list(lengths)).astype(np.float64)
    centre = float(np.average(whole, weights=weights))
    spread = math.sqrt(float(np.average((whole - centre) ** 2, weights=weights)))
    scale = 0.0 if whole.min() == whole.max() else 1.0 / (spread + epsilon)
    return [Line(mean + centre, scale) for mean in means]


def process_advantage(shares: Floats, right: npt.NDArray[np.bool_], epsilon: float) -> Doubles:
    """[n] -(share - mean) / (std + ε) among the right rollouts, 0 for wrong ones (PAPO, arXiv:2603.26535).

    It acts in {clean, flawed} and in three-class groups alike, needs no λ, and never compares a flawed positive with
    a wrong answer. 0 where fewer than two are right, or all of them are as flawed.
    """
    result = np.zeros(len(shares))
    if right.sum() > 1:
        result[right] = grpo(floats(-shares[right]), epsilon).of(-shares[right])
    return result


def over_tokens(length: int, advantage: float, if_clean: float, wrong_from: int | None, concentration: float) -> Floats:
    """[T] a rollout's advantage on each of its tokens.

    Without `wrong_from` the same on all. Else tokens from `wrong_from` on bear the penalty: they get `if_clean` less
    `penalty · min(T / (T - wrong_from), concentration)`, where penalty = if_clean - advantage, and the tokens before
    get what keeps the mean over the response at `advantage`. So the sum does not depend on where the step is or how
    many stand before it: a policy gains nothing by padding with sound steps (step inflation).
    """
    if wrong_from is None or wrong_from == 0 or length == 0:
        return floats(np.full(length, advantage))
    after = length - wrong_from
    late = if_clean - (if_clean - advantage) * min(length / after, concentration)
    early = (length * advantage - after * late) / wrong_from
    return floats(np.where(np.arange(length) < wrong_from, early, late))


def _bounded(if_clean: float, advantage: float, size: int, line: Line) -> float:
    """`if_clean`, at most √n above the advantage where a std is divided out: no two rollouts of a group differ more,
    and the reward it would have had may lie far outside of the group's."""
    return if_clean if line.scale == 1.0 else min(if_clean, advantage + math.sqrt(size))


def _mean(rewards: Floats) -> Doubles:
    return np.full(len(rewards), rewards.mean(dtype=np.float64))


def needs_verdict(
    *,
    distinct_right: int,
    group_size: int,
    penalty: float,
    algorithm: AlgorithmSettings,
    uneven: bool,
    rates: Rates = PERFECT,
) -> bool:
    """Whether the judge's answer can change an advantage of this group.

    `distinct_right` counts different right solutions: identical ones share their verdict; `penalty` is λ at this step.
    With at most one, the group has at most two classes of reward whichever way the verdict falls, and dividing by the
    std maps any two classes to the same advantages. This holds for a verdict that acts through the reward while

    - the estimator is `grpo`, and nothing else makes rewards within a class differ (`uneven`: overlong shaping, or a
      task that grades its answers);
    - λ < 2 (over the judge's J where it is corrected), so that a flawed right answer still beats a wrong one;
    - ε is negligible beside the smallest std, (2 - λ)/√n: else the advantages shrink by up to ε√n/(2 - λ).

    Among right rollouts only, identical ones have process advantage 0, whatever the rest. A penalty on tokens always
    needs its index.
    """
    if penalty == 0.0 or distinct_right == 0:
        return False
    advantage = algorithm.advantage
    if distinct_right > 1:
        return True
    if advantage.flaw == "right_only":
        return False
    most, least = (rates.corrected(1.0), rates.corrected(0.0)) if algorithm.reward.correct_rates else (1.0, 0.0)
    if advantage.flaw == "first_wrong_step" or advantage.estimator != "grpo" or uneven or penalty * most >= 2.0:
        return True
    narrow, plain, wide = 2.0 - penalty * most, 2.0, 2.0 - penalty * least
    shrink = advantage.epsilon * math.sqrt(group_size) * max(1 / narrow - 1 / plain, 1 / plain - 1 / wide)
    return shrink > LOSSLESS
