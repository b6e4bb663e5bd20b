"""FAPO's theory (arXiv:2510.22543, Appendix A) as functions of a group's composition.

α, γ and β are the shares of clean right, flawed right and wrong rollouts, α + γ + β = 1; ρ = α/β is the learning
progress. All are about one group, never about the whole batch.
"""

import math


def mean_reward(beta: float, gamma: float, flaw_penalty: float) -> float:
    """μ_FAPO = 1 - 2β - λγ."""
    return 1.0 - 2.0 * beta - flaw_penalty * gamma


def reward_variance(beta: float, gamma: float, flaw_penalty: float) -> float:
    """σ²_FAPO = σ²_GRPO + λγ(1 - γ)(λ - 4/(ρ + 1)) with σ²_GRPO = 4β(1 - β), as population variance.

    4/(ρ + 1) = 4β/(α + β) = 4β/(1 - γ), which also covers β = 0.
    """
    grpo = 4.0 * beta * (1.0 - beta)
    return grpo + flaw_penalty * gamma * (flaw_penalty * (1.0 - gamma) - 4.0 * beta)


def advantages(beta: float, gamma: float, flaw_penalty: float) -> tuple[float, float, float]:
    """(clean, flawed, wrong) advantages of an infinite group of this composition; NaN when all rewards are equal."""
    mean = mean_reward(beta, gamma, flaw_penalty)
    std = math.sqrt(max(reward_variance(beta, gamma, flaw_penalty), 0.0))
    if std == 0.0:
        return math.nan, math.nan, math.nan
    return (1.0 - mean) / std, (1.0 - flaw_penalty - mean) / std, (-1.0 - mean) / std


def shift(flaw_penalty: float) -> float:
    """ρ above which a flawed positive's advantage is negative: 2/λ - 1; infinite for λ = 0."""
    return math.inf if flaw_penalty == 0.0 else 2.0 / flaw_penalty - 1.0


def flaw_penalty_for(rho_shift: float) -> float:
    """λ = 2/(ρ_shift + 1): the penalty with which the shift happens at ρ_shift (Appendix A, majority-guided: 1)."""
    return 2.0 / (rho_shift + 1.0)
