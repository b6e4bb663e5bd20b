"""What a server must hold after an update, in the form in which that server holds and sums it.

The end that sends computes these values from its own bytes, the server from its own parameters; equal values prove
that the weights arrived whole. The embedded engine keeps tensors under Hugging Face names; SGLang fuses and shards
them, and its checker sums each parameter of each rank.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_fapo.errors import WeightsError
from megatron_fapo.records import TensorSpec

Bytes = npt.NDArray[np.uint8]

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PART = {part: (fused, parts.index(part)) for fused, parts in _FUSED.items() for part in parts}
_NAME = re.compile(r"(.*\.)?(\w+)\.(weight|bias)")
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_VOCABULARY_PADDING = 64
"""SGLang rounds the rows of embedding and head up to this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldLayout:
    """How a server holds a model."""

    engine: Literal["embedded", "sglang"] = "embedded"
    tensor_parallel: int = 1
    kv_heads: int = 1
    """Key and value heads of the model; ranks beyond this number hold copies."""
    experts: int = 0
    """Experts of a layer, of which every rank holds a shard of each, in two parameters; 0 where they lie otherwise."""
    kept_in_bf16: tuple[str, ...] | None = None
    """Modules that stay BF16 on a server whose other matrices are FP8 with scales of blocks; None without FP8.

    SGLang's checker sums the BF16 rounding of what FP8 values and scales stand for: that is what `HeldDigests` gets.
    """


class HeldDigests:
    """{parameter: digest} of a layout, from tensors under Hugging Face names as they are sent.

    A parameter is named `name` or, with several ranks, `name@rank`. The parts of a fused parameter, be they
    projections or experts, may come in different buckets, but in their order.
    """

    def __init__(self, layout: HeldLayout) -> None:
        self.layout = layout
        self._done: dict[str, str] = {}
        self._open: dict[str, tuple[int, list[hashlib._Hash]]] = {}

    def add(self, spec: TensorSpec, data: memoryview) -> None:
        """One tensor and its bytes. Raises WeightsError for one whose place in the layout is unknown."""
        if self.layout.engine == "embedded":
            self._done[spec.name] = spec.digest
            return
        name, module, place, parts = self._slot(spec.name)
        rows = np.frombuffer(data, np.uint8).reshape(spec.shape[0], -1)
        reached, sums = self._open.pop(name, (0, [hashlib.sha256() for _ in range(self.layout.tensor_parallel)]))
        if place != reached:
            raise WeightsError(f"tensor {spec.name!r}: came out of order, part {place} of {name} after {reached}")
        for rank, total in enumerate(sums):
            for piece in self._shard(rows, module, spec, rank):
                total.update(piece)
        if place + 1 < parts:
            self._open[name] = (place + 1, sums)
            return
        for rank, total in enumerate(sums):
            self._done[_on(name, rank, len(sums))] = total.hexdigest()[:16]

    def _slot(self, tensor: str) -> tuple[str, str, int, int]:
        """The parameter that a tensor goes to, which module's it is, and which part of how many."""
        match = _EXPERT.fullmatch(tensor)
        if match is not None and self.layout.experts and self.layout.kept_in_bf16 is None:
            prefix, expert, module = match[1], int(match[2]), match[3]
            if module == "down_proj":
                return f"{prefix}w2_weight", module, expert, self.layout.experts
            return f"{prefix}w13_weight", module, 2 * expert + (module == "up_proj"), 2 * self.layout.experts
        match = _NAME.fullmatch(tensor)
        if match is None or ".experts." in tensor:
            raise WeightsError(f"tensor {tensor!r}: how SGLang holds it is not known, so it cannot be proven there")
        prefix, module, kind = match[1] or "", match[2], match[3]
        fused, place = _PART.get(module, (module, 0))
        return f"{prefix}{fused}.{kind}", module, place, len(_FUSED.get(fused, (module,)))

    def result(self) -> dict[str, str]:
        """All parameters. Raises WeightsError when a fused one is incomplete."""
        if self._open:
            raise WeightsError(f"{min(self._open)}: not all of its parts were sent")
        return dict(self._done)

    def _shard(self, rows: Bytes, module: str, spec: TensorSpec, rank: int) -> Iterator[memoryview]:
        """A rank's part of a tensor, as contiguous pieces. `rows` is [rows, bytes of a row]."""
        ranks = self.layout.tensor_parallel
        if module in ("embed_tokens", "lm_head"):
            padded = -(-len(rows) // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
            each = padded // ranks
            mine = rows[rank * each : (rank + 1) * each]
            yield mine.data
            yield bytes((each - len(mine)) * rows.shape[1])  # type: ignore[misc]
        elif ranks == 1 or (module not in _PART and module not in ("o_proj", "down_proj")):
            yield rows.data
        elif module in ("o_proj", "down_proj"):
            if len(spec.shape) == 1:  # a bias, added once, after the ranks' sum
                yield rows.data
            else:
                each = rows.shape[1] // ranks
                yield np.ascontiguousarray(rows[:, rank * each : (rank + 1) * each]).data
        else:
            copies = max(1, ranks // self.layout.kv_heads) if module in ("k_proj", "v_proj") else 1
            each = len(rows) * copies // ranks
            yield rows[rank // copies * each : (rank // copies + 1) * each].data


def _on(name: str, rank: int, ranks: int) -> str:
    return name if ranks == 1 else f"{name}@{rank}"


def differing(expected: dict[str, str], held: dict[str, str]) -> list[str]:
    """Names of parameters that are missing, unexpected or not the same, sorted."""
    return sorted(name for name in expected.keys() | held.keys() if expected.get(name) != held.get(name))
