"""What changed in a tensor from one version of the weights to the next. Light: no torch.

An optimizer step at a small learning rate leaves most BF16 weights as they were, so the changed elements and the
gaps between them are a fraction of the tensor. They overwrite: applied twice they do no harm.
"""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_fapo.weights import Bytes

_WORDS: dict[int, np.dtype[Any]] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
_GAPS: tuple[np.dtype[Any], ...] = (np.dtype("<u1"), np.dtype("<u2"), np.dtype("<u4"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The changed elements of one tensor."""

    base: str
    """Digest of the tensor that the change was made from."""
    gaps: npt.NDArray[Any]
    """Unchanged elements before each changed one, in the smallest unsigned type that holds them."""
    values: npt.NDArray[Any]
    """The new elements, as unsigned integers of their size."""

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return int(self.gaps.nbytes + self.values.nbytes)

    def apply(self, tensor: Bytes) -> None:
        """Overwrite. Raises ValueError when an element lies outside of the tensor."""
        words = tensor.view(self.values.dtype)
        places = np.cumsum(self.gaps.astype(np.int64) + 1) - 1
        if len(places) and places[-1] >= len(words):
            raise ValueError(f"element {places[-1]} of a tensor of {len(words)}")
        words[places] = self.values

    def to_json(self) -> dict[str, str]:
        """For a request."""
        return {
            "base": self.base,
            "gaps": base64.b64encode(self.gaps.tobytes()).decode(),
            "gap_type": self.gaps.dtype.str,
            "values": base64.b64encode(self.values.tobytes()).decode(),
            "value_type": self.values.dtype.str,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Change":
        """Back. Raises ValueError, KeyError or TypeError for what `to_json` did not make."""
        gap_type, value_type = np.dtype(data["gap_type"]), np.dtype(data["value_type"])
        if gap_type not in _GAPS or value_type not in _WORDS.values():
            raise ValueError(f"types {gap_type}, {value_type}")
        gaps = np.frombuffer(base64.b64decode(data["gaps"]), gap_type)
        values = np.frombuffer(base64.b64decode(data["values"]), value_type)
        if len(gaps) != len(values):
            raise ValueError(f"{len(gaps)} gaps, {len(values)} values")
        return cls(base=str(data["base"]), gaps=gaps, values=values)


def change(old: Bytes, new: Bytes, itemsize: int, base: str) -> Change:
    """What makes `new` of `old`, two tensors of one size with elements of `itemsize` bytes; `base` is old's digest."""
    word = _WORDS[itemsize]
    before, after = old.view(word), new.view(word)
    places = np.flatnonzero(before != after)
    gaps = np.diff(places, prepend=-1) - 1
    widest = int(gaps.max(initial=0))
    kind = next(kind for kind in _GAPS if widest <= np.iinfo(kind).max)
    return Change(base=base, gaps=gaps.astype(kind), values=after[places])
