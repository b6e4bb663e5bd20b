"""Each loss against hand-computed values, what its gradient must be, and the identities between them."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.algorithm.losses import (
    Sequences,
    Tokens,
    cispo,
    denominator,
    gspo,
    importance_weights,
    k3,
    kl_penalty,
    policy_loss,
    ppo,
    supervised_loss,
)
from megatron_fapo.algorithm.settings import (
    CispoSettings,
    GspoSettings,
    ImportanceSettings,
    KlSettings,
    LossSettings,
    PpoSettings,
)

SETTINGS = PpoSettings(clip_low=0.2, clip_high=0.28, dual_clip=10.0)


def one(ratio: float, advantage: float) -> tuple[float, float, float]:
    """Loss, gradient with respect to the log-prob, and the clipped flag of one token."""
    logprob = torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    behaviour = torch.tensor([-1.0], dtype=torch.float64)
    loss, clipped = ppo(logprob, behaviour, torch.tensor([advantage], dtype=torch.float64), SETTINGS)
    loss.sum().backward()
    assert logprob.grad is not None
    return loss.item(), logprob.grad.item(), clipped.item()


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
    tokens = Tokens(
        logprobs=logprob,
        behaviour=torch.tensor([-1e4]),
        advantages=torch.tensor([-1.0]),
        sequences=Sequences(torch.tensor([0]), torch.tensor([1])),
    )
    losses = policy_loss(tokens, LossSettings())
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


LENGTHS = (3, 1, 5)


def ragged(seed: int = 0, spread: float = 0.3, **changes: torch.Tensor) -> Tokens:
    """Three sequences of three, one and five tokens, one advantage each."""
    generator = torch.Generator().manual_seed(seed)
    of = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))

    def random(scale: float) -> torch.Tensor:
        return scale * torch.randn(9, dtype=torch.float64, generator=generator)

    behaviour = -1.0 - random(1.0).abs()
    values = {
        "logprobs": (behaviour + random(spread)).requires_grad_(),
        "behaviour": behaviour,
        "advantages": torch.tensor([1.5, -0.7, -1.1], dtype=torch.float64)[of],
        "sequences": Sequences(of, torch.tensor(LENGTHS)),
        "reference": behaviour + random(0.5),
        "entropy": random(1.0).abs(),
        "mismatch": random(0.5),
        **changes,
    }
    return Tokens(**values)


def gradient(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    point = at.detach().clone().requires_grad_()
    return torch.autograd.grad(function(point).sum(), point)[0]


def differences(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Central finite differences."""
    steps = torch.eye(len(at), dtype=torch.float64) * 1e-6
    base = at.detach()
    return torch.stack([(function(base + step).sum() - function(base - step).sum()) / 2e-6 for step in steps])


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gradients_of_kl_are_those_of_finite_differences(estimator: str) -> None:
    tokens = ragged()
    settings = KlSettings(coefficient=1.0, estimator=estimator)

    def function(logprobs: torch.Tensor) -> torch.Tensor:
        return kl_penalty(logprobs, tokens.reference, settings)

    assert torch.allclose(gradient(function, tokens.logprobs), differences(function, tokens.logprobs), atol=1e-8)


def test_ppo_s_gradient_is_that_of_finite_differences() -> None:
    tokens = ragged()

    def function(logprobs: torch.Tensor) -> torch.Tensor:
        return ppo(logprobs, tokens.behaviour, tokens.advantages, SETTINGS)[0]

    assert torch.allclose(gradient(function, tokens.logprobs), differences(function, tokens.logprobs), atol=1e-8)


def exact_gspo(logprobs: torch.Tensor, tokens: Tokens, settings: GspoSettings) -> torch.Tensor:
    """Eq. 5-7 as they stand: [n] -min(s A, clip(s) A) with s differentiated through."""
    s = torch.stack([
        (logprobs[tokens.sequences.of == i] - tokens.behaviour[tokens.sequences.of == i]).mean().exp() for i in range(3)
    ])  # fmt: skip
    advantages = torch.stack([tokens.advantages[tokens.sequences.of == i][0] for i in range(3)])
    return -torch.minimum(s * advantages, s.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantages)


