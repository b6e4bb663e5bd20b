"""From a packed microbatch to log-probs per token: padding, the model's call, and the way back."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_fapo.batch.layout import Layout
from megatron_fapo.policy.logprobs import Projection, token_logprobs
from megatron_fapo.records import Floats, MicroBatch

ALONE = Layout()
Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Padded:
    """A microbatch as tensors: one row a sequence, padded at the end to the longest, or all sequences in one row.

    Under context parallelism this rank's two chunks of each row, and the chosen tokens whose inputs lie in them.
    """

    tokens: torch.Tensor
    """[b, s] inputs: every token but the last of each sequence."""
    positions: torch.Tensor
    """[b, s]"""
    chosen: torch.Tensor
    """[N] indices into b * s: inputs whose next token counts."""
    targets: torch.Tensor
    """[N] those next tokens."""
    advantages: torch.Tensor
    """[N]"""
    behaviour: torch.Tensor
    """[N] log-probs under the behaviour policy."""
    sequences: torch.Tensor
    """[N] the sequence that each chosen token stands in."""
    lengths: torch.Tensor
    """[b] loss tokens of each whole sequence, over all context-parallel ranks."""
    reference: torch.Tensor | None
    """[N] log-probs under the reference policy, where they were computed."""
    sampled: torch.Tensor | None
    """[N] the engine's log-probs, where Megatron's own stand in `behaviour` in their place."""
    places: Indices
    """[N] where those next tokens stand in the packed microbatch."""
    temperature: float
    real_tokens: int
    """Inputs before padding: one less than tokens for each sequence; of them, those of this context-parallel rank."""
    bounds: torch.Tensor | None
    """[n + 1] where the sequences of a packed row begin and end, over all context-parallel ranks; None for rows."""

    def packing(self) -> PackedSeqParams | None:
        """The same as Megatron's attention takes it.  Padding at the end of a sequence is part of it: nothing before
        sees it."""
        if self.bounds is None:
            return None
        longest = int(self.bounds.diff().max())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.bounds,
            cu_seqlens_kv=self.bounds,
            cu_seqlens_q_padded=self.bounds,
            cu_seqlens_kv_padded=self.bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model says of the chosen tokens, in float32 and with gradient."""

    logprobs: torch.Tensor
    """[N] log softmax(logits / temperature) at the token."""
    entropy: torch.Tensor
    """[N] entropy of that softmax, in nats; zeros where it is not computed."""


def columns_of(width: int, ranks: int, rank: int) -> Indices:
    """Columns of a row of `width` that a context-parallel rank holds: chunks `rank` and `2 ranks - 1 - rank` of
    2 ranks equal ones, so that causal attention costs all ranks the same. `width` is a multiple of 2 ranks."""
    column = np.arange(width)
    if ranks == 1:
        return column
    chunks = column.reshape(2 * ranks, -1)
    return chunks[[rank, 2 * ranks - 1 - rank]].reshape(-1)


def pad(
    batch: MicroBatch, device: torch.device, every_token: bool = False, layout: Layout = ALONE, rank: int = 0
) -> Padded:
    """Lay a packed microbatch out as the layout says, and take the part of context-parallel `rank`.

    `every_token` chooses all tokens that have a predecessor, instead of those with loss mask 1.
    """
    lengths = np.diff(batch.bounds)
    starts = batch.bounds[:-1].astype(np.int64)
    row, column, shape, bounds = (_end_to_end if layout.packed else _in_rows)(lengths, layout, rank)
    lengths_of, starts_of = (np.append(values, 0)[row] for values in (lengths, starts))  # the last: nobody's padding
    index = np.minimum(starts_of + column, len(batch.token_ids) - 1)
    inside = column < lengths_of - 1
    tokens = np.where(column < lengths_of, batch.token_ids[index], 0).reshape(shape)
    following = np.minimum(index + 1, len(batch.token_ids) - 1)
    chosen = np.flatnonzero(inside if every_token else inside & (batch.loss_mask[following] > 0))
    places = following[chosen]

    def tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(np.ascontiguousarray(values), dtype=dtype).to(device)

    return Padded(
        tokens=tensor(tokens, torch.long),
        positions=tensor(column.reshape(shape), torch.long),
        chosen=tensor(chosen, torch.long),
        targets=tensor(batch.token_ids[places], torch.long),
        advantages=tensor(batch.advantages[places], torch.float32),
        behaviour=tensor(batch.logprobs[places], torch.float32),
        sequences=tensor(row[chosen], torch.long),
        lengths=tensor(np.add.reduceat(batch.loss_mask, starts), torch.long),
        reference=None,
        sampled=None,
        places=places,
        temperature=batch.temperature,
        real_tokens=int(inside.sum()),
        bounds=None if bounds is None else tensor(bounds, torch.int32),
    )


