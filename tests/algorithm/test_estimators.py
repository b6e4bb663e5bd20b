"""Each estimator against numbers worked out by hand, and the identities between them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron_fapo.algorithm.advantages import (
    dr_grpo,
    grpo,
    over_tokens,
    process_advantage,
    reinforce_pp,
    rloo,
    step_advantages,
)
from megatron_fapo.algorithm.rewards import Rates, flaw_shares, informative, rewards
from megatron_fapo.algorithm.settings import AdvantageSettings, AlgorithmSettings, LossSettings, RewardSettings
from megatron_fapo.errors import ConfigError
from megatron_fapo.records import Verdict, floats
from megatron_fapo.settings import build
from tests.builders import make_group

group_rewards = arrays(np.float32, st.integers(2, 16), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0]))


def found(kinds, wrong_from=None, length=6, rates=Rates(tpr=1.0, fpr=0.0), loss=None, **advantage):  # noqa: B008
    """Advantages of a group, one array a rollout; flawed rollouts are wrong from token `wrong_from` on."""
    algorithm = AlgorithmSettings(
        reward=RewardSettings(), advantage=AdvantageSettings(**advantage), loss=loss or LossSettings()
    )
    group = make_group(kinds, length=length)
    judged = tuple(dataclasses.replace(one, wrong_from=wrong_from if one.flagged else None) for one in group)
    group = dataclasses.replace(group, judged=judged)
    given_ = [rewards(group, algorithm, max_tokens=100, rates=rates)]
    return step_advantages([group], given_, algorithm, max_tokens=100, rates=rates)[0]


def test_grpo_and_its_relatives_by_hand():
    values = floats([1, 1, -1, -1])
    np.testing.assert_allclose(grpo(values, 1e-6).of(values), np.array([1, 1, -1, -1]) * 0.8660254, rtol=1e-5)
    np.testing.assert_array_equal(dr_grpo(values).of(values), [1, 1, -1, -1])
    np.testing.assert_allclose(rloo(values).of(values), np.array([1, 1, -1, -1]) * 4 / 3)
    np.testing.assert_allclose(rloo(floats([1, 0, -1])).of([1, 0, -1]), [1.5, 0, -1.5])  # 1 - (0 - 1)/2


@given(group_rewards)
def test_rloo_is_dr_grpo_times_n_over_n_minus_1(values):
    n = len(values)
    np.testing.assert_allclose(rloo(values).of(values), n / (n - 1) * dr_grpo(values).of(values), atol=1e-12)


@given(group_rewards)
def test_grpo_is_dr_grpo_over_the_std(values):
    std = values.std(ddof=1, dtype=np.float64)
    expected = dr_grpo(values).of(values) / (std + 1e-6) if std else np.zeros(len(values))
    np.testing.assert_allclose(grpo(values, 1e-6).of(values), expected, rtol=1e-9, atol=1e-12)


@given(st.lists(group_rewards, min_size=1, max_size=5), st.booleans())
def test_reinforce_pp_has_mean_0_and_spread_1_over_all_tokens(groups, baseline):
    lengths = [np.arange(1, len(values) + 1) for values in groups]
    lines = reinforce_pp(groups, lengths, 1e-9, baseline=baseline)
    tokens = np.concatenate([np.repeat(line.of(v), n) for line, v, n in zip(lines, groups, lengths, strict=True)])
    assert tokens.mean() == pytest.approx(0.0, abs=1e-6)
    assert tokens.std() == pytest.approx(1.0, rel=1e-4) or not tokens.any()


def test_reinforce_pp_by_hand():
    groups, lengths = [floats([1, 1]), floats([1, -1])], [np.array([1, 1]), np.array([1, 3])]
    plain = reinforce_pp(groups, lengths, 1e-9, baseline=False)  # tokens 1 1 1 -1 -1 -1: mean 0, std 1
    np.testing.assert_allclose([line.of(v) for line, v in zip(plain, groups, strict=True)], [[1, 1], [1, -1]])
    based = reinforce_pp(groups, lengths, 1e-9, baseline=True)  # 0 0 1 -1 -1 -1: mean -1/3, variance 4/6 - 1/9
    spread = (4 / 6 - 1 / 9) ** 0.5
    np.testing.assert_allclose(
        [line.of(v) for line, v in zip(based, groups, strict=True)],
        [[1 / 3 / spread] * 2, [4 / 3 / spread, -2 / 3 / spread]],
    )


def test_the_process_advantage_compares_right_rollouts_with_each_other_alone():
    right = np.array([True, True, False, True])
    result = process_advantage(floats([0, 1, 0, 0]), right, 1e-9)
    np.testing.assert_allclose(result, np.array([1, -2, 0, 1]) / 3 * 3**0.5, rtol=1e-6)
    assert not process_advantage(floats([1, 0]), np.array([True, False]), 1e-6).any()
    assert not process_advantage(floats([1, 1, 0]), np.array([True, True, False]), 1e-6).any()


def test_right_only_acts_in_a_two_class_group_and_leaves_wrong_rollouts_alone():
    plain = found(["clean", "clean", "wrong", "wrong"], flaw="right_only")
    flawed = found(["clean", "flawed", "wrong", "wrong"], flaw="right_only")
    for place in (2, 3):
        np.testing.assert_array_equal(plain[place], flawed[place])
    assert flawed[0][0] > plain[0][0] > flawed[1][0]
    same = found(["flawed", "flawed", "wrong"], flaw="right_only")  # nothing to compare: as GRPO
    np.testing.assert_array_equal(same, found(["clean", "clean", "wrong"], flaw="right_only"))


@given(st.integers(1, 60), st.integers(0, 60), st.floats(-3, 3), st.floats(0, 3), st.floats(1, 8))
def test_the_penalty_from_the_first_wrong_step_keeps_the_sum(length, wrong_from, advantage, penalty, concentration):
    wrong_from = min(wrong_from, length - 1)
    tokens = over_tokens(length, advantage, advantage + penalty, wrong_from, concentration)
    assert tokens.sum() == pytest.approx(length * advantage, rel=1e-4, abs=1e-3)
    assert len(set(tokens.tolist())) <= 2
    before, after = tokens[0], tokens[-1]
    assert after <= advantage + 1e-5
    assert before <= advantage + penalty + 1e-4
    assert advantage + penalty - after <= penalty * concentration + 1e-4


def test_by_hand_a_late_slip_costs_its_own_tokens_most():
    # clean would be +1, flawed is -1: two of eight tokens bear four times the penalty of 2 less what is free before
    tokens = over_tokens(8, -1.0, 1.0, 6, 4.0)
    np.testing.assert_allclose(tokens, [1.0] * 6 + [-7.0] * 2)
    np.testing.assert_allclose(over_tokens(8, -1.0, 1.0, 6, 2.0), [(-8 + 6) / 6] * 6 + [-3.0] * 2, rtol=1e-6)


def test_padding_with_sound_steps_gains_nothing():
    """Step inflation: however many sound tokens stand before the slip, a flawed rollout earns Eq. 8's on average."""
    means = [over_tokens(n + 5, -0.7, 0.9, n, 4.0).mean() for n in (0, 5, 50, 500)]
    np.testing.assert_allclose(means, -0.7, rtol=1e-4)


