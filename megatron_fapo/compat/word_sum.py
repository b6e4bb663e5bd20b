"""The sum by which SGLang's checker knows a parameter on CUDA, computed with torch on any device.

SGLang 0.5.17 to 0.5.23 (`kernels/ops/memory/gpu_tensor_hash.py`): each 32-bit word is mixed with its place in the
parameter, twice with different constants; the mixed words are added within tiles of 8192 words; each tile's two sums
are mixed with the parameter's size into 64 bits, the tiles are added, and that is mixed once more. So a parameter can
be summed part by part, in the order of its bytes.
"""

from typing import Any

import torch

TILE = 8192
"""Words that are added before they are mixed again."""
_WORD = 4
_LOW = 0xFFFFFFFF
_SEEDS = (0x243F6A88, 0x02C74EE7)
_PLACES = (0x27D4EB2D, 0x165667B1)
_TURNS = (15, 13)
_MIX = (0x85EBCA6B, 0xC2B2AE35)
_CHUNK = 256
"""Tiles that are mixed at a time: 8 MB, and a few times that for what is on the way."""


class WordSum:
    """The sum of one parameter (see `held.Sum`)."""

    def __init__(self, device: torch.device | None = None) -> None:
        """Bytes that are elsewhere are copied to `device` to be summed there."""
        self._device = device or torch.device("cpu")
        self._rest = torch.empty(0, dtype=torch.uint8, device=self._device)
        """The bytes after the last full tile."""
        self._tiles: list[torch.Tensor] = []
        """[2, tiles], of each tile the two sums of its mixed words."""
        self._words = 0

    def update(self, rows: Any) -> None:
        """Add bytes: an array of numpy's or torch's."""
        added = torch.as_tensor(rows, device=self._device).reshape(-1)
        data = torch.cat([self._rest, added]) if len(self._rest) else added
        whole = len(data) // (TILE * _WORD) * TILE * _WORD
        if whole:
            self._add(data[:whole])
        self._rest = data[whole:].clone()

    def hexdigest(self) -> str:
        """16 digits for all bytes so far; nothing can be added afterwards."""
        if len(self._rest):
            self._add(torch.nn.functional.pad(self._rest, (0, -len(self._rest) % _WORD)))
        if not self._words:
            return f"{0:016x}"
        size, total = self._words * _WORD & _LOW, 0
        for high, low in zip(*torch.cat(self._tiles, dim=1).tolist(), strict=True):
            total += _mixed(high ^ size) << 32 | _mixed(low ^ size)
        return f"{_finished(total):016x}"

    def _add(self, data: torch.Tensor) -> None:
        """Mix and add the words of whole tiles, or of the last and shorter one."""
        words = data.view(torch.int32) if data.data_ptr() % _WORD == 0 else data.clone().view(torch.int32)
        for start in range(0, len(words), _CHUNK * TILE):
            part = words[start : start + _CHUNK * TILE]
            places = torch.arange(self._words, self._words + len(part), device=self._device).to(torch.int32)
            width = min(TILE, len(part))
            sums = [_mix(part ^ _placed(places, number)).view(-1, width) for number in (0, 1)]
            added = [(mixed.to(torch.int64) & _LOW).sum(dim=1) & _LOW for mixed in sums]
            self._tiles.append(torch.stack(added))
            self._words += len(part)


def _placed(places: torch.Tensor, number: int) -> torch.Tensor:
    """What the words at these places are mixed with, of two kinds."""
    turned = (places << _TURNS[number]) | _shifted(places, 32 - _TURNS[number])
    return (places * _signed(_PLACES[number]) + _signed(_SEEDS[number])) ^ turned


def _mix(words: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser of 32 bits."""
    words = (words ^ _shifted(words, 16)) * _signed(_MIX[0])
    words = (words ^ _shifted(words, 13)) * _signed(_MIX[1])
    return words ^ _shifted(words, 16)


def _shifted(words: torch.Tensor, by: int) -> torch.Tensor:
    """Shifted right with zeros coming in: torch's int32 brings in the sign."""
    return (words >> by) & (_LOW >> by)


def _signed(word: int) -> int:
    """An unsigned word as the int32 with its bits."""
    return word - (1 << 32) if word >> 31 else word


def _mixed(word: int) -> int:
    """`_mix` of one word."""
    word = (word ^ word >> 16) * _MIX[0] & _LOW
    word = (word ^ word >> 13) * _MIX[1] & _LOW
    return word ^ word >> 16


def _finished(total: int) -> int:
    """The finaliser of splitmix64."""
    low = (1 << 64) - 1
    total &= low
    total = (total ^ total >> 30) * 0xBF58476D1CE4E5B9 & low
    total = (total ^ total >> 27) * 0x94D049BB133111EB & low
    return total ^ total >> 31
