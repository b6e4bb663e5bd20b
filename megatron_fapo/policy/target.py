"""A Hugging Face tensor in a bucket, as the ranks that hold its shards write and sum it."""

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np
import torch

from megatron_fapo.compat.memory import bytes_of
from megatron_fapo.policy.pieces import Place
from megatron_fapo.records import TensorSpec
from megatron_fapo.weights import BLOCK, SUM, Bytes, block_sum, blocks, write


class Target:
    """One tensor in shared memory. A block of it that one rank fills is summed by that rank, while it writes.

    The other blocks, those where two shards meet and all of a tensor that is cut along columns, are summed once every
    rank has written.
    """

    def __init__(self, spec: TensorSpec, memory: memoryview, places: Mapping[int, Place], sums: Bytes) -> None:
        """`memory` is the bucket, `places` where each rank's shard lies in the tensor.

        `sums` gets the sums of the blocks that this rank sums, end to end; the others' it leaves as they are.
        """
        self._spec, self._places, self._sums = spec, places, sums.data
        self._nbytes = nbytes_of(spec)
        self._bytes: Bytes = np.frombuffer(memory, np.uint8)[spec.offset : spec.offset + self._nbytes]
        filled = {block for rank in places for block in self._filled(rank)}
        self.shared = [block for block in range(blocks(self._nbytes)) if block not in filled]
        """The blocks that no rank fills alone."""

    def put(self, part: torch.Tensor, rank: int) -> None:
        """Write a rank's shard, and sum the blocks that it fills."""
        span = self._span(rank)
        if span is not None:
            write(_runs(part.cpu()), self._bytes, span[0], self._sums)
            return
        source = part.cpu().contiguous()
        kind = f"u{part.element_size()}"  # numpy copies rows that lie apart faster than torch
        target = self._bytes.view(kind).reshape(self._spec.shape)[self._places[rank]]
        np.copyto(target, np.frombuffer(bytes_of(source), kind).reshape(target.shape))

    def sum(self, block: int) -> None:
        """Sum a block that is written."""
        self._sums[block * SUM : (block + 1) * SUM] = block_sum(self._bytes[block * BLOCK : (block + 1) * BLOCK].data)

    def _filled(self, rank: int) -> range:
        """The blocks that lie wholly in a rank's shard."""
        span = self._span(rank)
        if span is None:
            return range(0)
        start, end = span
        return range(-(-start // BLOCK), blocks(end) if end == self._nbytes else end // BLOCK)

    def _span(self, rank: int) -> tuple[int, int] | None:
        """First and last byte of a rank's shard where that is rows of the tensor; None where it is columns."""
        place, shape = self._places[rank], self._spec.shape
        (start, stop), *rest = (cut.indices(size)[:2] for cut, size in zip(place, shape, strict=False))
        if any(stop - start < size for (start, stop), size in zip(rest, shape[1:], strict=False)):
            return None
        return start * self._nbytes // shape[0], stop * self._nbytes // shape[0]


def nbytes_of(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    return int(prod(spec.shape) * getattr(torch, spec.dtype).itemsize)


def _runs(part: torch.Tensor) -> Iterator[Bytes]:
    """The bytes of a shard in order; as few views of it as there are groups of heads, or one."""
    for piece in [part] if part.is_contiguous() else part:
        whole = piece.contiguous()
        yield np.frombuffer(bytes_of(whole), np.uint8)
