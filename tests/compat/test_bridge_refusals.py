"""What has no counterpart is refused by name, before anything is built."""

from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from megatron_fapo.compat.bridge import check
from megatron_fapo.errors import ConfigError


@pytest.mark.parametrize("config", [Qwen2Config(), Qwen3Config(), LlamaConfig()], ids=lambda c: c.model_type)
def test_the_families_themselves_are_accepted(config: Any) -> None:
    check(config)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (GPT2Config(), "gpt2"),
        (Qwen3Config(hidden_act="gelu"), "hidden_act='gelu'"),
        (Qwen3Config(attention_bias=True), "attention_bias=True"),
        (LlamaConfig(mlp_bias=True), "mlp_bias=True"),
        (Qwen2Config(use_sliding_window=True), "use_sliding_window=True"),
        (
            LlamaConfig(
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            ),
            "rope_type 'llama3'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_key_without_counterpart_is_named(config: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check(config)
