"""What a server must hold after an update, in the form in which that server holds and sums it.

The end that sends computes these values from its own bytes, the server from its own parameters; equal values prove
that the weights arrived whole. The embedded engine keeps tensors under Hugging Face names; SGLang fuses and shards
them, and its checker sums each parameter of each rank.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from megatron_fapo.errors import WeightsError
from megatron_fapo.records import TensorSpec

Rows = Any
"""Bytes of a tensor or of a part of one, [rows, bytes of a row]: an array of numpy's, or of torch's on any device."""

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
    """Experts of a layer, which lie stacked in two parameters on each rank; 0 where they lie otherwise."""
    expert_parallel: int = 1
    """Groups of neighbouring ranks that hold equally many experts each, a group the first ones; within a group every
    rank holds a shard of each."""
    digest: Literal["sha256", "words"] = "sha256"
    """How SGLang's checker sums a parameter: sha256 on a CPU, sums of mixed 32-bit words on CUDA."""
    kept_in_bf16: tuple[str, ...] | None = None
    """Modules that stay BF16 on a server whose other matrices are FP8 with scales of blocks; None without FP8.

    SGLang's checker sums the BF16 rounding of what FP8 values and scales stand for: that is what `HeldDigests` gets.
    """

    def share(self, rank: int, expert: int | None) -> tuple[int, int] | None:
        """Which shard of how many a rank holds of a tensor that is cut; None for an expert that other ranks hold."""
        if expert is None:
            return rank, self.tensor_parallel
        together = self.tensor_parallel // self.expert_parallel
        mine = expert * self.expert_parallel // self.experts == rank // together
        return (rank % together, together) if mine else None


class _Slot(NamedTuple):
    """Where a tensor goes."""

    parameter: str
    module: str
    part: int
    """Its place among the tensors that the parameter is made of, and their number."""
    parts: int
    expert: int | None = None


class Sum(Protocol):
    """The sum of a parameter that arrives in parts."""

    def update(self, rows: Rows) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """16 digits for all that was added."""


class Sha256:
    """As SGLang's checker sums a parameter on a CPU."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()

    def update(self, rows: Rows) -> None:
        """Add bytes that numpy can read."""
        self._sum.update(np.ascontiguousarray(rows).data)

    def hexdigest(self) -> str:
        """A quarter of sha256, which is what SGLang keeps."""
        return self._sum.hexdigest()[:16]


class HeldDigests:
    """{parameter: digest} of a layout, from tensors under Hugging Face names as they are sent.

    A parameter is named `name` or, with several ranks, `name@rank`. The parts of a fused parameter, be they
    projections or experts, may come in different buckets, but in their order.
    """

    def __init__(self, layout: HeldLayout, new_sum: Callable[[], Sum] = Sha256) -> None:
        """`new_sum` sums as `layout.digest` says; `compat.word_sum` has the other kind, which needs torch."""
        self.layout = layout
        self._new_sum = new_sum
        self._done: dict[str, str] = {}
        self._open: dict[str, tuple[int, list[Sum]]] = {}

    def add(self, spec: TensorSpec, data: memoryview | Rows) -> None:
        """One tensor and its bytes. Raises WeightsError for one whose place in the layout is unknown."""
        if self.layout.engine == "embedded":
            self._done[spec.name] = spec.digest
            return
        slot = self._slot(spec.name)
        name = slot.parameter
        flat = np.frombuffer(data, np.uint8) if isinstance(data, memoryview) else data
        rows = flat.reshape(spec.shape[0], -1)
        reached, sums = self._open.pop(name, (0, [self._new_sum() for _ in range(self.layout.tensor_parallel)]))
        if slot.part != reached:
            raise WeightsError(f"tensor {spec.name!r}: came out of order, part {slot.part} of {name} after {reached}")
        for rank, total in enumerate(sums):
            share = self.layout.share(rank, slot.expert)
            for piece in self._shard(rows, slot.module, spec, *share) if share is not None else ():
                total.update(piece)
        if slot.part + 1 < slot.parts:
            self._open[name] = (slot.part + 1, sums)
            return
        for rank, total in enumerate(sums):
            self._done[_on(name, rank, len(sums))] = total.hexdigest()

    def _slot(self, tensor: str) -> _Slot:
        match = _EXPERT.fullmatch(tensor)
        if match is not None and self.layout.experts:
            prefix, expert, module = match[1], int(match[2]), match[3]
            if module == "down_proj":
                return _Slot(f"{prefix}w2_weight", module, expert, self.layout.experts, expert)
            part = 2 * expert + (module == "up_proj")
            return _Slot(f"{prefix}w13_weight", module, part, 2 * self.layout.experts, expert)
        match = _NAME.fullmatch(tensor)
        if match is None or ".experts." in tensor:
            raise WeightsError(f"tensor {tensor!r}: how SGLang holds it is not known, so it cannot be proven there")
        prefix, module, kind = match[1] or "", match[2], match[3]
        fused, place = _PART.get(module, (module, 0))
        return _Slot(f"{prefix}{fused}.{kind}", module, place, len(_FUSED.get(fused, (module,))))

    def result(self) -> dict[str, str]:
        """All parameters. Raises WeightsError when a fused one is incomplete."""
        if self._open:
            raise WeightsError(f"{min(self._open)}: not all of its parts were sent")
        return dict(self._done)

    def _shard(self, rows: Rows, module: str, spec: TensorSpec, rank: int, ranks: int) -> Iterator[Rows]:
        """A rank's part of a tensor, in pieces."""
        if module in ("embed_tokens", "lm_head"):
            padded = -(-len(rows) // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
            each = padded // ranks
            mine = rows[rank * each : (rank + 1) * each]
            yield mine
            yield np.zeros((each - len(mine), rows.shape[1]), np.uint8)
        elif ranks == 1 or (module not in _PART and module not in ("o_proj", "down_proj")):
            yield rows
        elif module in ("o_proj", "down_proj"):
            if len(spec.shape) == 1:  # a bias, added once, after the ranks' sum
                yield rows
            else:
                each = rows.shape[1] // ranks
                yield rows[:, rank * each : (rank + 1) * each]
        else:
            copies = max(1, ranks // self.layout.kv_heads) if module in ("k_proj", "v_proj") else 1
            each = len(rows) * copies // ranks
            yield rows[rank // copies * each : (rank // copies + 1) * each]


def _on(name: str, rank: int, ranks: int) -> str:
    return name if ranks == 1 else f"{name}@{rank}"


def differing(expected: dict[str, str], held: dict[str, str]) -> list[str]:
    """Names of parameters that are missing, unexpected or not the same, sorted."""
    return sorted(name for name in expected.keys() | held.keys() if expected.get(name) != held.get(name))
