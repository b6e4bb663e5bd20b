"""A verdict is left out only where no advantage can change: the property itself, over all variants."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from megatron_fapo.algorithm.advantages import needs_verdict, step_advantages
from megatron_fapo.algorithm.rewards import Rates, flaw_penalty, rewards, shaped
from megatron_fapo.algorithm.settings import (
    AdvantageSettings,
    AlgorithmSettings,
    OverlongSettings,
    PenaltySchedule,
    RewardSettings,
)
from megatron_fapo.records import Group, Judged, Verdict
from tests.builders import make_group

LIMIT = 100


@st.composite
def algorithms(draw) -> AlgorithmSettings:
    flaw = draw(st.sampled_from(["reward", "right_only", "first_wrong_step"]))
    plain = flaw == "first_wrong_step"
    return AlgorithmSettings(
        reward=RewardSettings(
            flaw_penalty=draw(st.floats(0.01, 3.0)),
            penalty="hard" if plain else draw(st.sampled_from(["hard", "soft"])),
            correct_rates=False if plain else draw(st.booleans()),
            overlong=draw(st.sampled_from([None, OverlongSettings(buffer=50)])),
        ),
        advantage=AdvantageSettings(
            estimator=draw(st.sampled_from(["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"])),
            epsilon=draw(st.sampled_from([1e-8, 1e-6, 1e-4])),
            flaw=flaw,
            all_right=draw(st.sampled_from(["full", "shrunk"])),
        ),
    )


def with_verdict(group: Group, first_wrong: int, p_flawed: float) -> Group:
    """The same group, its right rollouts all judged so."""
    verdict = Verdict(first_wrong=first_wrong, p_flawed=p_flawed, votes=4, tokens=1, text="")

    def judged(one: Judged) -> Judged:
        if not one.outcome.right:
            return one
        return dataclasses.replace(one, verdict=verdict, wrong_from=3 if first_wrong != -1 else None)

    return dataclasses.replace(group, judged=tuple(map(judged, group)))


def advantages(group: Group, algorithm: AlgorithmSettings, rates: Rates) -> np.ndarray:
    """Beside a group that is always the same, since some estimators look at the whole batch."""
    other = make_group(["clean", "wrong", "flawed"], prompt_id="p1", length=8)
    groups = [group, other]
    given_ = [rewards(one, algorithm, max_tokens=LIMIT, rates=rates) for one in groups]
    found = step_advantages(groups, given_, algorithm, max_tokens=LIMIT, rates=rates)
    return np.concatenate([tokens for row in found for tokens in row])


@given(
    st.integers(2, 24), st.integers(1, 24), st.sampled_from([5, 70]), algorithms(), st.floats(0, 1),
    st.sampled_from([Rates(tpr=0.9, fpr=0.05), Rates(tpr=0.5, fpr=0.3)]),
)  # fmt: skip
def test_a_verdict_that_is_not_asked_could_not_have_changed_an_advantage(size, right, length, algorithm, p, rates):
    """All right rollouts share one solution, so one verdict decides for all of them."""
    right = min(right, size)
    group = make_group(["skipped"] * right + ["wrong"] * (size - right), length=length)
    asked = needs_verdict(
        distinct_right=1,
        group_size=size,
        penalty=flaw_penalty(0, algorithm.reward),
        algorithm=algorithm,
        uneven=shaped([length], LIMIT, algorithm.reward.overlong),
        rates=rates,
    )
    event(f"asked: {asked}")
    assume(not asked)
    skipped = advantages(group, algorithm, rates)
    for verdict in [(-1, 0.0), (1, 1.0), (-1, min(p, 0.49)), (1, max(p, 0.5))]:
        judged = advantages(with_verdict(group, *verdict), algorithm, rates)
        np.testing.assert_allclose(judged, skipped, rtol=1e-5, atol=1e-7)


COMMON = {"group_size": 8, "penalty": 1.0, "uneven": False, "algorithm": AlgorithmSettings()}


def test_the_default_skips_one_right_answer_and_asks_for_two():
    assert not needs_verdict(distinct_right=0, **COMMON)
    assert not needs_verdict(distinct_right=1, **COMMON)
    assert needs_verdict(distinct_right=2, **COMMON)
    assert not needs_verdict(distinct_right=2, **{**COMMON, "penalty": 0.0})


@pytest.mark.parametrize(
    "change",
    [
        {"uneven": True},
        {"penalty": 2.0},
        *({"algorithm": AlgorithmSettings(advantage=AdvantageSettings(estimator=name))}
          for name in ("dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline")),
        {"algorithm": AlgorithmSettings(advantage=AdvantageSettings(flaw="first_wrong_step"))},
        {"algorithm": AlgorithmSettings(reward=RewardSettings(correct_rates=True)), "rates": Rates(tpr=0.6, fpr=0.2)},
    ],
    ids=["shaping or grades", "large penalty", "dr_grpo", "rloo", "reinforce++", "its baseline", "token penalty",
         "large corrected penalty"],
)  # fmt: skip
def test_the_skip_switches_itself_off_where_it_would_lose_something(change):
    common = COMMON | change
    assert needs_verdict(distinct_right=1, **common)
    assert not needs_verdict(distinct_right=0, **common)


def test_among_right_rollouts_only_a_single_solution_never_needs_its_verdict():
    algorithm = AlgorithmSettings(advantage=AdvantageSettings(flaw="right_only", estimator="rloo"))
    common = COMMON | {"algorithm": algorithm, "uneven": True, "penalty": 2.5}
    assert not needs_verdict(distinct_right=1, **common)
    assert needs_verdict(distinct_right=2, **common)


def test_a_schedule_moves_the_penalty_and_with_it_the_need():
    plan = RewardSettings(flaw_penalty=2.0, schedule=PenaltySchedule(begin=10, end=20, initial=0.5))
    assert [flaw_penalty(step, plan) for step in (0, 10, 15, 20, 99)] == [0.5, 0.5, 1.25, 2.0, 2.0]
    round_trip = PenaltySchedule(begin=10, end=20, initial=0.5, shape="cosine")
    assert flaw_penalty(15, plan.changed(schedule=round_trip.model_dump())) == pytest.approx(1.25)
    assert flaw_penalty(12, plan.changed(schedule=round_trip.model_dump())) < flaw_penalty(12, plan)
