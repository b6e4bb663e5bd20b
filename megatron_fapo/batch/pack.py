"""From groups and advantages to what the policy consumes: mini-batches of prompts, microbatches of sequences."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_fapo.batch.balance import balanced, cost, imbalance, into_bins
from megatron_fapo.batch.layout import Layout
from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.errors import DataError
from megatron_fapo.records import Floats, Group, Ints, Judged, MicroBatch, MiniBatch, StepBatch, floats, ints

Advantages = Sequence[Sequence[Floats | None]]
"""Per group, per rollout: [T], one a response token; None leaves the rollout out of the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedExample:
    """A prompt and the answer to learn.  Loss counts on the response alone."""

    id: str
    prompt_ids: Ints
    response_ids: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sequence:
    """A prompt with its response, as one row of the model's input."""

    id: str
    token_ids: Ints
    prompt: int
    """Tokens of the prompt."""
    advantages: Floats
    """[response]"""
    logprobs: Floats
    """[response]"""
    temperature: float
    version: int | None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def loss_tokens(self) -> int:
        """Tokens of the response."""
        return len(self) - self.prompt


def make_batch(
    groups: Sequence[Group], advantages: Advantages, layout: Layout, settings: BatchSettings, seed: int
) -> StepBatch:
    """All updates of one step.

    The groups are shuffled by (seed, step) and split into `settings.updates` mini-batches, fewer when there are
    fewer groups. `advantages` follow `groups`. Raises DataError when there is no group, when shapes disagree, or
    when temperatures differ.
    """
    if not groups:
        raise DataError("no group is left to train on")
    if len(groups) != len(advantages):
        raise DataError(f"{len(groups)} groups but advantages of {len(advantages)}")
    step = groups[0].step
    order = np.random.default_rng([seed, step]).permutation(len(groups))
    minibatches = []
    for part in np.array_split(order, min(settings.updates, len(groups))):
        chosen = [_sequences(groups[index], advantages[index]) for index in part]
        minibatches.append(_minibatch([s for group in chosen for s in group], layout, settings))
    return StepBatch(step=step, minibatches=tuple(minibatches))


def make_supervised_batch(examples: Iterable[SupervisedExample], layout: Layout, settings: BatchSettings) -> MiniBatch:
    """One optimizer step on (prompt, response) pairs. Raises DataError when there is nothing to learn."""
    sequences = []
    for example in examples:
        nothing = floats(np.zeros(len(example.response_ids)))
        sequences.append(
            _Sequence(
                id=example.id,
                token_ids=ints(np.concatenate([example.prompt_ids, example.response_ids])),
                prompt=len(example.prompt_ids),
                advantages=nothing,
                logprobs=nothing,
                temperature=1.0,
                version=None,
            )
        )
    return _minibatch(sequences, layout, settings.changed(skip_zero_advantage=False))


def _sequences(group: Group, advantages: Sequence[Floats | None]) -> list[_Sequence]:
    if len(group) != len(advantages):
        raise DataError(f"{len(group)} rollouts but advantages of {len(advantages)}", prompt=group.prompt.id)
    pairs = zip(group, advantages, strict=True)
    return [_sequence(group, judged, values) for judged, values in pairs if values is not None]


def _sequence(group: Group, judged: Judged, advantages: Floats) -> _Sequence:
    rollout = judged.rollout
    if len(advantages) != len(rollout.token_ids):
        tokens = len(rollout.token_ids)
        raise DataError(f"{len(advantages)} advantages for {tokens} response tokens", rollout=rollout.id)
    return _Sequence(
        id=rollout.id,
        token_ids=ints(np.concatenate([group.prompt.token_ids, rollout.token_ids])),
        prompt=len(group.prompt.token_ids),
        advantages=advantages,
        logprobs=rollout.logprobs,
        temperature=rollout.temperature,
        version=min((span.version for span in rollout.versions), default=group.step),
    )


