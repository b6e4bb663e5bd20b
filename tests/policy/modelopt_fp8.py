"""What nvidia-modelopt makes of a matrix in FP8, kept beside this file: it is too heavy to be installed for a test.

python -m tests.policy.modelopt_fp8   writes the file again, where nvidia-modelopt is installed (0.47.0 then)
"""

from pathlib import Path

import numpy as np
import torch

from megatron_fapo.fp8 import BLOCK

FILE = Path(__file__).with_suffix(".npz")


def drawn(seed: int, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A matrix whose rows and columns differ by up to 2^30 in size, with zeros."""
    noise = torch.Generator().manual_seed(seed)
    sizes = (
        2.0 ** torch.randint(-20, 10, (rows, 1), generator=noise),
        2.0 ** torch.randint(-10, 10, (1, columns), generator=noise),
    )
    matrix = torch.randn(rows, columns, generator=noise) * sizes[0] * sizes[1]
    return matrix.masked_fill(torch.rand(rows, columns, generator=noise) < 0.1, 0.0).to(dtype)


def matrix() -> torch.Tensor:
    """Four blocks, three of them cut off."""
    return drawn(3, 140, 135, torch.float32)


def main() -> None:
    """Quantise by modelopt, save."""
    from modelopt.torch.quantization.qtensor import FP8QTensor

    blocks, scales = FP8QTensor.quantize(matrix(), block_sizes={-1: BLOCK, -2: BLOCK})
    whole, scale = FP8QTensor.quantize(matrix())
    np.savez_compressed(
        FILE,
        blockwise_values=blocks._quantized_data.contiguous().view(torch.uint8).numpy(),
        blockwise_scale=scales.numpy(),
        per_tensor_values=whole._quantized_data.contiguous().view(torch.uint8).numpy(),
        per_tensor_scale=scale.view(1).numpy(),
    )


if __name__ == "__main__":
    main()
