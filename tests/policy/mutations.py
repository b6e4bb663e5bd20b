"""Deliberate bugs of parallel training, each a small change of a running rank, and what of the matrix sees it.

A mutation is applied in every rank's process before its setup (`before`, to modules) or after it (`after`, to the
rank), and taken back when the layout is left. `seen_in` are exactly the quantities by which three mutated updates
differ from those of one rank; the others stay equal, which is why they alone are not enough.
"""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SCALE = frozenset({"gradient norm", "gradients"})
"""What sees a gradient of the wrong size alone: clipping hides it from the weights, and so from later losses."""
TRAINING = frozenset({"loss", "gradient norm", "gradients", "weights"})
"""What sees a wrong gradient."""
EVERYTHING = TRAINING | {"log-probs"}
"""What sees a wrong forward pass."""


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A bug, a layout in which it matters, and what sees it."""

    what: str
    layout: dict[str, Any]
    sparse: bool = False
    """Whether the model is the mixture of experts."""
    seen_in: frozenset[str]
    before: Callable[[Any], None] = field(default=lambda patch: None)
    """Gets a pytest.MonkeyPatch."""
    after: Callable[[Any], None] = field(default=lambda rank: None)
    """Gets the rank, set up."""


def _scale_dense(rank: Any) -> None:
    for chunk in rank.model.parallel:
        for group in chunk.bucket_groups:
            for bucket in group.buckets:
                bucket.gradient_scaling_factor = 0.5


def _scale_experts(rank: Any) -> None:
    for chunk in rank.model.parallel:
        for group in chunk.expert_parallel_bucket_groups:
            for bucket in group.buckets:
                bucket.gradient_scaling_factor = 0.5


def _no_data_reduction(rank: Any) -> None:
    for chunk in rank.model.parallel:
        for group in chunk.bucket_groups:
            group.start_grad_sync = group.finish_grad_sync = lambda *args, **kwargs: None


def _same_column(patch: Any) -> None:
    from megatron_fapo.policy.rank import PolicyRank

    def first(self: Any, minibatch: Any) -> Any:
        return [self._pad(row[0]) for row in minibatch.microbatches]

    patch.setattr(PolicyRank, "_column", first)


def _mean_per_rank(patch: Any) -> None:
    from megatron.core import parallel_state

    from megatron_fapo.policy import passes

    original = passes.forward_backward

    def own_mean(model: Any, microbatches: Any, loss_function: Any, divisor: int) -> Any:
        mine = sum(len(padded.chosen) for padded in microbatches)
        return original(model, microbatches, loss_function, mine * parallel_state.get_data_parallel_world_size())

    patch.setattr(passes, "forward_backward", own_mean)


def _plain_chunks(patch: Any) -> None:
    from megatron_fapo.policy import forward

    def consecutive(width: int, ranks: int, rank: int) -> Any:
        import numpy as np

        return np.arange(width).reshape(ranks, -1)[rank]

    patch.setattr(forward, "columns_of", consecutive)


def _keys_in_rank_order(patch: Any) -> None:
    from megatron_fapo.compat import modules

    patch.setattr(modules, "in_order", lambda gathered, ranks: gathered)


def _two_outputs(patch: Any) -> None:
    from megatron_fapo.policy import passes

    original = passes._schedule

    def schedule(model: Any, microbatches: Any, loss: Callable[..., Any], forward_only: bool) -> Any:
        def two(padded: Any, hidden: Any) -> Any:
            value, _, seen = loss(padded, hidden)
            return value * len(microbatches), seen  # Megatron divides by this number again

        return original(model, microbatches, two, forward_only)

    patch.setattr(passes, "_schedule", schedule)


def _swapped(patch: Any) -> None:
    """The last stage takes the advantages of another microbatch, as far as they reach."""
    from megatron.core import parallel_state

    from megatron_fapo.policy import passes

    original = passes.forward_backward

    def mixed(model: Any, microbatches: Any, loss_function: Any, divisor: int) -> Any:
        import torch

        if parallel_state.is_pipeline_last_stage():
            others = [*microbatches[1:], microbatches[0]]
            microbatches = [
                dataclasses.replace(
                    padded, advantages=torch.cat([other.advantages, padded.advantages])[: len(padded.chosen)]
                )
                for padded, other in zip(microbatches, others, strict=True)
            ]
        return original(model, microbatches, loss_function, divisor)

    patch.setattr(passes, "forward_backward", mixed)


def _norms_unsummed(rank: Any) -> None:
    for chunk in rank.model.chunks:
        for name, param in chunk.named_parameters():
            if "layernorm" in name:
                param.sequence_parallel = False


def _head_norms_unsummed(rank: Any) -> None:
    rank.model.config.qk_layernorm = False


def _ties_unsummed(patch: Any) -> None:
    # the function of this name hides its module
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    patch.setattr(module, "_allreduce_word_embedding_grads", lambda *args, **kwargs: None)


def _refusal_dropped(patch: Any) -> None:
    from megatron_fapo.policy import model

    patch.setattr(model, "check_layout", lambda *args: None)


MUTATIONS: dict[str, Mutation] = {
    "dropped data-parallel scaling": Mutation(
        what="Megatron's division by the data-parallel ranks is left in",
        layout={"data": 2},
        after=_scale_dense,
        seen_in=SCALE,
    ),
    "no data-parallel reduction": Mutation(
        what="gradients are not summed over data-parallel ranks",
        layout={"data": 2, "distributed": False},
        after=_no_data_reduction,
        seen_in=TRAINING,
    ),
    "same column twice": Mutation(
        what="both data-parallel ranks take the first column of the batch",
        layout={"data": 2},
        before=_same_column,
        seen_in=TRAINING,
    ),
    "token mean per rank": Mutation(
        what="each rank divides by its own tokens, and the mean over ranks is taken",
        layout={"data": 2},
        before=_mean_per_rank,
        seen_in=TRAINING,
    ),
    "consecutive chunks": Mutation(
        what="context-parallel ranks hold consecutive parts of a row, where attention expects zig-zag",
        layout={"context": 2},
        before=_plain_chunks,
        seen_in=EVERYTHING,
    ),
    "keys in rank order": Mutation(
        what="gathered keys and values are left in the order of ranks",
        layout={"context": 2},
        before=_keys_in_rank_order,
        seen_in=EVERYTHING,
    ),
    "loss times context ranks": Mutation(
        what="the loss returns two outputs, which Megatron multiplies by the context-parallel ranks",
        layout={"context": 2},
        before=_two_outputs,
        seen_in=SCALE,
    ),
    "swapped microbatches": Mutation(
        what="the last stage pairs logits of one microbatch with advantages of another",
        layout={"pipeline": 2},
        before=_swapped,
        seen_in=TRAINING,
    ),
    "norms unsummed": Mutation(
        what="gradients of norms are not summed over sequence-parallel ranks",
        layout={"tensor": 2, "sequence": True},
        after=_norms_unsummed,
        seen_in=TRAINING,
    ),
    "head norms unsummed": Mutation(
        what="gradients of the norms of queries and keys are not summed over tensor-parallel ranks",
        layout={"tensor": 2},
        after=_head_norms_unsummed,
        seen_in=TRAINING,
    ),
    "ties unsummed": Mutation(
        what="gradients of the tied embedding are not summed over the first and last stage",
        layout={"pipeline": 2},
        before=_ties_unsummed,
        seen_in=TRAINING,
    ),
    "experts scaled": Mutation(
        what="gradients of experts are divided by the expert-parallel ranks",
        layout={"expert": 2, "data": 2},
        sparse=True,
        after=_scale_experts,
        seen_in=TRAINING,
    ),
    "experts unsummed": Mutation(
        what="the refused layout with tensor parallelism, whole experts and no expert parallelism",
        layout={"tensor": 2, "sequence": True},
        sparse=True,
        before=_refusal_dropped,
        seen_in=TRAINING,
    ),
}
