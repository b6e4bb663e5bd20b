"""Hugging Face weights into Megatron and out again, through mbridge 0.15.1.

mbridge knows names and shapes, but always builds Transformer Engine layers, reads `rope_theta` where
transformers 5 has `rope_parameters`, and keeps its name table on the class. The subclasses below supply what a
machine without Transformer Engine needs; names, splits and merges stay mbridge's own.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from mbridge.models.llama import LLaMABridge
from mbridge.models.qwen2 import Qwen2Bridge
from mbridge.models.qwen3 import Qwen3Bridge

from megatron_fapo.compat.device import Device
from megatron_fapo.compat.modules import local_block_spec
from megatron_fapo.errors import ConfigError


class _OwnLayers:
    """Mixed in before one of mbridge's classes: own layer spec, own names for the norms, own rope base."""

    _OTHER_MAPPING: ClassVar = {"input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"]}
    _DIRECT_MAPPING: dict[str, str]
    _MLP_MAPPING: dict[str, list[str]]
    device: Device
    hf_config: Any
    config: Any

    def __init__(self, hf_config: Any, device: Device, dtype: torch.dtype, vocab_multiple: int) -> None:
        self.device = device
        # mbridge changes this table for tied embeddings: keep that change to this instance
        self._DIRECT_MAPPING = dict(self._DIRECT_MAPPING)
        self._MLP_MAPPING = {
            **self._MLP_MAPPING,
            "pre_mlp_layernorm.weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"],
        }
        super().__init__(hf_config, dtype=dtype, make_vocab_size_divisible_by=vocab_multiple)  # type: ignore[call-arg]

    def _adjust_mapping_for_shared_weights(self) -> None:
        if self.hf_config.tie_word_embeddings:
            self._DIRECT_MAPPING["output_layer.weight"] = "model.embed_tokens.weight"

    def _get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
        if self.device.spec == "transformer_engine":
            return super()._get_transformer_layer_spec(vp_stage)  # type: ignore[misc]
        self.has_vp_stage = True
        return local_block_spec(self.config, vp_stage)

    def _get_gptmodel_args(self) -> dict[str, Any]:
        return {
            "vocab_size": self.hf_config.vocab_size,
            "max_sequence_length": self.hf_config.max_position_embeddings,
            "position_embedding_type": "rope",
            "rotary_base": self.hf_config.rope_theta,
        }


class Qwen2(_OwnLayers, Qwen2Bridge):  # type: ignore[misc]
    """Qwen2 and Qwen2.5: bias on QKV."""


class Qwen3(_OwnLayers, Qwen3Bridge):  # type: ignore[misc]
    """Qwen3: norms on query and key."""


class Llama(_OwnLayers, LLaMABridge):  # type: ignore[misc]
    """Llama 2 and 3 without rope scaling."""


FAMILIES: Mapping[str, type[_OwnLayers]] = {"qwen2": Qwen2, "qwen3": Qwen3, "llama": Llama}
"""By `model_type` of the Hugging Face config."""


EXPERTS: Mapping[str, Any] = {
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_router_dtype": "fp32",
    "moe_token_dispatcher_type": "alltoall",
    "moe_grouped_gemm": False,
}
"""A mixture of experts in RL: no auxiliary loss beside the policy's, no token dropped, so that padding disturbs none.
Without experts these fields are not read."""


def make_bridge(hf_config: Any, device: Device, dtype: torch.dtype, tensor_parallel: int, **flags: Any) -> Any:
    """An mbridge bridge for a Hugging Face config; `flags` are TransformerConfig fields that override mbridge's.

    Sizes of the parallel axes are those of `parallel_state` at this moment.

    The vocabulary is padded to a multiple of `tensor_parallel`. Raises ConfigError naming the first key of the
    config that has no counterpart here.
    """
    check(hf_config)
    hf_config.rope_theta = float(hf_config.rope_parameters["rope_theta"])
    if getattr(hf_config, "head_dim", None) is None:
        hf_config.head_dim = hf_config.hidden_size // hf_config.num_attention_heads
    bridge: Any = FAMILIES[hf_config.model_type](hf_config, device, dtype, tensor_parallel)
    bridge.set_extra_args(
        **{**device.transformer_flags, **EXPERTS, "attention_dropout": 0.0, "hidden_dropout": 0.0, **flags}
    )
    return bridge


def check(hf_config: Any) -> None:
    """Refuse by name what has no counterpart in the models that are built here."""
    kind = hf_config.model_type
    if kind not in FAMILIES:
        raise ConfigError(f"model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    rope = getattr(hf_config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_type {rope['rope_type']!r} of {kind} is not supported; supported: default")
    refused = {
        "hidden_act": hf_config.hidden_act != "silu",
        "mlp_bias": getattr(hf_config, "mlp_bias", False),
        "use_sliding_window": getattr(hf_config, "use_sliding_window", False),
        "attention_bias": getattr(hf_config, "attention_bias", False) and kind in ("qwen3", "llama"),
    }
    for key, present in refused.items():
        if present:
            raise ConfigError(f"{key}={getattr(hf_config, key)!r} of {kind} has no counterpart here")
