"""From a packed microbatch to log-probs per token: padding, the model's call, and the way back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_fapo.batch.layout import Layout
from megatron_fapo.records import Floats, MicroBatch

ALONE = Layout()
Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Padded:
    """A microbatch as tensors: one row a sequence, padded at the end to the longest.

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
    places: Indices
    """[N] where those next tokens stand in the packed microbatch."""
    temperature: float
    real_tokens: int
    """Tokens before padding; counted by the first of the context-parallel ranks."""


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
    """Lay a packed microbatch out in rows, and take the part of context-parallel `rank`.

    `every_token` chooses all tokens that have a predecessor, instead of those with loss mask 1.
    """
    lengths = np.diff(batch.bounds)
    width = max(int(lengths.max()) - 1, 1)
    width += -width % layout.length_multiple
    starts = batch.bounds[:-1].astype(np.int64)
    column = columns_of(width, layout.cp, rank)
    index = np.minimum(starts[:, None] + column, len(batch.token_ids) - 1)
    inside = column < (lengths - 1)[:, None]
    tokens = np.where(column < lengths[:, None], batch.token_ids[index], 0)
    following = np.minimum(index + 1, len(batch.token_ids) - 1)
    chosen = np.flatnonzero(inside if every_token else inside & (batch.loss_mask[following] > 0))
    places = following.reshape(-1)[chosen]

    def tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(np.ascontiguousarray(values), dtype=dtype).to(device)

    return Padded(
        tokens=tensor(tokens, torch.long),
        positions=tensor(np.broadcast_to(column, tokens.shape), torch.long),
        chosen=tensor(chosen, torch.long),
        targets=tensor(batch.token_ids[places], torch.long),
        advantages=tensor(batch.advantages[places], torch.float32),
        behaviour=tensor(batch.logprobs[places], torch.float32),
        places=places,
        temperature=batch.temperature,
        real_tokens=len(batch.token_ids) if rank == 0 else 0,
    )


def unpad(values: torch.Tensor, padded: Padded, tokens: int) -> Floats:
    """Values [N] at the chosen tokens, put back into a packed array [tokens] with 0.0 elsewhere."""
    packed = np.zeros(tokens, np.float32)
    packed[padded.places] = values.detach().float().cpu().numpy()
    packed.setflags(write=False)
    return packed


def chosen_logprobs(logits: torch.Tensor, padded: Padded, vocabulary: int) -> torch.Tensor:
    """[N] log softmax(logits / temperature) at the chosen tokens, in float32.

    `logits` is [b, s, v], this rank's shard of the vocabulary under tensor parallelism; the shards are never
    gathered. Columns from `vocabulary` on are padding and take no probability.
    """
    rows = logits.reshape(-1, logits.shape[-1]).index_select(0, padded.chosen).float()
    if padded.temperature != 1.0:
        rows = rows / padded.temperature
    ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    surplus = ranks * rows.shape[-1] - vocabulary
    if surplus and rank == ranks - 1:
        mask = torch.zeros(rows.shape[-1], device=rows.device)
        mask[rows.shape[-1] - surplus :] = -torch.inf
        rows = rows + mask
    if ranks == 1:
        return -F.cross_entropy(rows, padded.targets, reduction="none")
    # it takes [s, b, v]; a column of one sequence serves
    losses: torch.Tensor = vocab_parallel_cross_entropy(rows.unsqueeze(1), padded.targets.unsqueeze(1))
    return -losses.squeeze(1)
