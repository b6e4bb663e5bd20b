"""What has no counterpart is refused by name, before anything is built; what was built is held against the config."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch.nn.functional as F
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_fapo.compat import model_config
from megatron_fapo.compat.bridge import FAMILIES
from megatron_fapo.compat.model_config import check, compare
from megatron_fapo.errors import ConfigError

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0}
SHORT = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
MIXED = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    "config",
    [Qwen2Config(), Qwen3Config(), LlamaConfig(), MistralConfig(sliding_window=None), Qwen3MoeConfig()],
    ids=lambda c: c.model_type,
)
def test_the_families_themselves_are_accepted(config: Any) -> None:
    check(config)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (GPT2Config(), "gpt2"),
        (Qwen3Config(hidden_act="gelu"), "hidden_act='gelu'"),
        (Qwen3Config(attention_bias=True), "attention_bias=True"),
        (LlamaConfig(attention_bias=True), "attention_bias=True"),
        (LlamaConfig(mlp_bias=True), "mlp_bias=True"),
        (LlamaConfig(rope_parameters=SHORT), "partial_rotary_factor=0.5"),
        (LlamaConfig(rope_parameters=LONG), "rope_type 'longrope'"),
        (LlamaConfig(quantization_config={"quant_method": "awq"}), "quantization_config of llama is 'awq'"),
        (LlamaConfig(final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
        (LlamaConfig(embedding_multiplier=12.0), "embedding_multiplier=12.0 of llama is a key that nothing here knows"),
        (Qwen2Config(use_sliding_window=True), "use_sliding_window=True"),
        (Qwen3Config(num_hidden_layers=2, layer_types=MIXED), "layer_types of qwen3 has sliding_attention"),
        (MistralConfig(), "sliding_window=4096"),
        (Qwen3MoeConfig(decoder_sparse_step=2), "decoder_sparse_step=2"),
        (Qwen3MoeConfig(mlp_only_layers=[0]), r"mlp_only_layers=\[0\]"),
        (Qwen3MoeConfig(shared_expert_intermediate_size=64), "shared_expert_intermediate_size=64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_key_without_counterpart_is_named(config: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check(config)


def test_every_key_is_in_one_table_and_every_family_has_a_bridge() -> None:
    tables = (model_config.MAPPED, model_config.BUILT, model_config.HARMLESS)
    keys = [key for table in tables for key in table]
    assert len(keys) == len(set(keys))
    assert set(model_config.ONLY) & set(keys) == {"hidden_act"}
    assert tuple(FAMILIES) == model_config.FAMILIES


@dataclasses.dataclass
class Built:
    """What Megatron would have for QWEN."""

    config: Any
    module: Any


QWEN = Qwen2Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, vocab_size=71)


@pytest.fixture
def built() -> Built:
    config = SimpleNamespace(
        **model_config.IMPLIED,
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=QWEN.intermediate_size,
        num_attention_heads=4,
        num_query_groups=2,
        layernorm_epsilon=1e-6,
        activation_func=F.silu,
        add_qkv_bias=True,
        qk_layernorm=False,
        num_moe_experts=None,
    )
    module = SimpleNamespace(
        max_sequence_length=QWEN.max_position_embeddings,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=1.0,
        vocab_size=72,
    )
    return Built(config, module)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_query_groups", 4), ("layernorm_epsilon", 1e-5), ("add_qkv_bias", False), ("activation_func", F.gelu)],
)
def test_a_field_that_differs_is_named(built: Built, field: str, value: Any) -> None:
    compare(QWEN, built.config, built.module)
    setattr(built.config, field, value)
    with pytest.raises(ConfigError, match=f"Megatron's {field} is"):
        compare(QWEN, built.config, built.module)


def test_a_module_that_differs_is_named(built: Built) -> None:
    built.module.share_embeddings_and_output_weights = True
    with pytest.raises(ConfigError, match="share_embeddings_and_output_weights is True"):
        compare(QWEN, built.config, built.module)
    built.module.share_embeddings_and_output_weights = False
    built.module.vocab_size = 70
    with pytest.raises(ConfigError, match="the model has 70 tokens, its config 71"):
        compare(QWEN, built.config, built.module)
