"""From the rewards of a group to an advantage for each response token, and when a verdict can change one."""

import math
from collections.abc import Sequence

import numpy as np

from megatron_fapo.algorithm.settings import AdvantageSettings
from megatron_fapo.records import Floats, floats

LOSSLESS = 5e-6
"""Relative change of an advantage below which leaving a verdict out counts as lossless (with float32, 1e-5 in all)."""


def group_advantage(rewards: Floats, settings: AdvantageSettings) -> Floats:
    """[n] Â = (r - mean) / (std + ε) with the unbiased std of the group (FAPO §3.1, GRPO); r - mean without std."""
    centred = rewards.astype(np.float64) - rewards.mean(dtype=np.float64)
    if settings.normalise_by_std:
        centred /= rewards.std(ddof=1, dtype=np.float64) + settings.epsilon
    return floats(centred)


def token_advantages(rewards: Floats, lengths: Sequence[int], settings: AdvantageSettings) -> tuple[Floats, ...]:
    """One array [T_i] for each rollout: its advantage on each response token."""
    return tuple(
        floats(np.full(length, advantage))
        for advantage, length in zip(group_advantage(rewards, settings), lengths, strict=True)
    )


def needs_verdict(
    *, distinct_right: int, group_size: int, flaw_penalty: float, advantage: AdvantageSettings, uneven: bool
) -> bool:
    """Whether the judge's answer can change an advantage of this group.

    `distinct_right` counts different right solutions: identical ones share their verdict. With at most one, the
    group has at most two classes of reward whichever way the verdict falls, and dividing by the std maps any two
    classes to the same advantages. This holds while

    - the std is divided out, and nothing else makes rewards within a class differ (`uneven`: overlong shaping, or a
      task that grades its answers);
    - λ < 2, so that a flawed right answer still beats a wrong one;
    - ε is negligible beside the smallest std, (2 - λ)/√n: else the advantages shrink by up to ε√n/(2 - λ).
    """
    if flaw_penalty == 0.0:
        return False
    if distinct_right > 1 or not advantage.normalise_by_std or uneven or flaw_penalty >= 2.0:
        return distinct_right > 0
    shrink = advantage.epsilon * math.sqrt(group_size) * abs(1 / (2.0 - flaw_penalty) - 0.5)
    return distinct_right > 0 and shrink > LOSSLESS
