"""A Hugging Face config against Megatron's, field by field: what is mapped, what cannot matter, what is refused.

Every key of a config is in exactly one of the tables below. One that is in none, or has a value that nothing here
implements, is refused by name: a model that computes something else than its config says would train without an
error.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F

from megatron_fapo.errors import ConfigError

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "qwen3_moe")
"""Supported values of `model_type`: Qwen2 and 2.5, Qwen3, Llama 2 and 3, Mistral, Qwen3-MoE."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the sequence at hand."""


def _same(value: Any) -> Any:
    return value


MAPPED: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "num_hidden_layers": ("num_layers", _same),
    "hidden_size": ("hidden_size", _same),
    "intermediate_size": ("ffn_hidden_size", _same),
    "num_attention_heads": ("num_attention_heads", _same),
    "num_key_value_heads": ("num_query_groups", _same),
    "head_dim": ("kv_channels", _same),
    "rms_norm_eps": ("layernorm_epsilon", _same),
    "hidden_act": ("activation_func", {"silu": F.silu}.__getitem__),
    "num_experts": ("num_moe_experts", _same),
    "num_experts_per_tok": ("moe_router_topk", _same),
    "moe_intermediate_size": ("moe_ffn_hidden_size", _same),
    # weights of the chosen experts: a softmax over the chosen, or the chosen of a softmax over all
    "norm_topk_prob": ("moe_router_pre_softmax", lambda normalised: not normalised),
}
"""Key: Megatron's field, and the value it must have."""

BUILT = ("vocab_size", "max_position_embeddings", "tie_word_embeddings", "rope_parameters")
"""Keys that the built model answers for; `compare` asks it."""

IMPLIED: Mapping[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "rotary_interleaved": False,
}
"""What all families have in common and none of them states."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "use_mrope": (False, None),
    "is_encoder_decoder": (False, None),
    "is_decoder": (False, True, None),
    "add_cross_attention": (False, None),
    "partial_rotary_factor": (1.0, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "shared_expert_intermediate_size": (0, None),
    "auto_map": (None,),
}
"""Keys with the only values that have a counterpart here."""

HARMLESS: Mapping[str, str] = {
    "_name_or_path": "a name",
    "architectures": "a name; model_type decides",
    "model_type": "decides the family",
    "dtype": "of the file; the run says what it computes in",
    "quantization_config": "of the file; FP8 is read as the floats that it stands for, all else is refused",
    "transformers_version": "a name",
    "initializer_range": "of weights that are loaded, not drawn",
    "attention_dropout": "training of rollouts drops nothing, whatever was used before",
    "use_cache": "of generation",
    "bos_token_id": "of generation",
    "eos_token_id": "of generation",
    "pad_token_id": "of generation",
    "pretraining_tp": "another order of the same sums",
    "max_window_layers": "of sliding windows, which are refused",
    "router_aux_loss_coef": "of a loss that is not used here",
    "output_router_logits": "of a loss that is not used here",
    "id2label": "of classification",
    "label2id": "of classification",
    "problem_type": "of classification",
    "num_labels": "of classification",
    "chunk_size_feed_forward": "another order of the same sums",
    "output_attentions": "what transformers returns",
    "output_hidden_states": "what transformers returns",
    "return_dict": "what transformers returns",
    "tokenizer_class": "of the tokenizer",
}
"""Keys that say nothing about the numbers of a forward pass, and why."""

QWEN3 = ("qwen3", "qwen3_moe")


def check(hf_config: Any) -> None:
    """Refuse by name what has no counterpart in the models that are built here. Raises ConfigError."""
    kind = hf_config.model_type
    if kind not in FAMILIES:
        raise ConfigError(f"model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    rope = getattr(hf_config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise ConfigError(
            f"rope_type {rope['rope_type']!r} of {kind} has no counterpart here; supported: {', '.join(ROPE_TYPES)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor={rope['partial_rotary_factor']} of {kind} has no counterpart here")
    names = {stored: name for name, stored in hf_config.attribute_map.items()}
    for stored, value in hf_config.to_dict().items():
        key = names.get(stored, stored)
        if key == "quantization_config" and (value or {}).get("quant_method", "fp8") != "fp8":
            raise ConfigError(f"quantization_config of {kind} is {value['quant_method']!r}; of those, only fp8 is read")
        if key in ONLY and value not in ONLY[key]:
            raise ConfigError(f"{key}={value!r} of {kind} has no counterpart here")
        if key == "layer_types" and set(value or ()) - {"full_attention"}:
            others = ", ".join(sorted(set(value) - {"full_attention"}))
            raise ConfigError(f"layer_types of {kind} has {others}; only full_attention has a counterpart here")
        if not any(key in table for table in (MAPPED, BUILT, ONLY, HARMLESS, ("layer_types",))):
            raise ConfigError(
                f"{key}={value!r} of {kind} is a key that nothing here knows: if it does not change the model's "
                "numbers, take it out of config.json"
            )


def compare(hf_config: Any, config: Any, module: Any) -> None:
    """Compare a checked Hugging Face config with the TransformerConfig and the GPTModel that were built from it.

    Raises ConfigError naming the first pair of fields that differ: a mapping that forgot a field, or a flag that
    overrode one.
    """
    kind = hf_config.model_type
    expected = {
        **IMPLIED,
        "add_qkv_bias": kind == "qwen2",
        "qk_layernorm": kind in QWEN3,
        "num_moe_experts": None,
    }
    for key, (field, convert) in MAPPED.items():
        if (value := getattr(hf_config, key, None)) is not None:
            expected[field] = convert(value)
    for field, value in expected.items():
        if getattr(config, field) != value:
            raise ConfigError(
                f"Megatron's {field} is {getattr(config, field)!r}, the config of {kind} asks for {value!r}"
            )
    built = {
        "max_sequence_length": hf_config.max_position_embeddings,
        "share_embeddings_and_output_weights": hf_config.tie_word_embeddings,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
    }
    for field, value in built.items():
        if (found := getattr(module, field)) != value:
            raise ConfigError(f"the model's {field} is {found!r}, its config asks for {value!r}")
    if module.vocab_size < hf_config.vocab_size:
        raise ConfigError(f"the model has {module.vocab_size} tokens, its config {hf_config.vocab_size}")
