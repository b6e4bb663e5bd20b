"""Forward and backward passes over the microbatches of a rank, through Megatron's pipeline schedule."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model

from megatron_fapo.algorithm.losses import TokenLosses
from megatron_fapo.compat.device import here
from megatron_fapo.policy.forward import Padded, Scores, hidden_states, scores
from megatron_fapo.policy.model import Model
from megatron_fapo.records import Floats, floats

LossFunction = Callable[[Scores, Padded], TokenLosses]
"""From log-probs and entropies [N] of the chosen tokens to their losses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over the loss tokens of a mini-batch that went through the model, over all ranks."""

    loss: float
    clipped: float
    kl: float
    entropy: float
    reference_kl: float
    truncated: float
    chosen: int
    """Loss tokens that went through the model."""
    mismatch: float
    """Sum of |behaviour - current log-prob|."""
    mismatch_max: float
    tokens: int
    positions: int
    """Token positions computed, padding included."""


def forward_backward(model: Model, microbatches: Sequence[Padded], loss_function: LossFunction, divisor: int) -> Totals:
    """Accumulate the gradient of sum(loss) / divisor over all ranks. Collective.

    The division by what the *global* mini-batch has happens here, in each microbatch's own loss; Megatron then only
    sums gradients, so the result does not depend on how sequences were dealt to ranks.
    """

    def loss(padded: Padded, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = scores(hidden, padded, model.chunks[-1], model.projection)
        losses = loss_function(found, padded)
        with torch.no_grad():
            gap = (found.logprobs - padded.behaviour).abs()
            each = [losses.loss, losses.clipped, losses.kl, found.entropy, losses.reference_kl, losses.truncated, gap]
            seen = torch.stack([*(values.sum() for values in each), gap.max() if len(gap) else gap.sum()])
        return losses.loss.sum() / divisor, _ONE, seen

    seen = _schedule(model, microbatches, loss, forward_only=False)
    return _totals(seen, microbatches)


@torch.no_grad()
def logprobs(model: Model, microbatches: Sequence[Padded]) -> list[torch.Tensor]:
    """Log-probs [N] of the chosen tokens of each microbatch, on every stage of the pipeline. Collective."""

    projection = replace(model.projection, entropy=False)

    def keep(padded: Padded, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values = scores(hidden, padded, model.chunks[-1], projection).logprobs
        return values.new_zeros(()), _ONE, values

    found = _schedule(model, microbatches, keep, forward_only=True)
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return found
    everywhere = found or [padded.behaviour.clone() for padded in microbatches]
    for values in everywhere:
        _broadcast_from_last_stage(values)
    return everywhere


_ONE = torch.tensor(1, dtype=torch.int)
"""Megatron's per-token protocol wants a token count; ours is in the loss already."""


def _schedule(
    model: Model, microbatches: Sequence[Padded], loss: Callable[..., Any], forward_only: bool
) -> list[torch.Tensor]:
    def step(batches: Iterator[Padded], part: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        padded = next(batches)
        with hidden_states(unwrap_model(part)):
            output = part(padded.tokens, padded.positions, None, packed_seq_params=padded.packing())
        return output, partial(loss, padded)

    rows, width = microbatches[0].tokens.shape
    found: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(microbatches) for _ in model.parallel],
        model=list(model.parallel),
        num_microbatches=len(microbatches),
        seq_length=width,  # with variable_seq_lengths stages tell each other the true shapes
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    return found


def _totals(seen: Sequence[torch.Tensor], microbatches: Sequence[Padded]) -> Totals:
    """Sum what the last stage saw over data- and context-parallel ranks; every rank returns the same."""
    row = torch.zeros(11, dtype=torch.float64, device=microbatches[0].tokens.device)
    if seen:
        table = torch.stack(list(seen)).double()
        row[:7], row[7] = table[:, :7].sum(0), table[:, 7].max()
    row[8] = sum(len(padded.chosen) for padded in microbatches)
    row[9] = sum(padded.real_tokens for padded in microbatches)
    row[10] = sum(padded.tokens.numel() for padded in microbatches)
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    rows = [torch.empty_like(row) for _ in range(ranks)]
    if ranks > 1:
        dist.all_gather(rows, row, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    else:
        rows = [row]
    table = torch.stack(rows)
    _broadcast_from_last_stage(table)
    loss, clipped, kl, entropy, reference_kl, truncated, mismatch, _, chosen, tokens, positions = table.sum(0).tolist()
    return Totals(
        loss=loss,
        clipped=clipped,
        kl=kl,
        entropy=entropy,
        reference_kl=reference_kl,
        truncated=truncated,
        chosen=int(chosen),
        mismatch=mismatch,
        mismatch_max=float(table[:, 7].max()),
        tokens=int(tokens),
        positions=int(positions),
    )


def whole(packed: Floats) -> Floats:
    """Values over a packed microbatch, each found by one context-parallel rank and 0 on the others. Collective."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return packed
    values = torch.tensor(packed, device=here())
    dist.all_reduce(values, group=parallel_state.get_context_parallel_group())
    return floats(values.cpu().numpy())


def _broadcast_from_last_stage(values: torch.Tensor) -> None:
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(values, src=last, group=parallel_state.get_pipeline_model_parallel_group())


def mismatch(values: Sequence[torch.Tensor], microbatches: Sequence[Padded]) -> tuple[float, float]:
    """Mean and largest |behaviour - current log-prob| over the loss tokens of all ranks. Collective.

    `values` are the current log-probs of the chosen tokens of this rank's `microbatches`.
    """
    gaps = torch.cat([(row - padded.behaviour).abs() for row, padded in zip(values, microbatches, strict=True)])
    sums = torch.tensor([float(gaps.double().sum()), float(len(gaps))], dtype=torch.float64, device=gaps.device)
    largest = gaps.max() if len(gaps) else gaps.sum()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(sums, group=group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return float(sums[0]) / max(float(sums[1]), 1.0), float(largest)
