"""Model FLOPs of a training token in closed form, for the model FLOPs utilisation (MFU)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fapo.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlops:
    """What a forward and backward pass of one token costs (arXiv:2204.02311, appendix B, with a causal mask).

    Recomputation and the forward pass that rescores are not useful work and do not count.
    """

    matrix_parameters: int
    """Parameters that a token is multiplied by: active experts only, output layer in, embedding and norms out."""
    attention_width: int
    """Layers × heads × width of a head."""

    def per_token(self, sequence_tokens: float) -> float:
        """FLOPs of a token in sequences of this length: 6 a parameter, and 6 × width a token that it can attend to.

        Scores and values are two products of 2 FLOPs, three times with the backward pass, over half of the sequence.
        """
        return 6.0 * self.matrix_parameters + 6.0 * self.attention_width * sequence_tokens


def model_flops(config: Mapping[str, Any]) -> ModelFlops:
    """From a Hugging Face config of the Llama, Qwen2, Qwen3 or Qwen3-MoE family. Raises KeyError for another."""
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    experts = config.get("num_experts") or 0
    if experts:
        mlp = 3 * hidden * config["moe_intermediate_size"] * config["num_experts_per_tok"] + hidden * experts
    else:
        mlp = 3 * hidden * config["intermediate_size"]
    return ModelFlops(
        matrix_parameters=layers * (attention + mlp) + config["vocab_size"] * hidden,
        attention_width=layers * heads * head_dim,
    )


def read_model_flops(folder: Path) -> ModelFlops:
    """Of the model in a Hugging Face folder. Raises DataError."""
    path = folder / "config.json"
    try:
        return model_flops(json.loads(path.read_text()))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: observe.peak_tflops needs the model's sizes, and {error} is missing") from None