Places = tuple[Indices, Indices, tuple[int, int], Indices | None]
"""Of each position of this rank: its sequence and its column there; the shape of all; bounds where they are packed."""


def _in_rows(lengths: Indices, layout: Layout, rank: int) -> Places:
    """A row for each sequence, all as wide as the longest needs."""
    width = max(int(lengths.max()) - 1, 1)
    width += -width % layout.width_multiple(len(lengths))
    column = columns_of(width, layout.cp, rank)
    row = np.arange(len(lengths)).repeat(len(column))
    return row, np.tile(column, len(lengths)), (len(lengths), len(column)), None


def _end_to_end(lengths: Indices, layout: Layout, rank: int) -> Places:
    """One row, each sequence padded to what context and sequence parallelism cut, and then what the total lacks.

    That last padding is a sequence of its own, without loss: as part of a real one it would change its gradients
    under FP8 (Transformer Engine, issue 2892).
    """
    widths = np.maximum(lengths - 1, 1)
    widths += -widths % layout.length_multiple
    lacking = -int(widths.sum()) % math.lcm(layout.length_multiple, layout.total_multiple)
    if lacking:
        widths = np.append(widths, lacking)
    columns = [columns_of(int(width), layout.cp, rank) for width in widths]
    row = np.arange(len(widths)).repeat([len(column) for column in columns])
    return row, np.concatenate(columns), (1, len(row)), np.append(0, np.cumsum(widths))


def unpad(values: torch.Tensor, padded: Padded, tokens: int) -> Floats:
    """Values [N] at the chosen tokens, put back into a packed array [tokens] with 0.0 elsewhere."""
    packed = np.zeros(tokens, np.float32)
    packed[padded.places] = values.detach().float().cpu().numpy()
    packed.setflags(write=False)
    return packed


@contextmanager
def hidden_states(module: Any) -> Iterator[None]:
    """Inside, a GPTModel's last stage returns hidden states after the final norm, [s, b, h], and no logits."""
    last = module.post_process
    module.post_process = False
    try:
        yield
    finally:
        module.post_process = last


def scores(hidden: torch.Tensor, padded: Padded, module: Any, projection: Projection) -> Scores:
    """Log-probs and entropies at the chosen tokens, from the hidden states [s, b, h] of the last stage.

    Under sequence parallelism s is this rank's part, and is gathered here. `projection` without temperature and
    ranks, which are the microbatch's and Megatron's.
    """
    config = module.config
    if config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    s, b, h = hidden.shape
    places = padded.chosen % s * b + padded.chosen // s  # `chosen` counts along rows, [b, s]
    split = parallel_state.get_tensor_model_parallel_world_size() > 1
    shared = module.share_embeddings_and_output_weights
    logprobs, entropy = token_logprobs(
        hidden.reshape(s * b, h).index_select(0, places),
        module.shared_embedding_or_output_weight() if shared else module.output_layer.weight,
        padded.targets,
        replace(
            projection,
            temperature=padded.temperature,
            group=parallel_state.get_tensor_model_parallel_group() if split else None,
            sum_hidden_gradient=not config.sequence_parallel,
        ),
    )
    return Scores(logprobs=logprobs, entropy=entropy)
