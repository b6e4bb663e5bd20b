"""What changed in a tensor from one version of the weights to the next. Light: no torch.

An optimizer step at a small learning rate leaves most BF16 weights as they were, so the changed elements and the
gaps between them are a fraction of the tensor. They overwrite: applied twice they do no harm.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_fapo.weights import Bytes

_WORDS: dict[int, np.dtype[Any]] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
_GAPS: tuple[np.dtype[Any], ...] = (np.dtype("<u1"), np.dtype("<u2"), np.dtype("<u4"))
_STRIDE = 2**18
"""Elements that are compared or overwritten at a time: a place takes eight bytes, four times a BF16 weight."""


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
        words, last = tensor.view(self.values.dtype), -1
        end = int(self.gaps.sum(dtype=np.int64)) + len(self.gaps)
        if end > len(words):
            raise ValueError(f"element {end - 1} of a tensor of {len(words)}")
        for start in range(0, len(self.gaps), _STRIDE):
            places = np.cumsum(self.gaps[start : start + _STRIDE].astype(np.int64) + 1) + last
            words[places] = self.values[start : start + _STRIDE]
            last = int(places[-1])

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
    gaps, values, last = [np.zeros(0, _GAPS[-1])], [np.zeros(0, _WORDS[itemsize])], -1
    for start, before, after in _strides(old, new, itemsize):
        places = np.flatnonzero(before != after)
        values.append(after[places])
        gaps.append((np.diff(places + start, prepend=last) - 1).astype(_GAPS[-1]))
        last = int(places[-1]) + start if len(places) else last
    widest = max(int(each.max(initial=0)) for each in gaps)
    kind = next(kind for kind in _GAPS if widest <= np.iinfo(kind).max)
    narrow = np.concatenate([each.astype(kind) for each in gaps])
    return Change(base=base, gaps=narrow, values=np.concatenate(values))


def least_bytes(old: Bytes, new: Bytes, itemsize: int) -> int:
    """What a change has at least on the wire, told without making it: a byte of gap for each changed element."""
    count = sum(int(np.count_nonzero(before != after)) for _, before, after in _strides(old, new, itemsize))
    return count * (itemsize + _GAPS[0].itemsize)


def _strides(old: Bytes, new: Bytes, itemsize: int) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[Any]]]:
    """Two tensors of one size, some elements at a time: the first one's number, and both as unsigned integers."""
    before, after = old.view(_WORDS[itemsize]), new.view(_WORDS[itemsize])
    for start in range(0, len(before), _STRIDE):
        yield start, before[start : start + _STRIDE], after[start : start + _STRIDE]