def _minibatch(sequences: Sequence[_Sequence], layout: Layout, settings: BatchSettings) -> MiniBatch:
    num_loss_tokens = sum(sequence.loss_tokens for sequence in sequences)
    if num_loss_tokens == 0:
        raise DataError(f"no loss token in a mini-batch of {len(sequences)} sequences")
    temperatures = {sequence.temperature for sequence in sequences}
    if len(temperatures) > 1:
        raise DataError(f"rollouts of one mini-batch were drawn at temperatures {sorted(temperatures)}")
    working = _working(sequences) if settings.skip_zero_advantage else list(sequences)
    hands = _deal(working, layout)
    columns = [_cut(hand, layout, settings.tokens_per_microbatch) for hand in hands]
    rows = max(len(column) for column in columns)
    rows += -rows % layout.microbatch_multiple
    if layout.packed:
        columns = [_cut(hand, layout, settings.tokens_per_microbatch, least=rows) for hand in hands]
    columns = [_lengthen(column, rows) for column in columns]
    filler = min(sequences, key=len)
    return MiniBatch(
        microbatches=tuple(tuple(_pack(columns[dp][m], filler) for dp in range(layout.dp)) for m in range(rows)),
        num_loss_tokens=num_loss_tokens,
        num_sequences=sum(sequence.loss_tokens > 0 for sequence in sequences),
        imbalance=imbalance([sum(cost(len(s), layout.crossover) for s in hand) for hand in hands]),
    )


def _working(sequences: Sequence[_Sequence]) -> list[_Sequence]:
    """Sequences with a gradient; the shortest with a loss token where there is none, for a pass needs something."""
    working = [sequence for sequence in sequences if np.any(sequence.advantages)]
    return working or [min((s for s in sequences if s.loss_tokens), key=len)]


def _deal(sequences: Sequence[_Sequence], layout: Layout) -> list[list[_Sequence]]:
    """Sequences for each data-parallel rank, of nearly equal costs; a rank's own longest first."""
    ordered = sorted(sequences, key=lambda s: (-len(s), s.id))
    costs = [cost(len(sequence), layout.crossover) for sequence in ordered]
    return [[ordered[index] for index in part] for part in balanced(costs, layout.dp)]


def _cut(sequences: Sequence[_Sequence], layout: Layout, budget: int, least: int = 1) -> list[list[_Sequence]]:
    """Microbatches whose token positions, padding included, are within the budget; a longer sequence is alone.

    `sequences` come longest first. In rows, a microbatch holds neighbours in length, and its first says how many fit.
    Packed, any sequences go together, and the microbatches have nearly equal costs.
    """
    sizes = [len(sequence) + -len(sequence) % layout.length_multiple for sequence in sequences]
    if layout.packed:
        costs = [cost(len(sequence), layout.crossover) for sequence in sequences]
        bins = into_bins(sizes, costs, max(budget - budget % layout.total_multiple, 1), least)
        return [[sequences[index] for index in part] for part in bins]
    microbatches: list[list[_Sequence]] = []
    start = 0
    while start < len(sequences):
        fitting = max(1, budget // sizes[start])
        microbatches.append(list(sequences[start : start + fitting]))
        start += fitting
    return microbatches


def _lengthen(microbatches: list[list[_Sequence]], rows: int) -> list[list[_Sequence]]:
    """The same sequences in exactly `rows` microbatches: the largest are halved, then empty ones added."""
    result = list(microbatches)
    while len(result) < rows:
        largest = max(range(len(result)), key=lambda m: len(result[m]), default=None)
        if largest is None or len(result[largest]) < 2:
            result.append([])
        else:
            whole = result[largest]
            result[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return result


def _pack(sequences: Sequence[_Sequence], filler: _Sequence) -> MicroBatch:
    """Sequences end to end. Where there is none, one token of `filler` without loss keeps its rank in step."""
    if not sequences:
        return _filling(filler)
    lengths = [len(sequence) for sequence in sequences]
    return MicroBatch(
        ids=tuple(sequence.id for sequence in sequences),
        token_ids=ints(np.concatenate([sequence.token_ids for sequence in sequences])),
        bounds=ints(np.concatenate([[0], np.cumsum(lengths)])),
        loss_mask=_over_tokens(sequences, [np.ones(s.loss_tokens, np.float32) for s in sequences]),
        advantages=_over_tokens(sequences, [s.advantages for s in sequences]),
        logprobs=_over_tokens(sequences, [s.logprobs for s in sequences]),
        temperature=sequences[0].temperature,
        versions=ints([s.version for s in sequences if s.version is not None]),
    )


def _over_tokens(sequences: Sequence[_Sequence], values: Sequence[Floats]) -> Floats:
    """Values over responses, with zeros over the prompts before them."""
    parts = [part for s, row in zip(sequences, values, strict=True) for part in (np.zeros(s.prompt), row)]
    return floats(np.concatenate(parts))


def _filling(filler: _Sequence) -> MicroBatch:
    zero = floats([0.0])
    return MicroBatch(
        ids=("",),
        token_ids=filler.token_ids[:1],
        bounds=ints([0, 1]),
        loss_mask=zero,
        advantages=zero,
        logprobs=zero,
        temperature=filler.temperature,
    )
