"""avg@k, maj@k, pass@k and their intervals: by hand, by counting all subsets, and by drawing."""

from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.evaluate.scores import Sample, majority_at_k, mean_interval, pass_at_k, summarise

KINDS = st.sampled_from(["right", "a", "b", "c", None])


def sample(kind: str | None, clean: bool | None = None, sound: bool | None = None) -> Sample:
    return Sample(right=kind == "right", answer="7" if kind == "right" else kind, clean=clean, sound=sound)


def test_scores_of_two_prompts_by_hand():
    """Prompt 1: right and clean, right and flawed, wrong "3", silent. Prompt 2: right (no verdict), wrong thrice."""
    first = [sample("right", True, True), sample("right", False, False), sample("3"), sample(None)]
    second = [sample("right", None, True), sample("3"), sample("3"), sample("4")]
    found = summarise([first, second], judge=True)
    assert (found.prompts, found.samples) == (2, 4)
    assert found.right_share == 3 / 8
    assert found.pass_at == {1: 3 / 8, 2: (5 / 6 + 1 / 2) / 2, 4: 1.0}
    # of four votes: two right against one; one right against two that agree
    assert found.maj_at[4] == 0.5
    # of two votes, prompt 1: RR, RS and RS win, R3 and R3 tie, 3S loses; prompt 2: R3, R3, R4 tie, the others lose
    assert found.maj_at[2] == pytest.approx(((1 + 2 + 2 * 0.5) / 6 + 3 * 0.5 / 6) / 2)
    assert found.maj_at[1] == 3 / 8
    assert found.sound_share_judge == 1 / 8
    assert found.verified_pass_at_judge == {1: 1 / 8, 2: 1 / 4, 4: 1 / 2}
    assert found.sound_share_oracle == 2 / 8
    assert found.verified_pass_at_oracle == {1: 1 / 4, 2: 1 / 2, 4: 1.0}
    assert found.unjudged_share == 1 / 3
    assert {name: i.value for name, i in found.intervals.items() if "/" not in name} == {
        "right_share": 3 / 8, "sound_share_judge": 1 / 8, "sound_share_oracle": 1 / 4,
    }  # fmt: skip


def test_without_judge_and_oracle_there_are_no_verified_scores():
    found = summarise([[sample("right"), sample("a")]], judge=False)
    assert found.sound_share_judge is found.verified_pass_at_oracle is found.unjudged_share is None
    assert not [name for name in found.intervals if "sound" in name or "verified" in name]


@given(st.lists(KINDS, min_size=1, max_size=8), st.data())
def test_both_estimators_are_the_mean_over_all_subsets(kinds, data):
    k = data.draw(st.integers(1, len(kinds)))
    samples = [sample(kind) for kind in kinds]
    subsets = list(combinations(kinds, k))
    hits = sum("right" in subset for subset in subsets) / len(subsets)
    assert pass_at_k([one.right for one in samples], k) == pytest.approx(hits)

    def won(subset: tuple[str | None, ...]) -> float:
        votes = [kind for kind in subset if kind is not None]
        most = [kind for kind in set(votes) if votes.count(kind) == max(map(votes.count, votes))]
        return ("right" in most) / len(most) if most else 0.0

    assert majority_at_k(samples, k) == pytest.approx(sum(map(won, subsets)) / len(subsets))


def test_intervals_at_their_ends():
    every, half = mean_interval([1.0] * 30, draws=8), mean_interval([0.5] * 30, draws=8)
    assert (every.high, every.low) == (1.0, pytest.approx(30 / (30 + 1.959964**2), abs=1e-5)), "Wilson, 30 of 30"
    assert half.low + half.high == pytest.approx(1.0)
    assert mean_interval([0.0, 1.0] * 15, draws=1).low == pytest.approx(0.3315, abs=1e-4), "Wilson, 15 of 30"
    spread = [0.4, 0.6] * 15  # far less spread than whole answers would have
    assert mean_interval(spread, draws=8).low > mean_interval(spread, draws=1).low


@pytest.mark.parametrize("shape", [(0.3, 0.3), (2.0, 2.0), (4.0, 0.5)])
def test_intervals_hold_the_truth_as_often_as_they_say(shape):
    rng = Random(str(shape))
    truth, held = shape[0] / sum(shape), 0
    for _ in range(600):
        rates = [rng.betavariate(*shape) for _ in range(30)]
        interval = mean_interval([sum(rng.random() < rate for _ in range(8)) / 8 for rate in rates], draws=8)
        held += interval.low <= truth <= interval.high
    assert held / 600 >= 0.92
