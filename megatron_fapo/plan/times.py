"""Seconds of each thing that a step does, from a roofline of the card: the slower of arithmetic and memory, plus what
is fixed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.plan.assumptions import Assumptions, Card
from megatron_fapo.plan.deployment import Deployment, Servers
from megatron_fapo.plan.memory import cache_share, engine_weights, state
from megatron_fapo.plan.shape import Part, part
from megatron_fapo.policy.settings import PolicySettings

ADAM_BYTES = 30
"""A parameter's gradient, master weight and two moments read, the last three written back, and its BF16 copy."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a server's decode step of b samples with C tokens of context between them takes."""

    fixed: float
    """Seconds of launches, and of all-reduces of small messages."""
    weights: float
    """Seconds to read what every step reads."""
    token: float
    """Seconds to read one token's keys and values."""
    sample: float
    """Seconds of arithmetic for one sample's token."""
    prefill_token: float
    """Seconds of arithmetic for one token of a prompt."""
    prefill_square: float
    """The same for the square of a prompt's length: attention."""

    def prefill(self, tokens: float) -> float:
        """Seconds to read a prompt of so many tokens."""
        return self.prefill_token * tokens + self.prefill_square * tokens * tokens


def rates(servers: Servers, card: Card, assume: Assumptions, batch: float = 64.0) -> Rates:
    """Of one server. Of a mixture of experts, `batch` samples decide how many experts a step meets."""
    shape, tensor = servers.shape, servers.tensor
    flops = tensor * card.flops * assume.prefill
    linear = shape.forward(1, 0) / flops
    reduces = 2 * shape.layers if tensor > 1 else 0
    ring = reduces * 2 * shape.hidden * 2 * (tensor - 1) / tensor / (card.nvlink * assume.links)
    return Rates(
        fixed=assume.decode_step + reduces * assume.all_reduce,
        weights=2 * shape.weights_met(batch) / tensor / (card.bandwidth * assume.weights_read),
        token=cache_share(servers) / (card.bandwidth * assume.cache_read),
        sample=linear + ring,
        prefill_token=linear + ring,
        prefill_square=shape.forward(0, 1) / flops,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Seconds of a step's updates, by what they are spent on."""

    compute: float
    bubble: float
    """Pipeline stages that wait."""
    gradients: float
    """Reducing gradients and gathering weights over data-parallel ranks."""
    optimizer: float
    rescore: float
    """Log-probs of the behaviour policy by Megatron, before the updates."""

    @property
    def seconds(self) -> float:
        """All together."""
        return self.compute + self.bubble + self.gradients + self.optimizer + self.rescore


def update(
    made: Deployment,
    settings: PolicySettings,
    batch: BatchSettings,
    assume: Assumptions,
    working: Sequence[int],
    every: Sequence[int],
) -> Update:
    """Of sequences of these lengths: `working` go through forward and backward, `every` one is rescored."""
    parallel, shape = made.parallel, made.shape
    mfu = assume.moe_mfu if shape.experts else assume.dense_mfu
    copy = made.card.flops * mfu * (parallel.world // parallel.data)
    again = {"none": 0.0, "selective": _selective(settings), "full": 1.0}[settings.recompute]
    forward = _forward(made, working)
    per_rank = forward.sum() / parallel.data / batch.updates
    uneven = max(per_rank, forward.max(initial=0.0)) / per_rank if per_rank else 1.0
    compute = (3 + again) * forward.sum() / parallel.data / copy * uneven
    tokens = sum(working) / parallel.data / batch.updates
    microbatches = max(np.ceil(tokens / batch.tokens_per_microbatch), 1.0)
    bubble = (parallel.pipeline - 1) / (microbatches * parallel.virtual_pipeline)
    rescored = _forward(made, every).sum() / parallel.data / copy if settings.rescore == "always" else 0.0
    held = max((part(shape, parallel, stage) for stage in range(parallel.pipeline)), key=lambda p: p.parameters)
    return Update(
        compute=compute,
        bubble=compute * bubble,
        gradients=batch.updates * _exchange(made, settings, held, assume),
        optimizer=batch.updates * _adam(made, settings, held, assume),
        rescore=rescored,
    )


def _forward(made: Deployment, lengths: Sequence[int]) -> np.ndarray:
    sizes = np.asarray(lengths, np.float64)
    return np.asarray(made.shape.forward(1, 0) * sizes + made.shape.forward(0, 1) * sizes**2)


def _selective(settings: PolicySettings) -> float:
    """Forward passes that the backward pass repeats: the MLP is most of a layer's arithmetic."""
    return 0.7 if {"mlp", "moe"} & set(settings.recompute_modules) else 0.0


def _exchange(made: Deployment, settings: PolicySettings, held: Part, assume: Assumptions) -> float:
    """Reduce-scatter of float32 gradients and all-gather of weights, which nothing overlaps here."""
    parallel, card = made.parallel, made.card
    copies = parallel.data * parallel.context
    if copies == 1:
        return 0.0
    near = parallel.tensor * copies <= card.per_node
    link = (card.nvlink if near else card.network) * assume.links
    width = 2 if settings.dtype == "bfloat16" else 4
    return (4 + width) * held.parameters * (copies - 1) / copies / link


def _adam(made: Deployment, settings: PolicySettings, held: Part, assume: Assumptions) -> float:
    kept = state(settings.changed(parallel=made.parallel.model_dump()), held)
    each = 12 if settings.dtype == "bfloat16" else 8
    here, away = kept.optimizer / each, kept.host_optimizer / each
    copies = 6 * away / (made.card.pcie * assume.pcie)
    return (
        here * ADAM_BYTES / (made.card.bandwidth * assume.weights_read) + away * ADAM_BYTES / assume.host_adam + copies
    )


def publish(made: Deployment, assume: Assumptions) -> float:
    """The policy's weights to its servers: over the same GPUs where they are colocated, over NCCL otherwise."""
    nbytes = 2 * made.shape.parameters
    if made.placement == "split":
        return assume.publish_fixed + nbytes / assume.publish_rate
    node = made.card.per_node * made.card.network * assume.links
    stages = made.parallel.pipeline
    apart = made.parallel.world > made.card.per_node and stages > 1
    return nbytes / assume.publish_local + (nbytes * (stages - 1) / stages / node if apart else 0.0)


def switch(made: Deployment, settings: PolicySettings, assume: Assumptions) -> float:
    """From training to generation and back: weights and optimizer out to pinned memory and in again."""
    if made.placement == "split":
        return 0.0
    settings = settings.changed(parallel=made.parallel.model_dump())
    held = [part(made.shape, made.parallel, stage) for stage in range(made.parallel.pipeline)]
    kept = max((state(settings, one) for one in held), key=lambda s: s.parameters + s.optimizer)
    judge = engine_weights(made.judge) if made.judge is not None and made.judge.backup else 0
    moved = 2 * (kept.parameters + kept.optimizer) + judge
    return assume.hand_over + moved / (made.card.pcie * assume.pcie)
