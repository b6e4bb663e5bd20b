"""The identities that facts about FAPO promise, checked on sampled groups and against closed forms."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_fapo.algorithm import theory
from megatron_fapo.algorithm.advantages import step_advantages
from megatron_fapo.algorithm.rewards import overlong_penalty, rewards, shaped, usable
from megatron_fapo.algorithm.settings import AdvantageSettings, AlgorithmSettings, OverlongSettings, RewardSettings
from tests.builders import FAILED, make_group

GRPO = AdvantageSettings()
classes = st.lists(st.sampled_from(["clean", "flawed", "wrong"]), min_size=2, max_size=32)
penalties = st.floats(0.05, 1.95)


def with_reward(**reward) -> AlgorithmSettings:
    return AlgorithmSettings(reward=RewardSettings(**reward))


def advantage(kinds: list[str], flaw_penalty: float, settings: AdvantageSettings = GRPO) -> np.ndarray:
    """[n] of each rollout's first token."""
    algorithm = AlgorithmSettings(reward=RewardSettings(flaw_penalty=flaw_penalty), advantage=settings)
    group = make_group(kinds)
    (found,) = step_advantages([group], [rewards(group, algorithm, max_tokens=100)], algorithm, max_tokens=100)
    return np.array([tokens[0] for tokens in found])


def test_rewards_of_equation_8():
    group = make_group(["clean", "flawed", "wrong", "skipped"])
    np.testing.assert_array_equal(rewards(group, AlgorithmSettings(), max_tokens=100), [1, 0, -1, 1])
    np.testing.assert_allclose(
        rewards(group, with_reward(flaw_penalty=4 / 3), max_tokens=100), [1, -1 / 3, -1, 1], rtol=1e-6
    )


@pytest.mark.parametrize(("choice", "expected"), [("as_clean", [1, -1]), ("as_flawed", [0, -1])])
def test_a_failed_verdict_becomes_what_the_config_says(choice, expected):
    settings = RewardSettings(failed_verdict=choice)
    group = make_group([FAILED, "wrong"])
    assert usable(group, settings)
    np.testing.assert_array_equal(rewards(group, AlgorithmSettings(reward=settings), max_tokens=100), expected)


def test_a_group_with_a_failed_verdict_is_dropped_by_default():
    assert not usable(make_group([FAILED, "clean"]), RewardSettings())
    assert usable(make_group(["skipped", "wrong"]), RewardSettings())


def test_overlong_penalty_is_dapos_ramp():
    settings = OverlongSettings(buffer=4096, factor=1.0)
    lengths = [1, 8192 - 4096, 8192 - 2048, 8192]
    assert [overlong_penalty(n, 8192, settings) for n in lengths] == [0.0, 0.0, -0.5, -1.0]
    assert overlong_penalty(8192, 8192, None) == 0.0
    assert not shaped(lengths[:2], 8192, settings)
    assert shaped(lengths, 8192, settings)


@given(classes)
def test_advantages_sum_to_zero_and_have_unit_spread(kinds):
    result = advantage(kinds, 1.0)
    assert abs(result.sum()) < 1e-4
    if len(set(kinds)) > 1:
        assert result.std(ddof=1) == pytest.approx(1.0, rel=1e-4)
    else:
        assert not result.any()


@given(st.integers(1, 15), st.integers(1, 15), penalties)
def test_the_penalty_does_nothing_in_a_two_class_group(first, second, flaw_penalty):
    flawed_wrong = advantage(["flawed"] * first + ["wrong"] * second, flaw_penalty)
    plain = advantage(["clean"] * first + ["wrong"] * second, 0.0)
    np.testing.assert_allclose(flawed_wrong, plain, rtol=1e-4)
    one, other = (advantage(["clean"] * first + ["flawed"] * second, p) for p in (flaw_penalty, 1.0))
    np.testing.assert_allclose(one, other, rtol=1e-4)


@given(classes, penalties)
def test_a_flawed_positive_turns_negative_exactly_above_the_shift(kinds, flaw_penalty):
    counts = {kind: kinds.count(kind) for kind in ("clean", "flawed", "wrong")}
    assume(counts["flawed"] and counts["wrong"])
    rho = counts["clean"] / counts["wrong"]
    assume(abs(rho - theory.shift(flaw_penalty)) > 1e-3)
    flawed = advantage(kinds, flaw_penalty)[kinds.index("flawed")]
    assert (flawed < 0) == (rho > theory.shift(flaw_penalty))


@given(classes, st.floats(0.0, 3.0))
def test_mean_and_variance_match_the_appendix(kinds, flaw_penalty):
    values = rewards(make_group(kinds), with_reward(flaw_penalty=flaw_penalty), max_tokens=100).astype(float)
    beta, gamma = kinds.count("wrong") / len(kinds), kinds.count("flawed") / len(kinds)
    assert values.mean() == pytest.approx(theory.mean_reward(beta, gamma, flaw_penalty), abs=1e-5)
    assert values.var() == pytest.approx(theory.reward_variance(beta, gamma, flaw_penalty), abs=1e-5)


@given(st.floats(0.01, 0.98), st.floats(0.01, 0.98), st.floats(0.05, 3.0))
def test_the_spread_grows_exactly_above_its_own_threshold(beta, gamma, flaw_penalty):
    assume(beta + gamma < 1)
    rho = (1 - beta - gamma) / beta
    assume(abs(rho - (4 / flaw_penalty - 1)) > 1e-6)
    grows = theory.reward_variance(beta, gamma, flaw_penalty) > 4 * beta * (1 - beta)
    assert grows == (rho > 4 / flaw_penalty - 1)


def test_above_rho_3_it_is_the_wrong_rollouts_advantage_that_shrinks():
    """The paper says clean and flawed advantages shrink there; they do not (α .6, β .1)."""
    np.testing.assert_allclose(theory.advantages(0.1, 0.3, 0.0), (0.333, 0.333, -3.0), atol=1e-3)
    np.testing.assert_allclose(theory.advantages(0.1, 0.3, 1.0), (0.745, -0.745, -2.236), atol=1e-3)


def test_one_flag_in_an_all_right_group_has_full_size():
    np.testing.assert_allclose(advantage(["flawed"] + ["clean"] * 7, 1.0), [-2.475] + [0.354] * 7, atol=1e-3)


def test_lambda_and_shift_are_inverse():
    assert theory.flaw_penalty_for(1.0) == 1.0
    for rho in (0.5, 1.0, 2.0):
        assert theory.shift(theory.flaw_penalty_for(rho)) == pytest.approx(rho)
    assert theory.shift(0.0) == math.inf
