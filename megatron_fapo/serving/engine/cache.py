"""Keys and values of all running samples, one row a sample."""

import torch
from torch import Tensor


class KVCache:
    """`keys[layer]` and `values[layer]` are [rows, kv_heads, length, head_dim]; sample r owns row r.

    Rows and length grow by doubling, so that memory follows what is in use and not what is allowed.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self._shape = (layers, kv_heads, head_dim)
        self._dtype = dtype
        self.rows = 0
        self.length = 0
        self.data = torch.empty(0, dtype=dtype)
        """[layers, 2, rows, kv_heads, length, head_dim]"""
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reserve(self, rows: int, length: int, used: int) -> None:
        """Make room for `rows` samples of `length` tokens; the first `used` rows keep what they hold."""
        if rows <= self.rows and length <= self.length:
            return
        old, old_length = self.data, self.length
        self.rows = max(self.rows, -(-rows // 16) * 16)
        while self.length < length:
            self.length = max(64, 2 * self.length)
        layers, heads, dim = self._shape
        # Zeros, not garbage: a masked position has weight 0, and 0 * NaN would spread.
        self.data = torch.zeros(layers, 2, self.rows, heads, self.length, dim, dtype=self._dtype)
        if used:
            self.data[:, :, :used, :, :old_length] = old[:, :, :used]
        self.keys, self.values = list(self.data[:, 0]), list(self.data[:, 1])

    def store(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        """Write prompts' keys and values [n, kv_heads, P, head_dim] into rows `row`..`row + n`."""
        n, _, prompt, _ = keys.shape
        self.keys[layer][row : row + n, :, :prompt] = keys
        self.values[layer][row : row + n, :, :prompt] = values

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first `length` tokens of rows `sources` to rows `targets` [n]."""
        self.data[:, :, targets, :, :length] = self.data[:, :, sources, :, :length]

    def free(self) -> None:
        """Give the memory back; `reserve` takes it again."""
        self.rows = self.length = 0
        self.data = torch.empty(0, dtype=self._dtype)
        self.keys, self.values = [], []

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.data.numel() * self.data.element_size()
