"""Settings of the algorithm: reward, advantage, loss."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_fapo.settings import Settings


class OverlongSettings(Settings):
    """Soft punishment of responses near the length limit (DAPO)."""

    buffer: Annotated[int, Field(gt=0)] = 4096
    """Tokens before the limit in which the penalty grows from 0 to `factor`."""
    factor: Annotated[float, Field(ge=0)] = 1.0
    """Penalty at the limit."""


class RewardSettings(Settings):
    """FAPO's reward (Eq. 4 and 8)."""

    flaw_penalty: Annotated[float, Field(ge=0)] = 1.0
    """λ of Eq. 8, taken from a right answer that the judge flags. 1 lets the shift happen at ρ = 1; 0 is plain GRPO."""
    failed_verdict: Literal["drop_group", "as_clean", "as_flawed"] = "drop_group"
    """What a failed verdict becomes: its group leaves the batch, or the rollout counts as clean, or as flawed."""
    overlong: OverlongSettings | None = None
    """Overlong shaping, added after FAPO's reward; off when null."""


class AdvantageSettings(Settings):
    """The group advantage."""

    normalise_by_std: bool = True
    """Divide by the group's unbiased standard deviation (GRPO). Without it λ acts in two-class groups as well."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the standard deviation."""


class LossSettings(Settings):
    """PPO clip with dual clip, token mean over the global mini-batch."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """ε_low: the ratio is clipped below at 1 - clip_low."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """ε_high: the ratio is clipped above at 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] = 10.0
    """c: with a negative advantage the loss never exceeds c times -advantage."""


class AlgorithmSettings(Settings):
    """Reward, advantage and loss."""

    reward: RewardSettings = RewardSettings()
    advantage: AdvantageSettings = AdvantageSettings()
    loss: LossSettings = LossSettings()
