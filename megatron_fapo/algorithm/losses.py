"""Losses per token, in torch: the only file of this room that loads it.

All functions take vectors over the loss tokens of a microbatch. `policy_loss` composes them by the names in
`LossSettings`; its result is summed over the mini-batch and divided by `denominator`, which the caller does, who
alone knows the layout.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from megatron_fapo.algorithm.settings import (
    CispoSettings,
    GspoSettings,
    ImportanceSettings,
    KlSettings,
    LossSettings,
    PpoSettings,
)

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before the exponential, so that one stray token cannot overflow."""


def _whole(values: torch.Tensor) -> torch.Tensor:
    return values


@dataclass(frozen=True, slots=True)
class Sequences:
    """Which sequence each loss token belongs to."""

    of: torch.Tensor
    """[N] index of the token's sequence, in [0, n)."""
    lengths: torch.Tensor
    """[n] loss tokens of each whole sequence."""
    over_parts: Callable[[torch.Tensor], torch.Tensor] = field(default=_whole)
    """Sums [n] over the ranks that hold parts of the same sequences (context parallel)."""

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """[n] sum of [N] values without gradient over each sequence."""
        return self.over_parts(values.new_zeros(len(self.lengths)).index_add(0, self.of, values))

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """[n] mean of [N] values without gradient over each sequence; 0 for one without loss tokens."""
        return self.sums(values) / self.lengths.clamp(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The loss tokens of a microbatch; every field [N], and only `logprobs` and `entropy` carry a gradient."""

    logprobs: torch.Tensor
    """Under the current policy."""
    behaviour: torch.Tensor
    """Under the policy at the start of the step."""
    advantages: torch.Tensor
    sequences: Sequences
    reference: torch.Tensor | None = None
    """Under the reference policy; needed for a KL penalty."""
    entropy: torch.Tensor | None = None
    """Of the current policy's distribution; needed for an entropy bonus."""
    mismatch: torch.Tensor | None = None
    """log π_Megatron - log π_engine at the weights that drew the token; needed for importance sampling."""


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """A loss and what is reported beside it; every field [N], and only `loss` carries a gradient."""

    loss: torch.Tensor
    clipped: torch.Tensor
    """1.0 where the objective's clip acts."""
    kl: torch.Tensor
    """k3 estimate of KL(behaviour ‖ current)."""
    reference_kl: torch.Tensor
    """Estimate of KL(current ‖ reference); zeros without a KL penalty."""
    truncated: torch.Tensor
    """1.0 where the importance weight is cut at its cap; zeros without importance sampling."""


def policy_loss(tokens: Tokens, settings: LossSettings) -> TokenLosses:
    """[N] w · (m · objective + β · KL - c · entropy), with w of the aggregation and m the importance weight.

    Summed over all tokens and divided by `denominator` this is the loss of a mini-batch.
    """
    advantages, behaviour = tokens.advantages.detach(), tokens.behaviour.detach()
    match settings.objective:
        case PpoSettings() as chosen:
            loss, clipped = ppo(tokens.logprobs, behaviour, advantages, chosen)
        case GspoSettings() as chosen:
            loss, clipped = gspo(tokens.logprobs, behaviour, advantages, tokens.sequences, chosen)
        case CispoSettings() as chosen:
            loss, clipped = cispo(tokens.logprobs, behaviour, advantages, chosen)
    zeros = torch.zeros_like(behaviour)
    truncated = reference_kl = zeros
    if settings.importance is not None:
        weights, truncated = importance_weights(_given(tokens.mismatch), tokens.sequences, settings.importance)
        loss = loss * weights
    if settings.kl is not None:
        penalty = kl_penalty(tokens.logprobs, _given(tokens.reference).detach(), settings.kl)
        reference_kl = penalty.detach()
        loss = loss + settings.kl.coefficient * penalty
    if settings.entropy_bonus:
        loss = loss - settings.entropy_bonus * _given(tokens.entropy)
    if settings.aggregation == "sequence_mean":
        loss = loss / tokens.sequences.lengths.clamp(min=1)[tokens.sequences.of]
    return TokenLosses(
        loss=loss,
        clipped=clipped,
        kl=k3(behaviour, tokens.logprobs.detach()),
        reference_kl=reference_kl,
        truncated=truncated,
    )


def denominator(settings: LossSettings, *, num_loss_tokens: int, num_sequences: int) -> int:
    """What the sum of `policy_loss` over a whole mini-batch is divided by; `num_sequences` have loss tokens."""
    match settings.aggregation:
        case "token_mean":
            return num_loss_tokens
        case "sequence_mean":
            return num_sequences
        case "constant":
            assert settings.constant_length is not None  # the settings say so
            return num_sequences * settings.constant_length


def ppo(
    logprobs: torch.Tensor, behaviour: torch.Tensor, advantages: torch.Tensor, settings: PpoSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, clipped) of the clipped objective with dual clip, each [N].

    With r = exp(logprobs - behaviour) and A the advantage, the loss of a token is

        L1 = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))       Schulman et al. 2017, Eq. 7; DAPO, Eq. 8
        L  = min(L1, -A dual_clip) if A < 0 else L1                   Ye et al. 2020, Eq. 4

    A token with A = 0 has loss and gradient exactly 0.
    """
    return _clipped(_ratio(logprobs - behaviour), advantages, settings.clip_low, settings.clip_high, settings.dual_clip)


def gspo(
    logprobs: torch.Tensor,
    behaviour: torch.Tensor,
    advantages: torch.Tensor,
    sequences: Sequences,
    settings: GspoSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, clipped) of GSPO (arXiv:2507.18071), each [N].

    s = exp(mean over the sequence of logprobs - behaviour) is clipped as PPO clips r (Eq. 5-7). In the form of Eq. 14,
    s · π/sg(π), which has the same value and, with one advantage a sequence, the same gradient, so that advantages
    may also differ within a sequence.
    """
    mean = sequences.means((logprobs - behaviour).detach())[sequences.of]
    return _clipped(_ratio(mean + logprobs - logprobs.detach()), advantages, settings.clip_low, settings.clip_high)