def test_with_concentration_1_it_is_eq_8():
    kinds = ["clean", "flawed", "wrong", "wrong"]
    np.testing.assert_allclose(
        found(kinds, wrong_from=3, flaw="first_wrong_step", concentration=1.0), found(kinds), rtol=1e-6
    )


def test_a_group_whose_rewards_agree_stays_without_advantage():
    for flaw in ("reward", "right_only", "first_wrong_step"):
        assert not np.any(found(["flawed", "flawed"], wrong_from=3, flaw=flaw)), flaw


def test_all_right_groups_are_guarded():
    kinds = ["flawed"] + ["clean"] * 7
    full, shrunk = found(kinds), found(kinds, all_right="shrunk", rates=Rates(tpr=0.914, fpr=0.058))
    np.testing.assert_allclose(shrunk, np.array(full) * 0.856, rtol=1e-5)
    mixed = [*kinds[:-1], "wrong"]
    np.testing.assert_array_equal(found(mixed), found(mixed, all_right="shrunk", rates=Rates(tpr=0.9, fpr=0.1)))
    divided = make_group(kinds)
    verdict = Verdict(first_wrong=1, p_flawed=0.6, votes=5, tokens=1, text="")
    divided = dataclasses.replace(
        divided, judged=(dataclasses.replace(divided.judged[0], verdict=verdict), *divided.judged[1:])
    )
    agreed = AlgorithmSettings(advantage=AdvantageSettings(all_right="agreed"))
    assert flaw_shares(divided, AlgorithmSettings())[0] == 1.0
    assert not flaw_shares(divided, agreed).any()
    assert flaw_shares(make_group(kinds), agreed)[0] == 1.0


