"""Rewards of a group: the task's outcome, FAPO's penalty for flawed positives, overlong shaping.

Equations are of FAPO (arXiv:2510.22543); overlong shaping is DAPO's (arXiv:2503.14476).
"""

import numpy as np

from megatron_fapo.algorithm.settings import OverlongSettings, RewardSettings
from megatron_fapo.records import Floats, Group, NotJudged, floats


def rewards(group: Group, settings: RewardSettings, *, max_tokens: int) -> Floats:
    """[n] R = R_RLVR + R_Δ (Eq. 8) + overlong shaping, one reward for each rollout of the group.

    `max_tokens` is the response limit that overlong shaping counts from. A failed verdict counts as
    `settings.failed_verdict` says; a group that must be dropped is not for this function (see `usable`).
    """
    penalised = [
        judged.flagged
        or (
            settings.failed_verdict == "as_flawed"
            and isinstance(judged.verdict, NotJudged)
            and judged.verdict.reason == "failed"
        )
        for judged in group
    ]
    return floats(
        [
            judged.outcome.score
            - settings.flaw_penalty * flawed
            + overlong_penalty(len(judged.rollout.token_ids), max_tokens, settings.overlong)
            for judged, flawed in zip(group, penalised, strict=True)
        ]
    )


def usable(group: Group, settings: RewardSettings) -> bool:
    """Whether the group may be trained on: false when a verdict failed and `failed_verdict` is `drop_group`."""
    return settings.failed_verdict != "drop_group" or not any(
        isinstance(judged.verdict, NotJudged) and judged.verdict.reason == "failed" for judged in group
    )


def overlong_penalty(length: int, max_tokens: int, settings: OverlongSettings | None) -> float:
    """DAPO's soft punishment: 0 up to `max_tokens - buffer`, then falling linearly to `-factor` at `max_tokens`."""
    if settings is None:
        return 0.0
    excess = length - (max_tokens - settings.buffer)
    return float(np.minimum(-excess / settings.buffer * settings.factor, 0.0))


def shaped(lengths: list[int], max_tokens: int, settings: OverlongSettings | None) -> bool:
    """Whether overlong shaping touches any response of these lengths."""
    return any(overlong_penalty(length, max_tokens, settings) != 0.0 for length in lengths)