def cispo(
    logprobs: torch.Tensor, behaviour: torch.Tensor, advantages: torch.Tensor, settings: CispoSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, clipped) of CISPO (MiniMax-M1, arXiv:2506.13585, Eq. 4-5), each [N].

    loss = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log π: the weight is clipped, the gradient never cut off.
    """
    ratio = _ratio((logprobs - behaviour).detach())
    weight = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return -weight * advantages * logprobs, (weight != ratio).to(ratio.dtype)


def importance_weights(
    mismatch: torch.Tensor, sequences: Sequences, settings: ImportanceSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """([N] min(π_Megatron/π_engine, cap), [N] 1.0 where the cap acts), without gradient.

    At level `sequence` the ratio is the product over the sequence, the same for all its tokens (truncated importance
    sampling, Ionides 2008; for engines that differ from the trainer: Yao et al. 2025).
    """
    logs = mismatch.detach()
    if settings.level == "sequence":
        logs = sequences.sums(logs)[sequences.of]
    ratio = _ratio(logs)
    return ratio.clamp(max=settings.cap), (ratio > settings.cap).to(ratio.dtype)


def kl_penalty(logprobs: torch.Tensor, reference: torch.Tensor, settings: KlSettings) -> torch.Tensor:
    """[N] Schulman's estimate of KL(π ‖ π_ref) at tokens drawn from π, as the term of a loss.

    With d = logprobs - reference: k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d (GRPO, arXiv:2402.03300, Eq. 4). The mean
    of ∇d is zero, so k1 takes its gradient by the score function, d ∇log π, which is the gradient of the KL itself;
    k2 has the same gradient, k3's is that of KL(π_ref ‖ π) (Tang & Munos 2025, arXiv:2506.09477).
    """
    difference = (logprobs - reference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    match settings.estimator:
        case "k1":
            return difference.detach() * (1 + logprobs - logprobs.detach())
        case "k2":
            return 0.5 * difference**2
        case "k3":
            return torch.expm1(-difference) + difference


def k3(behaviour: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """[N] Schulman's k3 estimate of KL(behaviour ‖ current) at tokens drawn from `behaviour`: exp(d) - 1 - d, d =
    current - behaviour. Never negative, 0 where the log-probs agree, unbiased."""
    difference = (current - behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(difference) - difference


def supervised_loss(logprobs: torch.Tensor) -> TokenLosses:
    """Negative log-likelihood of each token; `logprobs` is [N] with gradient."""
    zeros = torch.zeros_like(logprobs, requires_grad=False)
    return TokenLosses(loss=-logprobs, clipped=zeros, kl=zeros, reference_kl=zeros, truncated=zeros)


def _ratio(logs: torch.Tensor) -> torch.Tensor:
    return logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _clipped(
    ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float, dual: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pessimistic one of plain and clipped loss, and 1.0 where the gradient is cut off."""
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(plain, clipped)
    capped = loss if dual is None else torch.where(advantages < 0, torch.minimum(loss, -advantages * dual), loss)
    with torch.no_grad():
        cut = (clipped > plain) | (capped < loss)
    return capped, cut.to(capped.dtype)


def _given(values: torch.Tensor | None) -> torch.Tensor:
    if values is None:
        raise ValueError("the settings ask for a term whose input was not computed")
    return values
