"""Settings of the algorithm: reward, advantage, loss. A mix that contradicts itself is refused with the reason.

Which variant is which formula, from which paper, and when to use it: docs/algorithm.md.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from megatron_fapo.settings import Settings

Estimator = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
FlawActs = Literal["reward", "right_only", "first_wrong_step"]


class OverlongSettings(Settings):
    """Soft punishment of responses near the length limit (DAPO)."""

    buffer: Annotated[int, Field(gt=0)] = 4096
    """Tokens before the limit in which the penalty grows from 0 to `factor`."""
    factor: Annotated[float, Field(ge=0)] = 1.0
    """Penalty at the limit."""


class PenaltySchedule(Settings):
    """λ as a function of the step: from `initial` at step `begin` to the full `flaw_penalty` at step `end`."""

    shape: Literal["linear", "cosine"] = "linear"
    """How it moves between the two steps."""
    initial: Annotated[float, Field(ge=0)] = 0.0
    """λ up to step `begin`."""
    begin: Annotated[int, Field(ge=0)] = 0
    """The last step at `initial`."""
    end: Annotated[int, Field(gt=0)]
    """The first step at the full penalty."""

    @model_validator(mode="after")
    def _forwards(self) -> Self:
        if self.end <= self.begin:
            raise ValueError(f"end = {self.end} must come after begin = {self.begin}")
        return self


class RewardSettings(Settings):
    """FAPO's reward (Eq. 4 and 8)."""

    flaw_penalty: Annotated[float, Field(ge=0)] = 1.0
    """λ of Eq. 8, taken from a right answer that the judge flags. 1 lets the shift happen at ρ = 1; 0 is plain GRPO."""
    schedule: PenaltySchedule | None = None
    """λ over the steps; null keeps `flaw_penalty` throughout."""
    penalty: Literal["hard", "soft"] = "hard"
    """`hard` takes λ where the verdict is "flawed"; `soft` takes λ·p, p the judge's probability of a flaw."""
    correct_rates: bool = False
    """Correct the penalty by the judge's measured rates: p becomes (p - FPR)/(TPR - FPR), which is right on average
    whatever the judge's errors. Needs `judge.audit` or the rates in `judge.rates`."""
    failed_verdict: Literal["drop_group", "as_clean", "as_flawed"] = "drop_group"
    """What a failed verdict becomes: its group leaves the batch, or the rollout counts as clean, or as flawed."""
    overlong: OverlongSettings | None = None
    """Overlong shaping, added after FAPO's reward; off when null."""


class AdvantageSettings(Settings):
    """From rewards to advantages."""

    estimator: Estimator = "grpo"
    """The baseline and the scale: `grpo` (group mean, group std), `dr_grpo` (group mean), `rloo` (mean of the others),
    `reinforce_pp` (mean and std of the whole batch), `reinforce_pp_baseline` (group mean, then std of the batch)."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """Added to a standard deviation that is divided by."""
    flaw: FlawActs = "reward"
    """Where the judge's verdict acts. `reward`: Eq. 8. `right_only`: a process advantage, normalised among the right
    rollouts and weighted by λ, added to the outcome's. `first_wrong_step`: the penalty falls on the tokens from the
    first wrong paragraph on."""
    concentration: Annotated[float, Field(ge=1)] = 4.0
    """For `first_wrong_step`: most times that the penalty of a token exceeds that of Eq. 8. The sum over a response
    is always Eq. 8's, so that putting more steps before the wrong one gains nothing."""
    all_right: Literal["full", "agreed", "shrunk"] = "full"
    """Guard of groups without a wrong rollout, in which one false flag has full size. `full`: none. `agreed`: only a
    flag of all votes counts there. `shrunk`: their advantages are multiplied by the judge's measured J = TPR - FPR."""


class PpoSettings(Settings):
    """PPO clip with clip-higher and dual clip, a ratio for each token."""

    name: Literal["ppo"] = "ppo"
    """Selects this objective."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """ε_low: the ratio is clipped below at 1 - clip_low."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """ε_high: the ratio is clipped above at 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 10.0
    """c: with a negative advantage the loss never exceeds c times -advantage; null turns it off."""


class GspoSettings(Settings):
    """GSPO: one ratio a sequence, the geometric mean of its tokens' ratios."""

    name: Literal["gspo"] = "gspo"
    """Selects this objective."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 3e-4
    """ε_low of the sequence's ratio."""
    clip_high: Annotated[float, Field(gt=0)] = 4e-4
    """ε_high of the sequence's ratio."""


