"""Weights in FP8 as SGLang serves them: which tensors, under which names and shapes, and what config.json says of it.

The matrices of attention, MLP and experts become `float8_e4m3fn` with a float32 scale for each block of 128 x 128
values (`weight_scale_inv`, the format of DeepSeek's and Qwen's published FP8 folders), or one for the whole matrix
(`weight_scale`). Embedding, head, norms, biases and the router of experts stay BF16. Light: no torch.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_fapo.errors import ConfigError

Scales = Literal["blockwise", "tensor"]
"""How far a scale reaches: a block of 128 x 128 values, or a whole matrix."""

BLOCK = 128
LARGEST = 448.0
"""The largest number of e4m3."""
RELATIVE_ERROR = 2.0**-4
"""Of a value, three bits of mantissa rounded to nearest; where e4m3 is subnormal, see `SMALLEST_STEP`."""
SMALLEST_STEP = 2.0**-9
"""Between e4m3's subnormals, in units of the scale: the error there is at most half of it."""

Shape = tuple[int, ...]

_MATRIX = re.compile(r"(.*)\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)\.weight")
_EXPERTS = re.compile(r"(.*\.experts)\.\d+")
_ROUTER = re.compile(r"(.*\.mlp\.gate)\.weight")
_TOGETHER = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv") | {"gate_proj": "gate_up", "up_proj": "gate_up"}
"""SGLang fuses these, and has a fused matrix in FP8 as a whole or not at all."""
_CUT_INSIDE = ("o_proj", "down_proj")
"""Tensor parallelism gives each rank columns of these, and rows of the others."""
_KERNEL = {"blockwise": BLOCK, "tensor": 16}
"""What SGLang's kernels, and its loader of fused matrices, want both sides of a rank's part to be a multiple of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """What of a model is FP8."""

    scales: Scales
    matrices: frozenset[str]
    """Names of the tensors that are."""
    kept: tuple[str, ...]
    """Modules that have a matrix and stay BF16: the head, routers, and what SGLang's kernels do not take."""

    def tensors(self, name: str, shape: Shape) -> tuple[tuple[str, Shape, str], ...]:
        """The tensors that one becomes: name, shape, dtype."""
        if name not in self.matrices:
            return ((name, shape, "bfloat16"),)
        blocks = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
        scale, number = ("scale_inv", blocks) if self.scales == "blockwise" else ("scale", (1,))
        return ((name, shape, "float8_e4m3fn"), (f"{name}_{scale}", number, "float32"))

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json. Activations are scaled as they come: nothing has to be calibrated."""
        blocks = {"weight_block_size": [BLOCK, BLOCK]} if self.scales == "blockwise" else {}
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            **blocks,
            "modules_to_not_convert": list(self.kept),
        }


def plan(shapes: Mapping[str, Shape], scales: Scales, tensor_parallel: int = 1, kv_heads: int | None = None) -> Fp8:
    """What of a model to quantise, from the names and shapes of its Hugging Face tensors.

    `tensor_parallel` is the size of the servers that will hold it, `kv_heads` the model's key and value heads, of which
    ranks beyond that number hold copies. A matrix that SGLang's kernels do not take at that size stays BF16.
    """
    groups: dict[str, list[str]] = {}
    fits: dict[str, bool] = {}
    kept = {"lm_head"}
    for name, shape in shapes.items():
        if match := _ROUTER.fullmatch(name):
            kept.add(match[1])
        elif match := _MATRIX.fullmatch(name):
            ranks = (
                min(tensor_parallel, kv_heads or tensor_parallel)
                if match[2] in ("k_proj", "v_proj")
                else tensor_parallel
            )
            experts = _EXPERTS.fullmatch(match[1])
            group = experts[1] if experts else f"{match[1]}.{_TOGETHER.get(match[2], match[2])}"
            groups.setdefault(group, []).append(name)
            fits[group] = fits.get(group, True) and _taken(match[2], shape, scales, ranks)
    for group, names in groups.items():
        if not fits[group]:
            kept |= {group} if group.endswith(".experts") else {name.removesuffix(".weight") for name in names}
    matrices = frozenset(name for group, names in groups.items() if fits[group] for name in names)
    return Fp8(scales=scales, matrices=matrices, kept=tuple(sorted(kept)))


def served(shapes: Mapping[str, Shape], kept: Collection[str]) -> Fp8:
    """What is FP8 on a server whose config.json keeps these modules in BF16, with scales of blocks."""
    matrices = set()
    for name in shapes:
        if match := _MATRIX.fullmatch(name):
            experts = _EXPERTS.fullmatch(match[1])
            if name.removesuffix(".weight") not in kept and (experts is None or experts[1] not in kept):
                matrices.add(name)
    return Fp8(scales="blockwise", matrices=frozenset(matrices), kept=tuple(sorted(kept)))


def kept_by(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The modules that a config.json keeps in BF16; None when it says nothing of FP8.

    Raises ConfigError for another quantisation, and for scales of whole matrices: SGLang lays such weights out anew
    once they are loaded, so that they can be served but not published to.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    if found.get("quant_method") != "fp8" or found.get("weight_block_size") != [BLOCK, BLOCK]:
        raise ConfigError(
            "weights can be published in BF16, and in FP8 with scales of blocks (`fapo convert --quantize fp8`); "
            f"quantization_config of the servers' model is {found}"
        )
    return tuple(sorted(found.get("modules_to_not_convert") or ()))


def _taken(module: str, shape: Shape, scales: Scales, ranks: int) -> bool:
    """Whether SGLang takes a matrix of this shape in FP8 when `ranks` share it."""
    multiple = _KERNEL[scales]
    rows, columns = shape
    if module in _CUT_INSIDE:
        # not fused: its last block of rows may be smaller
        return columns % (ranks * multiple) == 0 and (scales == "blockwise" or rows % multiple == 0)
    return rows % (ranks * multiple) == 0 and columns % multiple == 0
