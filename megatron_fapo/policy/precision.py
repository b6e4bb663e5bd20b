"""FP8 as Megatron and Transformer Engine want it said, checked before a layer is built."""

from typing import Any

from megatron_fapo.compat.device import Device
from megatron_fapo.errors import ConfigError
from megatron_fapo.policy.settings import PolicySettings

ALIGNED = 16
"""Both sides of a weight's shard are multiples of this: cuBLAS has no other FP8 products."""


def fp8_flags(hf_config: Any, settings: PolicySettings, device: Device) -> dict[str, Any]:
    """TransformerConfig fields for `policy.fp8`; none without it.

    Raises ConfigError for a device, model or layout that FP8 cannot be computed on.
    """
    fp8 = settings.fp8
    if fp8 is None:
        return {}
    device.prepare_fp8(fp8.recipe)
    check_shapes(hf_config, settings)
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "first_last_layers_bf16": fp8.edge_layers_bf16 > 0,
        "num_layers_at_start_in_bf16": fp8.edge_layers_bf16,
        "num_layers_at_end_in_bf16": fp8.edge_layers_bf16,
        # a padded expert batch as Transformer Engine pads it; otherwise any number of tokens reaches an expert
        "moe_router_padding_for_quantization": bool(getattr(hf_config, "num_experts", 0)),
    }


def check_shapes(hf_config: Any, settings: PolicySettings) -> None:
    """Refuse sizes that FP8 kernels do not take, and more BF16 layers than a stage has."""
    tensor, stage = settings.parallel.tensor, hf_config.num_hidden_layers // settings.parallel.pipeline
    sizes = {"hidden_size": hf_config.hidden_size, "intermediate_size / tensor": hf_config.intermediate_size // tensor}
    if getattr(hf_config, "num_experts", 0):
        width = hf_config.moe_intermediate_size // settings.parallel.expert_tensor
        sizes["moe_intermediate_size / expert_tensor"] = width
    for name, size in sizes.items():
        if size % ALIGNED:
            raise ConfigError(f"policy.fp8 needs multiples of {ALIGNED} on every rank, and {name} = {size}")
    edge = settings.fp8.edge_layers_bf16 if settings.fp8 is not None else 0
    if edge > stage:
        raise ConfigError(f"policy.fp8.edge_layers_bf16 = {edge} is more than the {stage} layers of a pipeline stage")


def token_multiple(settings: PolicySettings) -> int:
    """The tokens of a microbatch on all ranks of a sequence are a multiple of this, that each rank's may be."""
    if settings.fp8 is None:
        return 1
    context, tensor = settings.parallel.context, settings.parallel.tensor
    return settings.fp8.tokens * (2 * context if context > 1 else 1) * (tensor if settings.parallel.sequence else 1)