class CispoSettings(Settings):
    """CISPO: REINFORCE with a clipped importance weight; no token loses its gradient."""

    name: Literal["cispo"] = "cispo"
    """Selects this objective."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 1.0
    """ε_low of the weight; 1 is no lower bound, as published."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """ε_high of the weight."""


def _objective_name(value: Any) -> str:
    """An objective given without a name is PPO."""
    return str(value.get("name", "ppo") if isinstance(value, dict) else value.name)


ObjectiveSettings = Annotated[
    Annotated[PpoSettings, Tag("ppo")] | Annotated[GspoSettings, Tag("gspo")] | Annotated[CispoSettings, Tag("cispo")],
    Discriminator(_objective_name),
]
"""One of the objectives, chosen by its `name`."""


class KlSettings(Settings):
    """A KL penalty to the reference policy, the weights that `policy.model` holds."""

    coefficient: Annotated[float, Field(gt=0)]
    """β, times the estimate, added to each token's loss."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = log π - log π_ref: k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d. `k1` carries the gradient d ∇log π, which
    is that of KL(π ‖ π_ref) and k2's too; taking d itself would have mean gradient zero."""


class ImportanceSettings(Settings):
    """Truncated importance sampling: corrects for engine and Megatron giving a token different probabilities."""

    level: Literal["token", "sequence"] = "token"
    """A weight for each token, or the product of a sequence's for all its tokens."""
    cap: Annotated[float, Field(gt=0)] = 2.0
    """The weight is min(π_Megatron / π_engine, cap), both at the weights that drew the token."""


class LossSettings(Settings):
    """The objective, how tokens are averaged, and what is added."""

    objective: ObjectiveSettings = PpoSettings()
    """What is minimised on each token."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """`token_mean`: over all tokens of the mini-batch (DAPO). `sequence_mean`: of each sequence, then over sequences
    (GRPO, GSPO). `constant`: the sum of a sequence by `constant_length`, then over sequences (Dr.GRPO)."""
    constant_length: Annotated[int, Field(gt=0)] | None = None
    """For aggregation `constant`: what each sequence's sum is divided by, as a rule `rollout.max_new_tokens`."""
    mask_truncated: bool = False
    """Leave rollouts that reached the token limit out of the loss (DAPO's overlong filtering); they stay in their
    group's statistics."""
    kl: KlSettings | None = None
    """KL penalty to the reference policy; off when null."""
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.0
    """Times the entropy of a token's distribution, taken from its loss."""
    importance: ImportanceSettings | None = None
    """Truncated importance sampling; needs `policy.rescore`. Off when null."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.objective.name == "gspo" and self.aggregation != "sequence_mean":
            raise ValueError(
                f"objective gspo with aggregation {self.aggregation}: GSPO's ratio and clip belong to a sequence, and "
                "its objective is the mean over sequences; set aggregation: sequence_mean"
            )
        if (self.aggregation == "constant") != (self.constant_length is not None):
            raise ValueError(
                f"aggregation {self.aggregation} with constant_length {self.constant_length}: the length belongs to "
                "aggregation constant, which needs it (as a rule rollout.max_new_tokens)"
            )
        return self

    @property
    def gradient_without_advantage(self) -> bool:
        """Whether a token of advantage 0 still has a gradient: then no sequence may be left out of the passes."""
        return self.kl is not None or self.entropy_bonus > 0.0


class AlgorithmSettings(Settings):
    """Reward, advantage and loss."""

    reward: RewardSettings = RewardSettings()
    advantage: AdvantageSettings = AdvantageSettings()
    loss: LossSettings = LossSettings()

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        reward, advantage = self.reward, self.advantage
        if advantage.flaw == "first_wrong_step" and reward.penalty == "soft":
            raise ValueError(
                "advantage.flaw first_wrong_step with reward.penalty soft: a solution that is only probably flawed has "
                "no first wrong step; set penalty: hard, or flaw: reward"
            )
        if advantage.flaw == "first_wrong_step" and reward.correct_rates:
            raise ValueError(
                "advantage.flaw first_wrong_step with reward.correct_rates: the correction changes the reward of clean "
                "solutions, which have no first wrong step either; set correct_rates: false, or flaw: reward"
            )
        if advantage.flaw == "first_wrong_step" and reward.failed_verdict == "as_flawed":
            raise ValueError(
                "advantage.flaw first_wrong_step with reward.failed_verdict as_flawed: a failed verdict names no step; "
                "set failed_verdict: drop_group or as_clean"
            )
        if advantage.all_right == "agreed" and reward.penalty == "soft":
            raise ValueError(
                "advantage.all_right agreed with reward.penalty soft: a probability is no vote that could agree; set "
                "all_right: shrunk, or penalty: hard"
            )
        return self
