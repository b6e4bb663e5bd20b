"""Memory that was given away and taken back: the same tensors to the last bit, and really free in between."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_fapo.errors import PolicyError
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import PolicySettings
from megatron_fapo.trace import KINDS
from tests.policy.lives import LOSS, export, policy_settings, save_tiny, scores, step_batch

Process = Callable[[PolicySettings], LocalRanks]


def life(ranks: LocalRanks, away: Sequence[Sequence[str]]) -> tuple[list[object], dict[str, np.ndarray]]:
    """Three updates, what `away` names out and back before each; the reports without time, and the log-probs after."""
    reports = []
    for step, kinds in enumerate(away):
        if kinds:
            freed = ranks.call("offload", kinds)
            assert ranks.call("onload", kinds) == freed
        reports.append(ranks.call("update", step_batch(step, ranks.layout), LOSS)[0].updates)
    return reports, scores(ranks, step_batch(3, ranks.layout))


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_are_equal_to_the_last_digit(process: Process, qwen3: Path, dtype: str) -> None:
    settings = policy_settings(qwen3).changed(dtype=dtype)
    lives, weights = [], []
    for away in ([(), (), ()], [KINDS, ["optimizer"], ["gradients", "parameters"]]):
        ranks = process(settings)
        lives.append(life(ranks, away))
        weights.append(export(ranks).tensors if dtype == "float32" else {})
    assert lives[0][0] == lives[1][0]
    assert same(lives[0][1], lives[1][1])
    assert same(*weights)


@pytest.mark.long
def test_updates_of_two_data_parallel_ranks_are_equal_too(qwen3: Path) -> None:
    lives = []
    for away in ([(), (), ()], [KINDS, ["optimizer"], KINDS]):
        with LocalRanks(policy_settings(qwen3, data=2), seed=5) as ranks:
            lives.append(life(ranks, away))
    assert lives[0][0] == lives[1][0]
    assert same(lives[0][1], lives[1][1])


def test_the_memory_is_free_while_they_are_away(process: Process, tmp_path: Path) -> None:
    folder = save_tiny("Qwen3", tmp_path / "wide", vocab_size=60000, hidden_size=192, head_dim=16)
    ranks = process(policy_settings(folder))
    ranks.call("update", step_batch(0, ranks.layout), LOSS)
    rank = psutil.Process(ranks._processes[0].pid)
    parameters = sum(tensor.nbytes for tensor in export(ranks, 50_000_000).tensors.values())
    ranks.call("offload", [])  # give back what the update and the export left
    before = rank.memory_info().rss
    seen = {kind: (ranks.call("offload", [kind])[0][kind], rank.memory_info().rss) for kind in KINDS}
    assert {kind: freed / parameters for kind, (freed, _) in seen.items()} == pytest.approx(
        {"parameters": 1, "gradients": 1, "optimizer": 2}, rel=1e-3
    )
    for freed, after in seen.values():
        assert before - after == pytest.approx(freed, rel=0.1)
        before = after
    ranks.call("onload")
    assert rank.memory_info().rss - before == pytest.approx(4 * parameters, rel=0.1)


def test_a_verb_that_needs_what_is_away_says_so(process: Process, qwen3: Path, tmp_path: Path) -> None:
    settings = policy_settings(qwen3)
    batch = step_batch(0, process(settings).layout)
    for kinds, verb, arguments in (
        (["parameters"], "score", [batch.minibatches[0].microbatches]),
        (["parameters"], "open_export", []),
        (["gradients"], "update", [batch, LOSS]),
        (["optimizer"], "save", [str(tmp_path / "checkpoint")]),
    ):
        ranks = process(settings)
        ranks.call("offload", kinds)
        assert ranks.call("offload", kinds)[0] == {kinds[0]: 0}
        with pytest.raises(PolicyError, match=f"{kinds[0]} are offloaded; call onload"):
            ranks.call(verb, *arguments)
    ranks = process(settings)
    ranks.call("offload", ["gradients", "optimizer"])
    assert ranks.call("score", batch.minibatches[0].microbatches)