@pytest.mark.parametrize("spread", [1e-4, 0.3])
def test_gspo_is_eq_5_in_value_and_gradient(spread: float) -> None:
    tokens = ragged(spread=spread)
    chosen = GspoSettings()
    settings = LossSettings(objective=chosen, aggregation="sequence_mean")

    def ours(logprobs: torch.Tensor) -> torch.Tensor:
        return policy_loss(ragged(spread=spread, logprobs=logprobs), settings).loss

    def theirs(logprobs: torch.Tensor) -> torch.Tensor:
        return exact_gspo(logprobs, tokens, chosen)

    assert ours(tokens.logprobs).sum().item() == pytest.approx(theirs(tokens.logprobs).sum().item(), rel=1e-12)
    assert torch.allclose(gradient(ours, tokens.logprobs), gradient(theirs, tokens.logprobs), rtol=1e-9)
    assert torch.allclose(gradient(theirs, tokens.logprobs), differences(theirs, tokens.logprobs), atol=1e-7)


def test_gspo_on_sequences_of_one_token_is_ppo() -> None:
    tokens = ragged()
    alone = Sequences(torch.arange(9), torch.ones(9, dtype=torch.long))
    loss, clipped = gspo(
        tokens.logprobs, tokens.behaviour, tokens.advantages, alone, GspoSettings(clip_low=0.2, clip_high=0.28)
    )
    same, cut = ppo(tokens.logprobs, tokens.behaviour, tokens.advantages, SETTINGS.changed(dual_clip=None))
    assert torch.allclose(loss, same, rtol=1e-12)
    assert torch.equal(clipped, cut)


def test_sequences_cut_over_ranks_give_the_same_ratio() -> None:
    """Context parallelism: each rank holds some tokens of every sequence, and sums go over all ranks."""
    whole = ragged()
    behaviour, advantages = whole.behaviour, whole.advantages
    mine = torch.arange(9) % 2 == 0
    rest = whole.sequences.sums((whole.logprobs - behaviour).detach() * ~mine)
    part = Sequences(whole.sequences.of[mine], whole.sequences.lengths, over_parts=lambda sums: sums + rest)
    expected, _ = gspo(whole.logprobs, behaviour, advantages, whole.sequences, GspoSettings())
    found, _ = gspo(whole.logprobs[mine], behaviour[mine], advantages[mine], part, GspoSettings())
    assert torch.allclose(found, expected[mine], rtol=1e-12)


@given(st.floats(0.05, 20.0), st.floats(-3.0, 3.0))
def test_cispo_s_gradient_is_minus_the_clipped_ratio_times_advantage_and_never_cut(
    ratio: float, advantage: float
) -> None:
    behaviour = torch.tensor([-1.0], dtype=torch.float64)

    def function(logprob: torch.Tensor) -> torch.Tensor:
        return cispo(logprob, behaviour, torch.tensor([advantage], dtype=torch.float64), CispoSettings())[0]

    found = gradient(function, behaviour + math.log(ratio)).item()
    assert found == pytest.approx(-advantage * min(ratio, 1.28), rel=1e-9, abs=1e-12)


def test_on_policy_all_objectives_have_the_gradient_of_reinforce() -> None:
    tokens = ragged(spread=0.0)
    for objective in (PpoSettings(), GspoSettings(), CispoSettings()):
        settings = LossSettings(objective=objective, aggregation="sequence_mean")
        found = gradient(lambda p, s=settings: policy_loss(ragged(spread=0.0, logprobs=p), s).loss, tokens.logprobs)
        reinforce = -tokens.advantages / torch.tensor(LENGTHS)[tokens.sequences.of]
        assert torch.allclose(found, reinforce, rtol=1e-9), objective.name


def test_aggregations_by_hand() -> None:
    tokens = ragged()
    each = policy_loss(tokens, LossSettings()).loss
    rows = [each[tokens.sequences.of == i] for i in range(3)]
    expected = {
        "token_mean": each.mean(),
        "sequence_mean": torch.stack([row.mean() for row in rows]).mean(),
        "constant": torch.stack([row.sum() / 7 for row in rows]).mean(),
    }
    for name, value in expected.items():
        settings = LossSettings(aggregation=name, constant_length=7 if name == "constant" else None)
        divisor = denominator(settings, num_loss_tokens=9, num_sequences=3)
        assert (policy_loss(tokens, settings).loss.sum() / divisor).item() == pytest.approx(value.item(), rel=1e-12)


