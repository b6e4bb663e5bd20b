"""The PPO loss against hand-computed values, and what its gradient must be."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.algorithm.losses import k3, ppo_loss, supervised_loss
from megatron_fapo.algorithm.settings import LossSettings

SETTINGS = LossSettings(clip_low=0.2, clip_high=0.28, dual_clip=10.0)


def one(ratio: float, advantage: float) -> tuple[float, float, float]:
    """Loss, gradient with respect to the log-prob, and the clipped flag of one token."""
    logprob = torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    behaviour = torch.tensor([-1.0], dtype=torch.float64)
    losses = ppo_loss(logprob, behaviour, torch.tensor([advantage], dtype=torch.float64), SETTINGS)
    losses.loss.sum().backward()
    assert logprob.grad is not None
    return losses.loss.item(), logprob.grad.item(), losses.clipped.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),  # on policy: policy gradient -A
        (1.1, 2.0, -2.2, -2.2, 0),  # inside: -A r
        (1.5, 2.0, -2.56, 0.0, 1),  # A > 0, above 1.28
        (0.5, 2.0, -1.0, -1.0, 0),  # A > 0, below 0.8: the pessimistic bound keeps the gradient
        (0.5, -2.0, 1.6, 0.0, 1),  # A < 0, below 0.8
        (1.5, -2.0, 3.0, 3.0, 0),  # A < 0, above: gradient kept ...
        (12.0, -2.0, 20.0, 0.0, 1),  # ... until the dual clip at 10 |A|
        (12.0, 0.0, 0.0, 0.0, 0),  # no advantage, no gradient
    ],
)
def test_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: int) -> None:
    assert one(ratio, advantage) == pytest.approx((loss, gradient, clipped), abs=1e-12)


@given(st.floats(0.05, 20.0), st.floats(-3.0, 3.0))
def test_gradient_is_minus_advantage_times_ratio_or_nothing(ratio: float, advantage: float) -> None:
    loss, gradient, clipped = one(ratio, advantage)
    expected = 0.0 if clipped else -advantage * ratio
    assert gradient == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert loss >= -advantage * ratio - 1e-9 or clipped  # never more optimistic than the plain objective
    assert loss <= 10.0 * abs(advantage) + 1e-9


def test_a_stray_token_does_not_overflow() -> None:
    logprob = torch.tensor([0.0], requires_grad=True)
    losses = ppo_loss(logprob, torch.tensor([-1e4]), torch.tensor([-1.0]), SETTINGS)
    losses.loss.sum().backward()
    assert losses.loss.item() == pytest.approx(10.0)
    assert torch.isfinite(losses.kl).all()
    assert logprob.grad is not None
    assert logprob.grad.item() == 0.0


def test_k3_is_an_unbiased_estimate_that_is_never_negative() -> None:
    behaviour = torch.log_softmax(torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64), 0)
    current = torch.log_softmax(torch.tensor([0.0, -0.5, 1.0, 1.0], dtype=torch.float64), 0)
    estimate = k3(behaviour, current)
    exact = (behaviour.exp() * (behaviour - current)).sum()
    assert (estimate >= 0).all()
    assert (behaviour.exp() * estimate).sum().item() == pytest.approx(exact.item(), rel=1e-12)
    assert not k3(behaviour, behaviour).any()


def test_supervised_loss_is_the_negative_log_likelihood() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(5)
    logprobs = torch.log_softmax(logits, -1)[torch.arange(5), targets]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.equal(supervised_loss(logprobs).loss, -logprobs)
    assert torch.allclose(supervised_loss(logprobs).loss, expected)
