"""Sequences end to end in one row are the same sequences in rows: log-probs, losses, gradients, and nobody else's."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.batch.layout import Layout
from megatron_fapo.errors import ConfigError
from megatron_fapo.policy.forward import pad
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import PolicySettings
from megatron_fapo.records import MiniBatch, StepBatch, ints
from tests.policy.lives import LOSS, VOCABULARY, export, policy_settings, scores, step_batch
from tests.policy.test_padding import micro

Process = Callable[[PolicySettings], LocalRanks]
CPU = torch.device("cpu")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 15), min_size=1, max_size=6),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 16]),
)
def test_every_input_once_in_its_own_sequence_and_totals_aligned(
    lengths: list[int], cp: int, tp: int, total: int
) -> None:
    batch = micro(lengths)
    layout = Layout(cp=cp, tp=tp, sp=tp > 1, packed=True, total_multiple=total)
    parts = [pad(batch, CPU, layout=layout, rank=rank) for rank in range(cp)]
    bounds = parts[0].bounds
    assert bounds is not None
    assert all(torch.equal(part.bounds, bounds) for part in parts)
    sizes = bounds.diff().numpy()
    assert (sizes % layout.length_multiple == 0).all()
    assert bounds[-1] % total == 0
    assert len(sizes) - len(lengths) in (0, 1)  # what the total lacks is a sequence of its own
    assert (sizes[: len(lengths)] >= np.array(lengths) - 1).all()
    assert (sizes[: len(lengths)] - np.array(lengths) + 1 < layout.length_multiple + (np.array(lengths) == 1)).all()
    assert [tuple(part.tokens.shape) for part in parts] == [(1, int(bounds[-1]) // cp)] * cp
    assert sum(part.real_tokens for part in parts) == sum(lengths) - len(lengths)
    places = np.sort(np.concatenate([part.places for part in parts]))
    assert places.tolist() == np.flatnonzero(batch.loss_mask).tolist()
    for part in parts:
        inputs, positions = part.tokens[0, part.chosen], part.positions[0, part.chosen]
        assert torch.equal(inputs + 1, part.targets)  # tokens count upwards
        assert torch.equal(inputs - positions, torch.tensor(batch.bounds[:-1] + 1)[part.sequences])


def packed(settings: PolicySettings, **changes: Any) -> PolicySettings:
    return settings.changed(sequences="packed", **changes)


@pytest.mark.parametrize(
    "changes", [{}, {"recompute": "selective"}, {"recompute": "full"}], ids=["plain", "selective", "full"]
)
def test_one_rank_gives_what_rows_give(process: Process, qwen3: Path, changes: dict[str, Any]) -> None:
    seen = []
    for chosen in (policy_settings(qwen3), packed(policy_settings(qwen3), **changes)):
        ranks = process(chosen)
        found = scores(ranks, step_batch(0, ranks.layout, skip_zero_advantage=False))
        reports = [ranks.call("update", step_batch(step, ranks.layout), LOSS)[0].updates[0] for step in range(3)]
        seen.append((found, reports, export(ranks).tensors))
    (rows, rows_reports, rows_weights), (ours, reports, weights) = seen
    assert rows.keys() == ours.keys()
    for name, values in rows.items():
        np.testing.assert_allclose(ours[name], values, atol=1e-5)
    for a, b in zip(reports, rows_reports, strict=True):
        assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-5)
        assert a.tokens == a.padded_tokens == b.tokens < b.padded_tokens
    for name, tensor in rows_weights.items():
        np.testing.assert_allclose(weights[name], tensor, atol=1e-5)


@pytest.mark.parametrize(
    "parallel", [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {"data": 2}], ids=["tp2 sp", "pp2", "dp2"]
)
@pytest.mark.long
def test_other_layouts_give_what_rows_give(process: Process, qwen3: Path, parallel: dict[str, Any]) -> None:
    one = process(policy_settings(qwen3))
    expected = [one.call("update", step_batch(step, one.layout), LOSS)[0].updates[0] for step in range(3)]
    with LocalRanks(packed(policy_settings(qwen3, **parallel)), seed=5) as ranks:
        assert ranks.layout.packed
        reports = [ranks.call("update", step_batch(step, ranks.layout), LOSS)[0].updates[0] for step in range(3)]
    for a, b in zip(reports, expected, strict=True):
        assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-5)


def test_one_sample_changed_leaves_the_others_as_they_are(process: Process, qwen3: Path) -> None:
    ranks = process(packed(policy_settings(qwen3)))
    batch = step_batch(0, ranks.layout, skip_zero_advantage=False)
    (mini,) = batch.minibatches
    first = mini.microbatches[0][0]
    assert len(first.ids) > 2
    tokens = first.token_ids.copy()
    part = slice(first.bounds[1], first.bounds[2])
    tokens[part] = (tokens[part] + 7) % VOCABULARY
    other = dataclasses.replace(first, token_ids=ints(tokens))
    changed = dataclasses.replace(mini, microbatches=((other,), *mini.microbatches[1:]))
    before, after = scores(ranks, batch), scores(ranks, with_mini(batch, changed))
    assert not np.array_equal(before[first.ids[1]], after[first.ids[1]])
    assert all(np.array_equal(before[name], after[name]) for name in before if name != first.ids[1])


def with_mini(batch: StepBatch, mini: MiniBatch) -> StepBatch:
    return dataclasses.replace(batch, minibatches=(mini,))


def test_context_parallel_ranks_need_rows_here(qwen3: Path) -> None:
    with pytest.raises(ConfigError, match=r"sequences = packed with .* needs Transformer Engine"):
        LocalRanks(packed(policy_settings(qwen3, context=2)), seed=5)
