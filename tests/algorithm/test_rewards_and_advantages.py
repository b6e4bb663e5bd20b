"""The identities that facts about FAPO promise, checked on sampled groups and against closed forms."""

import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from megatron_fapo.algorithm import theory
from megatron_fapo.algorithm.advantages import group_advantage, needs_verdict, token_advantages
from megatron_fapo.algorithm.rewards import overlong_penalty, rewards, shaped, usable
from megatron_fapo.algorithm.settings import AdvantageSettings, OverlongSettings, RewardSettings
from megatron_fapo.records import floats
from tests.builders import FAILED, make_group

GRPO = AdvantageSettings()
classes = st.lists(st.sampled_from(["clean", "flawed", "wrong"]), min_size=2, max_size=32)
penalties = st.floats(0.05, 1.95)


def advantage(kinds: list[str], flaw_penalty: float, settings: AdvantageSettings = GRPO) -> np.ndarray:
    reward = RewardSettings(flaw_penalty=flaw_penalty)
    return group_advantage(rewards(make_group(kinds), reward, max_tokens=100), settings)


def test_rewards_of_equation_8():
    group = make_group(["clean", "flawed", "wrong", "skipped"])
    np.testing.assert_array_equal(rewards(group, RewardSettings(), max_tokens=100), [1, 0, -1, 1])
    np.testing.assert_allclose(
        rewards(group, RewardSettings(flaw_penalty=4 / 3), max_tokens=100), [1, -1 / 3, -1, 1], rtol=1e-6
    )


@pytest.mark.parametrize(("choice", "expected"), [("as_clean", [1, -1]), ("as_flawed", [0, -1])])
def test_a_failed_verdict_becomes_what_the_config_says(choice, expected):
    settings = RewardSettings(failed_verdict=choice)
    group = make_group([FAILED, "wrong"])
    assert usable(group, settings)
    np.testing.assert_array_equal(rewards(group, settings, max_tokens=100), expected)


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
    values = rewards(make_group(kinds), RewardSettings(flaw_penalty=flaw_penalty), max_tokens=100).astype(float)
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


@given(st.integers(2, 64), st.integers(1, 64), st.floats(0.01, 3.0), st.sampled_from([1e-8, 1e-6, 1e-4]))
@example(8, 1, 1.0, 1e-6)
@example(16, 1, 1.99, 1e-6)
def test_verdicts_are_skipped_only_where_that_is_lossless(size, right, flaw_penalty, epsilon):
    """All right rollouts share one solution, so one verdict decides for all of them."""
    right = min(right, size)
    settings = AdvantageSettings(epsilon=epsilon)
    asked = needs_verdict(
        distinct_right=1, group_size=size, flaw_penalty=flaw_penalty, advantage=settings, uneven=False
    )
    clean = advantage(["clean"] * right + ["wrong"] * (size - right), flaw_penalty, settings)
    flawed = advantage(["flawed"] * right + ["wrong"] * (size - right), flaw_penalty, settings)
    if not asked:
        np.testing.assert_allclose(flawed, clean, rtol=1e-5)


def test_the_default_skips_one_right_answer_and_asks_for_two():
    common = {"group_size": 8, "flaw_penalty": 1.0, "uneven": False}
    assert not needs_verdict(distinct_right=0, advantage=GRPO, **common)
    assert not needs_verdict(distinct_right=1, advantage=GRPO, **common)
    assert needs_verdict(distinct_right=2, advantage=GRPO, **common)


@pytest.mark.parametrize(
    "change",
    [{"uneven": True}, {"flaw_penalty": 2.0}, {"advantage": AdvantageSettings(normalise_by_std=False)}],
    ids=["shaping or grades", "large penalty", "no std"],
)
def test_the_skip_switches_itself_off_where_it_would_lose_something(change):
    common = {"group_size": 8, "flaw_penalty": 1.0, "uneven": False, "advantage": GRPO} | change
    assert needs_verdict(distinct_right=1, **common)
    assert not needs_verdict(distinct_right=0, **common)


def test_token_advantages_repeat_the_rollouts_advantage():
    first, second = token_advantages(floats([1.0, -1.0]), [3, 2], AdvantageSettings(normalise_by_std=False))
    np.testing.assert_array_equal(first, [1, 1, 1])
    np.testing.assert_array_equal(second, [-1, -1])
