"""Dealing out costs: everything once, sums near each other, budgets kept, the same every time."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.batch.balance import balanced, cost, crossover, greedy, imbalance, into_bins

sizes = st.lists(st.integers(1, 500), min_size=0, max_size=40)
QWEN_7B = {
    "layers": 28, "hidden": 3584, "heads": 28, "groups": 4, "head_dim": 128, "mlp": 18944, "vocabulary": 152064
}  # fmt: skip


def sums(costs: list[float], lists: list[list[int]]) -> list[float]:
    return [math.fsum(costs[i] for i in part) for part in lists]


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(1, 8))
def test_every_item_is_dealt_once_and_sums_differ_by_one_item_at_most(lengths: list[int], parts: int) -> None:
    costs = [cost(length, 300.0) for length in lengths]
    found = balanced(costs, parts)
    assert len(found) == parts
    assert sorted(i for part in found for i in part) == list(range(len(costs)))
    totals = sums(costs, found)
    assert max(totals) - min(totals) <= max(costs, default=0.0) * (1 + 1e-9)
    assert max(totals) <= max(sums(costs, greedy(costs, parts))) * (1 + 1e-9)
    assert balanced(costs, parts) == found


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(1, 600), st.integers(1, 6))
def test_bins_keep_the_budget_and_hold_everything_once(lengths: list[int], budget: int, least: int) -> None:
    costs = [cost(length, 300.0) for length in lengths]
    bins = into_bins(lengths, costs, budget, least)
    assert Counter(i for part in bins for i in part) == Counter(range(len(lengths)))
    assert all(part and (len(part) == 1 or sum(lengths[i] for i in part) <= budget) for part in bins)
    fewest = into_bins(lengths, costs, budget)
    assert len(fewest) <= len(bins) <= max(len(fewest), least)


def test_as_many_bins_as_the_tokens_need_where_they_fit() -> None:
    assert into_bins([6, 4, 5, 5], [6, 4, 5, 5], 10) == [[0, 1], [2, 3]]
    assert sorted(map(len, into_bins([12, 1, 1], [12, 1, 1], 10))) == [1, 2]
    assert [len(part) for part in into_bins([1, 1, 1, 1], [1, 1, 1, 1], 100, least=2)] == [2, 2]


@pytest.mark.parametrize(("samples", "ranks"), [(64, 8), (256, 8), (512, 32)])
def test_on_log_normal_lengths_it_beats_greedy_and_round_robin(samples: int, ranks: int) -> None:
    """Responses of a reasoning model: median 3000 tokens, some at the limit of 32768."""
    lengths = np.minimum(np.random.default_rng(samples).lognormal(8.0, 0.8, samples), 32768).astype(int)
    costs = [cost(int(length), crossover(**QWEN_7B)) for length in lengths]
    round_robin = [list(range(rank, samples, ranks)) for rank in range(ranks)]
    ways = balanced(costs, ranks), greedy(costs, ranks), round_robin
    ours, theirs, naive = (imbalance(sums(costs, way)) for way in ways)
    assert ours <= theirs < naive
    best = max(1.0, max(costs) * ranks / math.fsum(costs))  # one sequence may cost more than a rank's share
    assert ours < 1.01 * best
    assert naive > 1.2


def test_attention_weighs_what_the_floating_point_operations_say() -> None:
    at = crossover(**QWEN_7B)
    layer = 2 * (3584 * 28 * 128 * 2 + 2 * 3584 * 4 * 128 + 3 * 3584 * 18944)  # multiply-adds of one token, twice
    assert at == pytest.approx((28 * layer + 2 * 3584 * 152064) / (28 * 2 * 28 * 128))
    assert cost(int(at), at) == pytest.approx(2 * at, rel=1e-3)
    assert cost(7) == 7.0
    assert imbalance([3.0, 1.0]) == 1.5
    assert imbalance([0.0, 0.0]) == 1.0
