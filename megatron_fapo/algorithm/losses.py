"""Losses per token, in torch: the only file of this room that loads it.

All functions take vectors over the loss tokens of a microbatch. Summing them and dividing by the tokens of the
global mini-batch is the caller's part, which alone knows the layout.
"""

from dataclasses import dataclass

import torch

from megatron_fapo.algorithm.settings import LossSettings

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before the exponential, so that one stray token cannot overflow."""


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """A loss and what is reported beside it; every field [N], and only `loss` carries a gradient."""

    loss: torch.Tensor
    clipped: torch.Tensor
    """1.0 where the gradient is cut off by a clip."""
    kl: torch.Tensor
    """k3 estimate of KL(behaviour ‖ current)."""


def ppo_loss(
    logprobs: torch.Tensor, behaviour: torch.Tensor, advantages: torch.Tensor, settings: LossSettings
) -> TokenLosses:
    """The clipped objective of PPO with dual clip (facts of FAPO's method: asymmetric clip, no KL term).

    With r = exp(logprobs - behaviour) and A the advantage, the loss of a token is

        L1 = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))       Schulman et al. 2017, Eq. 7; DAPO, Eq. 8
        L  = min(L1, -A dual_clip) if A < 0 else L1                   Ye et al. 2020, Eq. 4

    Arguments are [N]: log-probs of the current policy (with gradient), of the behaviour policy, and advantages.
    A token with A = 0 has loss and gradient exactly 0.
    """
    behaviour, advantages = behaviour.detach(), advantages.detach()
    ratio = (logprobs - behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    loss = torch.maximum(plain, clipped)
    capped = torch.where(advantages < 0, torch.minimum(loss, -advantages * settings.dual_clip), loss)
    with torch.no_grad():
        cut = (clipped > plain) | (capped < loss)
    return TokenLosses(loss=capped, clipped=cut.to(capped.dtype), kl=k3(behaviour, logprobs.detach()))


def k3(behaviour: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """[N] Schulman's k3 estimate of KL(behaviour ‖ current) at tokens drawn from `behaviour`: exp(d) - 1 - d, d =
    current - behaviour. Never negative, 0 where the log-probs agree, unbiased."""
    difference = (current - behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(difference) - difference


def supervised_loss(logprobs: torch.Tensor) -> TokenLosses:
    """Negative log-likelihood of each token; `logprobs` is [N] with gradient."""
    zeros = torch.zeros_like(logprobs, requires_grad=False)
    return TokenLosses(loss=-logprobs, clipped=zeros, kl=zeros)
