"""What a policy's update should cost, from shapes alone: memory, floating-point operations, a card's peak."""

from typing import Any

PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense BF16 operations per second by part of a card's name, the first that fits (NVIDIA's data sheets)."""

BYTES = {
    "float32": {"parameters": 4, "gradients": 4, "optimizer": 8},
    "bfloat16": {"parameters": 2, "gradients": 4, "optimizer": 12},
}
"""Of each parameter on one rank: BF16 has float32 master weights beside Adam's two states."""


def peak(name: str) -> float | None:
    """Peak of a card by the name that CUDA gives it; None for one that is not known."""
    return next((value for part, value in PEAKS.items() if part in name), None)


def memory(parameters: int, dtype: str) -> dict[str, int]:
    """Bytes by kind on one rank without data parallelism."""
    return {kind: size * parameters for kind, size in BYTES[dtype].items()}


def update_flops(config: Any, lengths: list[int]) -> float:
    """Forward and backward of sequences of these lengths; formulas of `batch.balance`, 2 operations a product."""
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden, layers = config.hidden_size, config.num_hidden_layers
    linear = layers * (4 * hidden * size * (heads + groups) + 6 * hidden * config.intermediate_size)
    linear += 2 * hidden * config.vocab_size
    quadratic = 2 * layers * heads * size
    return 3.0 * sum(linear * length + quadratic * length**2 for length in lengths)
