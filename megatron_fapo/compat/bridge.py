"""Hugging Face weights into Megatron and out again, through mbridge 0.15.1.

mbridge knows names and shapes, but always builds Transformer Engine layers, reads `rope_theta` where
transformers 5 has `rope_parameters`, knows no rope scaling, and keeps its name table on the class. The subclasses
below supply what is missing; names, splits and merges stay mbridge's own.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from mbridge.models.llama import LLaMABridge
from mbridge.models.qwen2 import Qwen2Bridge
from mbridge.models.qwen3 import Qwen3Bridge
from mbridge.models.qwen3moe import Qwen3MoEBridge

from megatron_fapo.compat.device import Device
from megatron_fapo.compat.model_config import check, compare
from megatron_fapo.compat.modules import local_block_spec

Tensors = list[tuple[str, torch.Tensor]]

EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.)?(linear_fc[12])\.weight(\d*)$")
"""An expert's matrix: experts one by one (`local_experts.3.linear_fc1.weight`), or grouped (`linear_fc1.weight3`)."""


class _OwnLayers:
    """Mixed in before one of mbridge's classes: own layer spec, own names for the norms, own rope."""

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
            "rotary_base": float(self.hf_config.rope_parameters["rope_theta"]),
        }

    def _model_provider(self, post_model_creation_callbacks: Iterable[Callable[..., None]]) -> Any:
        return super()._model_provider([*post_model_creation_callbacks, self._finish])  # type: ignore[misc]

    def _finish(self, module: Any, **_: Any) -> None:
        """Put the scaled frequencies in place, and hold the result against the Hugging Face config."""
        frequencies, factor = rope(self.hf_config)
        if frequencies is not None:
            module.rotary_pos_emb.inv_freq = frequencies.to(module.rotary_pos_emb.inv_freq.device)
        if factor != 1.0:
            # Megatron multiplies sine and cosine by 0.1 * mscale * ln(scaling factor) + 1 where these fields exist
            self.config.yarn_rotary_scaling_factor = math.e
            self.config.yarn_mscale = 10.0 * (factor - 1.0)
            self.config.yarn_mscale_all_dim = 0.0
        compare(self.hf_config, self.config, module)

    # --- names and tensors ------------------------------------------------------------------------------------

    def names(self, module: Any) -> dict[str, str]:
        """Names of a module's parameters, to names with layers and experts counted over all ranks."""
        every: dict[str, str] = self._weight_name_mapping_mcore_local_to_global(module, consider_ep=False)  # type: ignore[attr-defined]
        first = (self.config.num_moe_experts or 0) // self.mpu.ep_size * self.mpu.ep_rank  # type: ignore[attr-defined]

        def counted(match: re.Match[str]) -> str:
            number = int(match[1] or match[3]) + first
            return f"mlp.experts.{match[2]}.weight{number}"

        return {local: EXPERT.sub(counted, every[local]) for local, _ in module.named_parameters()}

    def to_hugging_face(self, name: str, shards: Sequence[torch.Tensor], partition: int | None) -> Tensors:
        """The Hugging Face tensors that a parameter becomes, from its tensor-parallel shards in the order of ranks.

        `partition` is the dimension that the shards are cut along, None for a parameter that every rank has whole.
        """
        whole = shards[0]
        if partition is not None and len(shards) > 1:
            like = shards[0].new_empty(0, device="meta")
            like.tensor_model_parallel, like.partition_dim = True, partition  # type: ignore[attr-defined]
            whole = self._weight_merge_across_tp(name, list(shards), like)  # type: ignore[attr-defined]
        return list(zip(*self._weight_to_hf_format(name, whole), strict=True))  # type: ignore[attr-defined]

    def sources(self, name: str) -> list[str]:
        """The Hugging Face tensors that a parameter consists of."""
        found: list[str] = self._weight_name_mapping_mcore_to_hf(name)  # type: ignore[attr-defined]
        return found

    def from_hugging_face(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A whole parameter, before tensor parallelism cuts it; `read` gives the tensor of a Hugging Face name."""
        values = [read(source) for source in self.sources(name)]
        whole: torch.Tensor = self._weight_to_mcore_format(name, values)  # type: ignore[attr-defined]
        return whole

    def shard(self, name: str, whole: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole parameter."""
        expert = EXPERT.search(name) is not None
        ranks = self.mpu.etp_size if expert else self.mpu.tp_size  # type: ignore[attr-defined]
        rank = self.mpu.etp_rank if expert else self.mpu.tp_rank  # type: ignore[attr-defined]
        part: torch.Tensor = self._weight_split_across_tp(name, whole, param, ranks)[rank]  # type: ignore[attr-defined]
        return part


class Qwen2(_OwnLayers, Qwen2Bridge):  # type: ignore[misc]
    """Qwen2 and Qwen2.5: bias on QKV."""


class Qwen3(_OwnLayers, Qwen3Bridge):  # type: ignore[misc]
    """Qwen3: norms on query and key."""


class Llama(_OwnLayers, LLaMABridge):  # type: ignore[misc]
    """Llama 2 and 3, and Mistral, which is the same without its sliding window."""


class Qwen3Moe(_OwnLayers, Qwen3MoEBridge):  # type: ignore[misc]
    """Qwen3 with experts in every layer."""

    def _build_base_config(self, **chosen: Any) -> Any:
        return super()._build_base_config(**{**chosen, "moe_router_pre_softmax": not self.hf_config.norm_topk_prob})


FAMILIES: Mapping[str, type[_OwnLayers]] = {
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "llama": Llama,
    "mistral": Llama,
    "qwen3_moe": Qwen3Moe,
}
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
    bridge: Any = FAMILIES[hf_config.model_type](hf_config, device, dtype, tensor_parallel)
    chosen = {**device.transformer_flags, **EXPERTS, "attention_dropout": 0.0, "hidden_dropout": 0.0, **flags}
    if rope(hf_config)[1] != 1.0:
        chosen["apply_rope_fusion"] = False  # Transformer Engine's kernel has no such factor
    bridge.set_extra_args(**chosen)
    bridge.dtype = None  # else mbridge rounds what it reads to it, also where nothing of that dtype is written
    return bridge


def rope(hf_config: Any) -> tuple[torch.Tensor | None, float]:
    """The rotary frequencies [head_dim / 2], None for those of `rope_theta` alone, and the factor on sine and cosine.

    transformers' own functions compute both, so that the two implementations cannot drift apart.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = hf_config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None, 1.0
    with torch.device("cpu"):  # also where a model is being built without memory
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    return frequencies, float(factor)
