"""Packing: nothing lost, nothing doubled, everything aligned, whatever the layout."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.batch.balance import cost
from megatron_fapo.batch.layout import Layout
from megatron_fapo.batch.pack import SupervisedExample, make_batch, make_supervised_batch
from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.errors import DataError
from megatron_fapo.records import (
    Floats,
    Group,
    Judged,
    MicroBatch,
    MiniBatch,
    NotJudged,
    Outcome,
    Prompt,
    Rollout,
    StepBatch,
    VersionSpan,
    floats,
    ints,
)

STEP = 4


def group(number: int, prompt: int, responses: Sequence[int], temperature: float = 1.0) -> Group:
    """A group whose tokens say where they belong: token t of rollout r is 100 * r + t, its log-prob -token."""
    judged = []
    for r, length in enumerate(responses):
        tokens = [100 * r + t for t in range(length)]
        rollout = Rollout(
            id=f"s{STEP}-p{number}-r{r}",
            prompt_id=f"p{number}",
            token_ids=ints(tokens),
            logprobs=floats([-float(token) for token in tokens]),
            versions=(VersionSpan(start=0, version=STEP - 1), VersionSpan(start=1, version=STEP)),
            temperature=temperature,
            seed=0,
            text="",
            finish_reason="stop",
        )
        outcome = Outcome(right=True, score=1.0, answer=None, why="equal")
        judged.append(Judged(rollout=rollout, outcome=outcome, verdict=NotJudged(reason="off"), oracle=None))
    token_ids = ints(range(1000 * number, 1000 * number + prompt))
    whole = Prompt(id=f"p{number}", task="t", question="", messages=(), token_ids=token_ids, reference_answer="")
    return Group(step=STEP, prompt=whole, judged=tuple(judged))


def ones(groups: Sequence[Group], zero: frozenset[str] = frozenset()) -> list[list[Floats]]:
    """Advantage 1 + t at token t, 0 for the rollouts in `zero`."""
    return [[floats((np.arange(len(j.rollout.token_ids)) + 1) * (j.rollout.id not in zero)) for j in g] for g in groups]


def micros(batch: StepBatch) -> list[MicroBatch]:
    return [micro for mini in batch.minibatches for row in mini.microbatches for micro in row]


def sequences(minibatch: MiniBatch) -> Counter[str]:
    return Counter(name for row in minibatch.microbatches for micro in row for name in micro.ids if name)


shapes = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 40), min_size=2, max_size=5)), min_size=1, max_size=7
)


layouts = st.builds(Layout, dp=st.integers(1, 3), cp=st.sampled_from([1, 2]), packed=st.booleans())


@settings(max_examples=100, deadline=None)
@given(shapes, layouts, st.integers(1, 4), st.integers(1, 120), st.integers(0, 5))
def test_every_rollout_once_aligned_and_counted(
    shapes: list[tuple[int, list[int]]], layout: Layout, updates: int, budget: int, seed: int
) -> None:
    groups = [group(n, prompt, responses) for n, (prompt, responses) in enumerate(shapes)]
    chosen = BatchSettings(updates=updates, tokens_per_microbatch=budget)
    batch = make_batch(groups, ones(groups), layout, chosen, seed)

    seen = sum((sequences(mini) for mini in batch.minibatches), Counter())
    assert seen == Counter(j.rollout.id for g in groups for j in g)
    assert len(batch.minibatches) == min(updates, len(groups))
    by_id = {j.rollout.id: (g, j.rollout) for g in groups for j in g}
    for mini in batch.minibatches:
        assert all(len(row) == layout.dp for row in mini.microbatches)
        masks = [micro.loss_mask.sum() for row in mini.microbatches for micro in row]
        assert mini.num_loss_tokens == sum(masks)
    for micro in micros(batch):
        lengths = np.diff(micro.bounds)
        padded = lengths + -lengths % layout.length_multiple
        assert len(lengths) == 1 or (padded.sum() if layout.packed else padded.max() * len(lengths)) <= budget
        for name, start, end in zip(micro.ids, micro.bounds, micro.bounds[1:], strict=False):
            if not name:
                assert (end - start, micro.loss_mask.sum()) == (1, 0)
                continue
            g, rollout = by_id[name]
            prompt = len(g.prompt.token_ids)
            assert micro.token_ids[start:end].tolist() == [*g.prompt.token_ids, *rollout.token_ids]
            assert micro.loss_mask[start:end].tolist() == [0.0] * prompt + [1.0] * len(rollout.token_ids)
            assert micro.logprobs[start + prompt : end].tolist() == rollout.logprobs.tolist()
            assert micro.advantages[start + prompt : end].tolist() == [t + 1 for t in range(len(rollout.token_ids))]
            assert not micro.advantages[start : start + prompt].any()


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(1, 3), st.data())
def test_skipping_zero_advantages_keeps_the_count_and_loses_nothing_else(
    shapes: list[tuple[int, list[int]]], dp: int, data: st.DataObject
) -> None:
    groups = [group(n, prompt, responses) for n, (prompt, responses) in enumerate(shapes)]
    names = [j.rollout.id for g in groups for j in g]
    zero = frozenset(data.draw(st.sets(st.sampled_from(names))))
    whole = BatchSettings(updates=2, skip_zero_advantage=False)
    full = make_batch(groups, ones(groups, zero), Layout(dp=dp), whole, 1)
    lean = make_batch(groups, ones(groups, zero), Layout(dp=dp), whole.changed(skip_zero_advantage=True), 1)
    for with_all, without in zip(full.minibatches, lean.minibatches, strict=True):
        assert without.num_loss_tokens == with_all.num_loss_tokens
        working = set(sequences(with_all)) - zero
        assert set(sequences(without)) == working or (not working and len(sequences(without)) == 1)


def test_prompts_stay_together_and_their_order_follows_seed_and_step() -> None:
    groups = [group(n, 3, [2, 2]) for n in range(8)]

    def prompts(seed: int, step: int = STEP) -> list[set[str]]:
        moved = [dataclasses.replace(g, step=step) for g in groups]
        batch = make_batch(moved, ones(groups), Layout(), BatchSettings(updates=4), seed)
        return [{name.split("-")[1] for name in sequences(mini)} for mini in batch.minibatches]

    assert [len(part) for part in prompts(0)] == [2, 2, 2, 2]
    assert prompts(0) == prompts(0)
    assert prompts(0) != prompts(1)
    assert prompts(0) != prompts(0, step=STEP + 1)


@pytest.mark.parametrize("packed", [False, True])
def test_data_parallel_ranks_get_like_work(packed: bool) -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 64).tolist()
    groups = [group(0, 5, lengths)]
    layout = Layout(dp=4, packed=packed, crossover=100.0)
    (mini,) = make_batch(groups, ones(groups), layout, BatchSettings(tokens_per_microbatch=800), 0).minibatches
    columns = list(zip(*mini.microbatches, strict=True))
    work = [sum(cost(int(n), 100.0) for m in column for n in np.diff(m.bounds)) for column in columns]
    assert max(work) / np.mean(work) == pytest.approx(mini.imbalance)
    assert mini.imbalance < 1.01
    every = [micro for column in columns for micro in column]
    if packed:
        assert max(len(micro.token_ids) for micro in every) <= 800
        costs = [sum(cost(int(n), 100.0) for n in np.diff(micro.bounds)) for micro in every]
        assert max(costs) / np.mean(costs) < 1.2
    else:
        padded = sum(np.diff(m.bounds).max() * len(m.ids) for m in every)
        assert padded / sum(len(m.token_ids) for m in every) < 1.25  # in the order given it would be 1.9


def test_oldest_version_travels() -> None:
    groups = [group(0, 2, [3, 3])]
    (micro,) = micros(make_batch(groups, ones(groups), Layout(), BatchSettings(), 0))
    assert micro.versions.tolist() == [STEP - 1, STEP - 1]


def test_supervised_examples_learn_the_response_alone() -> None:
    examples = [SupervisedExample(id=f"e{n}", prompt_ids=ints([7] * n), response_ids=ints([9] * 3)) for n in (1, 2)]
    batch = make_supervised_batch(examples, Layout(), BatchSettings())
    ((micro,),) = batch.microbatches
    assert batch.num_loss_tokens == 6
    assert (micro.token_ids == np.where(micro.loss_mask > 0, 9, 7)).all()
    assert Counter(micro.ids) == Counter(["e1", "e2"])


def test_what_cannot_be_a_batch_is_refused_by_name() -> None:
    groups = [group(0, 2, [3, 3])]
    with pytest.raises(DataError, match="no group"):
        make_batch([], [], Layout(), BatchSettings(), 0)
    with pytest.raises(DataError, match=r"2 advantages for 3 response tokens \(rollout s4-p0-r1\)"):
        make_batch(groups, [[floats([1, 1, 1]), floats([1, 1])]], Layout(), BatchSettings(), 0)
    mixed = [groups[0], group(1, 2, [3, 3], temperature=0.5)]
    with pytest.raises(DataError, match=r"temperatures \[0.5, 1.0\]"):
        make_batch(mixed, ones(mixed), Layout(), BatchSettings(), 0)
    with pytest.raises(DataError, match="no loss token"):
        make_supervised_batch([], Layout(), BatchSettings())


def test_what_is_left_out_of_the_loss_is_not_counted_and_what_is_skipped_is() -> None:
    """None leaves a rollout out for good; an advantage of 0 only spares the pass. An empty response is no sequence."""
    groups = [group(0, 3, [4, 2, 0]), group(1, 3, [5, 1])]
    advantages: list[list[Floats | None]] = [list(row) for row in ones(groups, frozenset({f"s{STEP}-p0-r0"}))]
    advantages[1][0] = None
    batch = make_batch(groups, advantages, Layout(), BatchSettings(), seed=1)
    (minibatch,) = batch.minibatches
    assert set(sequences(minibatch)) == {f"s{STEP}-p0-r1", f"s{STEP}-p1-r1"}
    assert minibatch.num_sequences == 3
    assert minibatch.num_loss_tokens == 4 + 2 + 1