def test_kl_estimates_by_hand_and_in_the_mean() -> None:
    """d = 0.5: k1 .5, k2 .125, k3 e^-.5 - .5; over the distribution k1 and k3 are exact."""
    for name, value in {"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 0.5}.items():
        found = kl_penalty(torch.tensor([-1.0]), torch.tensor([-1.5]), KlSettings(coefficient=1.0, estimator=name))
        assert found.item() == pytest.approx(value, rel=1e-6)
    current = torch.log_softmax(torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64), 0)
    reference = torch.log_softmax(torch.tensor([0.0, -0.5, 1.0, 1.0], dtype=torch.float64), 0)
    exact = (current.exp() * (current - reference)).sum().item()
    for name in ("k1", "k3"):
        estimate = kl_penalty(current, reference, KlSettings(coefficient=1.0, estimator=name))
        assert (current.exp() * estimate).sum().item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("estimator", "reverse"), [("k1", True), ("k2", True), ("k3", False)])
def test_the_mean_gradient_is_that_of_the_kl_which_the_estimator_promises(estimator: str, reverse: bool) -> None:
    """Over all tokens of a distribution, weighted by their probability; k3 descends KL(reference ‖ current)."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    reference = torch.log_softmax(torch.tensor([0.0, -0.5, 1.0, 1.0], dtype=torch.float64), 0)
    settings = KlSettings(coefficient=1.0, estimator=estimator)

    def estimated(point: torch.Tensor) -> torch.Tensor:
        logs = torch.log_softmax(point, 0)
        return logs.detach().exp() * kl_penalty(logs, reference, settings)

    def exact(point: torch.Tensor) -> torch.Tensor:
        logs = torch.log_softmax(point, 0)
        return logs.exp() * (logs - reference) if reverse else -reference.exp() * logs

    assert torch.allclose(gradient(estimated, logits), gradient(exact, logits), rtol=1e-9)


def test_importance_weights_by_hand() -> None:
    sequences = Sequences(torch.tensor([0, 0, 1]), torch.tensor([2, 1]))
    gaps = torch.tensor([math.log(1.5), math.log(3.0), math.log(0.5)], dtype=torch.float64)
    by_token, cut = importance_weights(gaps, sequences, ImportanceSettings(cap=2.0))
    assert by_token.tolist() == pytest.approx([1.5, 2.0, 0.5])
    assert cut.tolist() == [0, 1, 0]
    by_sequence, cut = importance_weights(gaps, sequences, ImportanceSettings(level="sequence", cap=4.0))
    assert by_sequence.tolist() == pytest.approx([4.0, 4.0, 0.5])
    assert cut.tolist() == [1, 1, 0]


def test_terms_add_up() -> None:
    tokens = ragged()
    plain = policy_loss(tokens, LossSettings()).loss
    weights, cut = importance_weights(tokens.mismatch, tokens.sequences, ImportanceSettings(cap=0.9))
    kl = KlSettings(coefficient=0.1, estimator="k2")
    whole = policy_loss(tokens, LossSettings(kl=kl, entropy_bonus=0.01, importance=ImportanceSettings(cap=0.9)))
    expected = plain * weights + 0.1 * kl_penalty(tokens.logprobs, tokens.reference, kl) - 0.01 * tokens.entropy
    assert torch.allclose(whole.loss, expected, rtol=1e-12)
    assert torch.equal(whole.truncated, cut)
    assert cut.any()
    assert torch.allclose(whole.reference_kl, kl_penalty(tokens.logprobs, tokens.reference, kl))


def test_a_term_without_its_input_is_an_error() -> None:
    with pytest.raises(ValueError, match="was not computed"):
        policy_loss(ragged(reference=None), LossSettings(kl=KlSettings(coefficient=0.1)))


def test_without_an_advantage_a_gradient_is_left_where_the_settings_say_so() -> None:
    for settings in (
        LossSettings(),
        LossSettings(objective=CispoSettings()),
        LossSettings(objective=GspoSettings(), aggregation="sequence_mean"),
        LossSettings(importance=ImportanceSettings()),
        LossSettings(kl=KlSettings(coefficient=0.1)),
    ):
        tokens = ragged(advantages=torch.zeros(9, dtype=torch.float64))
        (found,) = torch.autograd.grad(policy_loss(tokens, settings).loss.sum(), tokens.logprobs)
        assert bool(found.any()) == settings.gradient_without_advantage
