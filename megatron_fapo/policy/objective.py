"""From a microbatch and what the model says of it to the inputs of the loss."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_fapo.algorithm.losses import Sequences, Tokens
from megatron_fapo.policy.forward import Padded, Scores


def loss_tokens(scores: Scores, padded: Padded) -> Tokens:
    """The loss tokens of this rank's part of a microbatch."""
    return Tokens(
        logprobs=scores.logprobs,
        entropy=scores.entropy,
        behaviour=padded.behaviour,
        advantages=padded.advantages,
        reference=padded.reference,
        mismatch=torch.zeros_like(padded.behaviour) if padded.sampled is None else padded.behaviour - padded.sampled,
        sequences=Sequences(of=padded.sequences, lengths=padded.lengths, over_parts=_over_context),
    )


def _over_context(values: torch.Tensor) -> torch.Tensor:
    """Sums over the context-parallel ranks, each of which holds a part of every sequence. Collective."""
    if parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(values, group=parallel_state.get_context_parallel_group())
    return values
