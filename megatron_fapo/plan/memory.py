"""Bytes on the fullest GPU of each phase, by owner.

Parameters, gradients and optimizer state are what Megatron allocates for the rank's part; activations follow
Korthikanti et al. (arXiv:2205.05198, Eq. 2 to 4) for fused attention, gated MLPs and grouped queries.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_fapo.plan.assumptions import Assumptions
from megatron_fapo.plan.deployment import Deployment, Servers
from megatron_fapo.plan.shape import Part, Shape, part
from megatron_fapo.policy.settings import PolicySettings

LOGITS_COPIES = 4
"""A chunk of logits and three more of its size in the backward pass (`policy.logits_megabytes`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a rank keeps between microbatches, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    host_optimizer: int = 0
    """Of the optimizer, on the host."""


def state(settings: PolicySettings, held: Part) -> State:
    """Weights, float32 gradients, and Adam's moments with float32 master weights where the model is in BF16."""
    parallel, optimizer = settings.parallel, settings.optimizer
    width = 2 if settings.dtype == "bfloat16" else 4
    each = 12 if width == 2 else 8
    copies = parallel.data * parallel.context
    expert_copies = parallel.tensor * copies // (parallel.expert * parallel.expert_tensor)
    shards = held.dense // copies + held.experts // max(expert_copies, 1)
    kept = each * (shards if optimizer.distributed else held.parameters)
    away = int(kept * optimizer.cpu_offload)
    return State(
        parameters=width * held.parameters,
        gradients=4 * held.parameters,
        optimizer=kept - away,
        host_optimizer=away,
    )


def activations(shape: Shape, settings: PolicySettings, tokens: int, stage: int) -> int:
    """Bytes that the forward pass of microbatches of `tokens` leaves for the backward pass, on a rank of this stage."""
    parallel, width = settings.parallel, 2 if settings.dtype == "bfloat16" else 4
    local = tokens / parallel.context
    thin = local / (parallel.tensor if parallel.sequence else 1)
    layers = shape.layers // parallel.pipeline
    # microbatches that this stage has begun and not ended under 1F1B, interleaved or not
    flight = parallel.pipeline - stage
    if parallel.virtual_pipeline > 1:
        chunks = 2 * (flight - 1) + (parallel.virtual_pipeline - 1) * parallel.pipeline + 1
        flight = -(-chunks // parallel.virtual_pipeline)
    whole = width * layer_elements(shape, settings, local, thin)
    kept = width * thin * shape.hidden
    full = layers if settings.recompute == "full" else 0
    if settings.recompute_layers is not None:
        full = min(settings.recompute_layers, layers)
    at_once = flight * (full * kept + (layers - full) * whole) + (whole if full else 0)
    return int(at_once + flight * width * thin * shape.hidden)


def layer_elements(shape: Shape, settings: PolicySettings, local: float, thin: float) -> float:
    """Elements that one layer keeps of `local` tokens, of which `thin` are this rank's between the matrices."""
    parallel, dropped = settings.parallel, settings.recompute_modules if settings.recompute == "selective" else ()
    norms = 2 * thin * shape.hidden * (1 if "layernorm" in dropped else 2)  # their inputs, and their outputs
    attention = local * shape.head_dim * (2 * shape.heads + 2 * shape.groups) / parallel.tensor
    if not shape.experts:
        mlp = 0.0 if "mlp" in dropped else 3 * local * shape.mlp / parallel.tensor
        return norms + attention + mlp
    sent = thin * parallel.expert_tensor * shape.chosen
    experts = 0.0 if "moe" in dropped else sent * (2 * shape.hidden + 3 * shape.mlp / parallel.expert_tensor)
    return norms + attention + experts + thin * shape.experts


def logits(shape: Shape, settings: PolicySettings, tokens: int) -> int:
    """Bytes of log-probs on the last stage: chunks of logits, and the float32 gradient of the output layer."""
    rows = shape.rows(settings.parallel.tensor)
    chunk = min(settings.logits_megabytes * 2**20, 4 * rows * tokens // settings.parallel.context)
    return LOGITS_COPIES * chunk + 4 * rows * shape.hidden


def engine_weights(servers: Servers) -> int:
    """BF16 weights on one GPU of a server."""
    return 2 * servers.shape.parameters // servers.tensor


def cache_tokens(servers: Servers, memory: float) -> int:
    """Tokens whose keys and values fit beside the weights of one server."""
    room = servers.memory_fraction * memory - engine_weights(servers)
    return max(int(room / cache_share(servers)), 0)


def cache_share(servers: Servers) -> float:
    """Bytes of one token's keys and values on one GPU: ranks beyond the key-value heads hold copies."""
    return servers.shape.cache / min(servers.tensor, servers.shape.groups)


def cache_rooms(made: Deployment) -> tuple[float, float]:
    """Bytes for keys and values on a GPU of a policy server and of a judge server; on shared GPUs half of what both
    servers' weights leave, each."""
    memory = made.card.memory
    policy = made.policy.memory_fraction * memory - engine_weights(made.policy)
    if made.judge is None:
        return policy, 0.0
    if made.judge_place == "shared":
        half = max(policy - engine_weights(made.judge), 0.0) / 2
        return half, half
    return policy, made.judge.memory_fraction * memory - engine_weights(made.judge)


Phase = dict[str, int]
"""{owner: bytes}"""


def phases(
    made: Deployment, settings: PolicySettings, tokens: int, bucket: float, assume: Assumptions
) -> dict[str, Phase]:
    """{phase: {owner: bytes}} on the fullest GPU. `tokens` of a microbatch, `bucket` bytes of a published one."""
    settings = settings.changed(parallel=made.parallel.model_dump())
    together, shape = made.placement == "colocated", made.shape
    communicators = assume.communicators_moe if shape.experts else assume.communicators
    network = int(communicators) if made.parallel.world > 1 else 0
    context = int(assume.context)
    stages = [
        _update(shape, settings, part(shape, made.parallel, stage), tokens, stage)
        for stage in range(made.parallel.pipeline)
    ]
    update = max(stages, key=lambda phase: sum(phase.values()))
    left = {"NCCL": network, "CUDA": context}
    found = {"update": {**update, **left, **({"paused servers": context} if together else {})}}
    beside = {**left, "CUDA": 2 * context} if together else {"CUDA": context}
    found["publish"] = {
        "parameters": update["parameters"],
        "buckets": int(2 * bucket),
        **({"policy server": engine_weights(made.policy)} if together else {}),
        **(beside if together else left),
    }
    found["generate"] = {**_serve("policy server", made.policy, made.card.memory), **beside}
    if made.judge is not None:
        judge = _serve("judge", made.judge, made.card.memory)
        if made.judge_place == "shared":  # the two share the fraction that one has otherwise
            taken = engine_weights(made.judge)
            cache = found["generate"]["KV cache"] - taken
            found["generate"] |= {"judge": taken, "KV cache": max(cache, 0)}
        else:
            found["judge"] = {**judge, **beside}
    if made.bays and made.judge is not None:  # the servers that do not work there keep their weights
        if made.bays.lent["policy"]:
            found["generate"] |= {"judge at rest": engine_weights(made.judge) + context}
        if made.bays.lent["judge"]:
            found["judge"] |= {"policy at rest": engine_weights(made.policy) + context}
    return found


def _update(shape: Shape, settings: PolicySettings, held: Part, tokens: int, stage: int) -> Phase:
    kept = state(settings, held)
    last = stage == settings.parallel.pipeline - 1
    return {
        "parameters": kept.parameters,
        "gradients": kept.gradients,
        "optimizer": kept.optimizer,
        "activations": activations(shape, settings, tokens, stage),
        **({"logits": logits(shape, settings, tokens)} if last else {}),
    }


def _serve(owner: str, servers: Servers, memory: float) -> Phase:
    weights = engine_weights(servers)
    return {owner: weights, "KV cache": max(int(servers.memory_fraction * memory) - weights, 0)}


def overfull(found: Mapping[str, Phase], memory: float) -> dict[str, int]:
    """{phase: bytes too many}."""
    sums = {phase: sum(owners.values()) for phase, owners in found.items()}
    return {phase: int(total - memory) for phase, total in sums.items() if total > memory}