def test_the_corrected_penalty_is_right_on_average():
    """Over a judge's errors the corrected share has mean 1 for a flawed solution, 0 for a clean one."""
    rates = Rates(tpr=0.8, fpr=0.3)
    for truth, rate in ((1.0, rates.tpr), (0.0, rates.fpr)):
        assert rate * rates.corrected(1.0) + (1 - rate) * rates.corrected(0.0) == pytest.approx(truth)


def test_the_soft_penalty_is_lambda_times_p():
    algorithm = AlgorithmSettings(reward=RewardSettings(penalty="soft", flaw_penalty=0.5))
    group = make_group(["clean", "wrong"])
    verdict = Verdict(first_wrong=-1, p_flawed=0.4, votes=5, tokens=1, text="")
    group = dataclasses.replace(group, judged=(dataclasses.replace(group.judged[0], verdict=verdict), group.judged[1]))
    np.testing.assert_allclose(rewards(group, algorithm, max_tokens=100), [0.8, -1.0], rtol=1e-6)


def test_truncated_rollouts_leave_the_loss_but_not_the_statistics():
    group = make_group(["clean", "wrong", "wrong"])
    cut = dataclasses.replace(
        group.judged[2], rollout=dataclasses.replace(group.judged[2].rollout, finish_reason="length")
    )
    group = dataclasses.replace(group, judged=(*group.judged[:2], cut))
    algorithm = AlgorithmSettings(loss=LossSettings(mask_truncated=True))
    values = [rewards(group, algorithm, max_tokens=100)]
    masked = step_advantages([group], values, algorithm, max_tokens=100)[0]
    whole = step_advantages([group], values, AlgorithmSettings(), max_tokens=100)[0]
    assert masked[2] is None
    np.testing.assert_array_equal(masked[:2], whole[:2])


def test_a_group_teaches_when_its_rewards_differ():
    for kinds, teaches in [(["clean"] * 2, False), (["wrong"] * 2, False), (["clean", "wrong"], True),
                           (["clean", "flawed"], True), (["flawed"] * 2, False)]:  # fmt: skip
        assert informative(make_group(kinds), AlgorithmSettings(), max_tokens=100) == teaches, kinds


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"loss": {"objective": {"name": "gspo"}}}, "belong to a sequence"),
        ({"loss": {"aggregation": "constant"}}, "constant_length None"),
        ({"loss": {"constant_length": 5}}, "belongs to aggregation constant"),
        ({"loss": {"objective": {"name": "cispo", "dual_clip": 3.0}}}, "unknown key"),
        ({"loss": {"objective": {"name": "ppo2"}}}, "ppo2"),
        ({"advantage": {"estimator": "gae"}}, "gae"),
        ({"advantage": {"flaw": "first_wrong_step"}, "reward": {"penalty": "soft"}}, "no first wrong step"),
        ({"advantage": {"flaw": "first_wrong_step"}, "reward": {"correct_rates": True}}, "no first wrong step either"),
        ({"advantage": {"flaw": "first_wrong_step"}, "reward": {"failed_verdict": "as_flawed"}}, "names no step"),
        ({"advantage": {"all_right": "agreed"}, "reward": {"penalty": "soft"}}, "no vote that could agree"),
        ({"reward": {"schedule": {"begin": 5, "end": 5}}}, "must come after"),
    ],
)  # fmt: skip
def test_a_mix_that_contradicts_itself_is_refused_with_the_reason(values, reason):
    with pytest.raises(ConfigError, match=reason):
        build(AlgorithmSettings, values)
