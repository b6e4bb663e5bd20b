"""Weights out of Megatron's shards, streamed under Hugging Face names: into shared memory, or into a folder.

All ranks know the plan (`policy.pieces`) and cut it into the same buckets without asking each other.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_fapo.errors import PolicyError
from megatron_fapo.held import HeldDigests, HeldLayout
from megatron_fapo.policy.hf_folder import SHARD_BYTES, Writer
from megatron_fapo.policy.model import Model
from megatron_fapo.policy.pieces import Piece, fetch, plan
from megatron_fapo.records import Bucket, TensorSpec
from megatron_fapo.weights import Segment, aligned, digest


class Export:
    """One walk over all weights, bucket by bucket."""

    def __init__(self, model: Model, layouts: Sequence[HeldLayout] = ()) -> None:
        self.model = model
        self.pieces = plan(model.bridge, model.chunks)
        self._next = 0
        self._held = {layout: HeldDigests(layout) for layout in layouts}

    def next_bucket(self, path: Path, nbytes: int) -> Bucket | None:
        """See `PolicyRank.next_bucket`."""
        pieces = self._cut(nbytes)
        self._next += len(pieces)
        if not pieces:
            return None
        writing = dist.get_rank() == 0
        memory = Segment.create(path, nbytes).memory if writing else memoryview(bytearray(1))
        target = torch.frombuffer(memory, dtype=torch.uint8)
        specs: list[TensorSpec] = []
        offset = 0
        for piece in pieces:
            for name, tensor in fetch(self.model.bridge, self.model.chunks, piece):
                spec = _write(name, tensor, target, offset)
                specs.append(spec)
                for held in self._held.values():
                    held.add(spec, memory[offset : offset + tensor.numel() * tensor.itemsize])
                offset = aligned(offset + tensor.numel() * tensor.itemsize)
        return Bucket(segment=str(path), nbytes=offset, tensors=tuple(specs)) if writing else None

    def expected(self, layout: HeldLayout) -> dict[str, str] | None:
        """See `PolicyRank.expected`."""
        return self._held[layout].result() if dist.get_rank() == 0 else None

    def _cut(self, nbytes: int) -> Sequence[Piece]:
        """The next pieces that fit together."""
        rest = self.pieces[self._next :]
        fitting, used = 0, 0
        for piece in rest:
            used += piece.nbytes
            if used > nbytes:
                break
            fitting += 1
        if rest and not fitting:
            names = ", ".join(name for name, _ in rest[0].tensors)
            raise PolicyError(f"{names} need a bucket of {rest[0].nbytes} bytes, the bucket has {nbytes}")
        return rest[:fitting]


def _write(name: str, tensor: torch.Tensor, target: torch.Tensor, offset: int) -> TensorSpec:
    place = target[offset : offset + tensor.numel() * tensor.itemsize]
    place.copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
    return TensorSpec(
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        offset=offset,
        digest=digest(place.numpy().data),
    )


def save_hf(model: Model, source: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write weights, shard by shard, and the files of `source` that go with them. Collective; rank 0 writes.

    The folder appears under its name only when it is complete, replacing one of the same name.
    """
    writer = Writer(folder, shard_bytes) if dist.get_rank() == 0 else None
    for piece in plan(model.bridge, model.chunks):
        for name, tensor in fetch(model.bridge, model.chunks, piece):
            assert writer is not None  # rank 0 alone gets tensors
            writer.add(name, tensor)
    if writer is not None:
        writer.close(source)
    dist.barrier()
