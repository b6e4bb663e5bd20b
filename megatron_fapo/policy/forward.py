"""From a packed microbatch to log-probs per token: padding, the model's call, and the way back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_fapo.batch.layout import Layout
from megatron_fapo.policy.logprobs import Projection, token_logprobs
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
    sequences: torch.Tensor
    """[N] the row that each chosen token stands in."""
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
    """Lay a packed microbatch out in rows, and take the part of context-parallel `rank`.

    `every_token` chooses all tokens that have a predecessor, instead of those with loss mask 1.
    """
    lengths = np.diff(batch.bounds)
    width = max(int(lengths.max()) - 1, 1)
    width += -width % layout.width_multiple(len(lengths))
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
        sequences=tensor(chosen // tokens.shape[1], torch.long),
        lengths=tensor(np.add.reduceat(batch.loss_mask, starts), torch.long),
        reference=None,
        sampled=None,
        places=places,
        temperature=batch.temperature,
        real_tokens=int(inside.sum()),
    )


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
