"""BF16 or float32 weights into FP8 and back, on any device, a few rows of blocks at a time."""

import torch
from torch.nn.functional import pad

from megatron_fapo.errors import DataError
from megatron_fapo.fp8 import BLOCK, LARGEST, RELATIVE_ERROR, SMALLEST_STEP, Fp8

_AT_A_TIME = 2**22
"""Values that are held in float32 meanwhile, or one row of blocks if that is more."""
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A block of zeros has this scale, and zeros; a scale of zero would make them NaN."""


def quantize(fp8: Fp8, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The tensors that a Hugging Face tensor becomes: `Fp8.tensors` says their names and shapes.

    Each scale is the largest magnitude in its reach / 448, in float32. Raises DataError naming a tensor that holds
    values which are not finite.
    """
    if name not in fp8.matrices:
        return [(name, tensor.to(torch.bfloat16))]
    values, scale = blockwise(tensor) if fp8.scales == "blockwise" else per_tensor(tensor)
    if not bool(scale.isfinite().all()):
        raise DataError(f"{name}: holds values that are not finite, which FP8 has no scale for")
    (_, (scale_name, _, _)) = fp8.tensors(name, tuple(tensor.shape))
    return [(name, values), (scale_name, scale)]


def blockwise(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values [rows, columns] and their scales [ceil(rows / 128), ceil(columns / 128)]."""
    rows, columns = matrix.shape
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=matrix.device)
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK), dtype=torch.float32, device=matrix.device)
    step = max(1, _AT_A_TIME // (BLOCK * columns)) * BLOCK
    for start in range(0, rows, step):
        part = matrix[start : start + step].float()
        held = len(part)
        tiles = pad(part, (0, -columns % BLOCK, 0, -held % BLOCK)).view(-1, BLOCK, scales.shape[1], BLOCK)
        scale = (tiles.abs().amax((1, 3)) / LARGEST).clamp_(min=_SMALLEST_SCALE)
        scales[start // BLOCK : start // BLOCK + len(tiles)] = scale
        quotients = (tiles / scale[:, None, :, None]).view(len(tiles) * BLOCK, -1)
        values[start : start + held] = quotients[:held, :columns].to(values.dtype)
    return values, scales


def per_tensor(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values [rows, columns] and their scale [1]."""
    least, most = matrix.aminmax()
    scale = (torch.maximum(-least, most).float() / LARGEST).clamp_(min=_SMALLEST_SCALE).view(1)
    values = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn, device=matrix.device)
    step = max(1, _AT_A_TIME // matrix.shape[1])
    for start in range(0, len(matrix), step):
        values[start : start + step] = (matrix[start : start + step].float() / scale).to(values.dtype)
    return values, scale


def dequantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 matrix that FP8 values stand for; one scale, or one for each block."""
    return values.float() * _spread(scale, values.shape)


def allowed(matrix: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """How far each value of a float32 matrix may be from what its FP8 form stands for."""
    # the quotient by the scale and the product with it are rounded too, each to 24 bits
    rounded = torch.maximum(matrix.abs() * RELATIVE_ERROR, _spread(scale, matrix.shape) * (SMALLEST_STEP / 2))
    return rounded * (1 + 2.0**-18)


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The scale of each value of a matrix, or the one scale."""
    if scale.numel() == 1:
        return scale.view(1)
    scale = scale.repeat_interleave(BLOCK, 0)[: shape[0]]
    return scale.repeat_interleave(BLOCK, 1)[:, : shape[1]]
