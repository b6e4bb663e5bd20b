"""Weights out of Megatron's shards, streamed under Hugging Face names: into shared memory, or into a folder.

All ranks know the plan (`policy.pieces`) and cut it into the same buckets without asking each other.
"""

import os
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_fapo.compat.cuda_ipc import PREFIX, Block
from megatron_fapo.compat.device import here
from megatron_fapo.compat.word_sum import WordSum
from megatron_fapo.errors import PolicyError
from megatron_fapo.fp8 import Fp8, served
from megatron_fapo.held import HeldDigests, HeldLayout, Sha256, Sum
from megatron_fapo.policy.hf_folder import SHARD_BYTES, Writer
from megatron_fapo.policy.model import Model
from megatron_fapo.policy.peers import Peers
from megatron_fapo.policy.pieces import Piece, fetch, own_parts, places, plan, shapes
from megatron_fapo.policy.quantize import dequantize, quantize
from megatron_fapo.policy.target import Target, nbytes_of
from megatron_fapo.records import Bucket, TensorSpec
from megatron_fapo.weights import SUM, Segment, aligned, blocks, combined, digest, shared_memory_folder


class Export:
    """Walks over all weights, bucket by bucket. Plan and segments are kept from walk to walk."""

    def __init__(self, model: Model, seconds: float) -> None:
        """Collective. `seconds` is how long a rank waits for another."""
        self.model = model
        self._plan = plan(model.bridge, model.chunks)
        self.pieces = self._plan
        self._next = 0
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._peers = Peers(seconds) if _one_machine() else None
        self._segments: dict[Path, Segment] = {}
        self._blocks: dict[str, Block] = {}
        self._params = [dict(chunk.named_parameters()) for chunk in model.chunks]
        self._held: dict[HeldLayout, HeldDigests] = {}
        self._fp8: Fp8 | None = None

    def restart(self, layouts: Sequence[HeldLayout]) -> None:
        """See `PolicyRank.open_export`."""
        self._next = 0
        # A server that keeps all experts of a layer in one parameter must be sent them in order.
        self.pieces = self._plan if any(layout.experts for layout in layouts) else in_turn(self._plan)
        self._held = {layout: HeldDigests(layout, _SUMS[layout.digest]) for layout in layouts}
        forms = {layout.kept_in_bf16 for layout in layouts}
        if len(forms) > 1:
            raise PolicyError("servers that are published to together hold weights in different forms (BF16, FP8)")
        kept = forms.pop() if forms else None
        self._fp8 = None if kept is None else served(shapes(self.pieces), kept)

    def next_bucket(self, path: Path, nbytes: int) -> Bucket | None:
        """See `PolicyRank.next_bucket`."""
        pieces = self._cut(nbytes)
        self._next += len(pieces)
        if not pieces:
            return None
        specs = _table(pieces, self._fp8)
        used = aligned(specs[-1].offset + nbytes_of(specs[-1]))
        if str(path).startswith(PREFIX):
            return self._on_device(pieces, specs, self._block(str(path), nbytes), used)
        if self._peers is not None and self._fp8 is None:
            memory = self._map(path, nbytes)
            digests = self._write_parts(pieces, specs, memory, self._peers)
        else:
            memory = Segment.create(path, nbytes).memory if self._rank == 0 else memoryview(b"")
            spans = list(_bytes_of(specs, memory)) if self._rank == 0 else []
            self._write_fetched(pieces, [torch.frombuffer(span, dtype=torch.uint8) for span in spans])
            digests = [digest(span) for span in spans]
        if self._rank != 0:
            return None
        return self._finished(str(path), specs, digests, torch.frombuffer(memory, dtype=torch.uint8), used)

    def _on_device(
        self, pieces: Sequence[Piece], specs: Sequence[TensorSpec], block: Block | None, used: int
    ) -> Bucket | None:
        """A bucket that never leaves the devices: gathered, summed and read by servers there."""
        spans = [] if block is None else list(_bytes_of(specs, block.tensor))
        self._write_fetched(pieces, spans)
        if block is None:
            return None
        digests = [_sum_of(span) for span in spans]
        return self._finished(block.handle, specs, digests, block.tensor, used)

    def _finished(
        self, segment: str, specs: Sequence[TensorSpec], digests: Sequence[str], memory: torch.Tensor, used: int
    ) -> Bucket:
        """The table of a bucket that is written, whose bytes count for what servers must hold."""
        specs = [replace(spec, digest=digest) for spec, digest in zip(specs, digests, strict=True)]
        for held in self._held.values():
            for spec, data in summed_by_servers(specs, memory):
                held.add(spec, data)
        return Bucket(segment=segment, nbytes=used, tensors=tuple(specs))

    def close(self) -> None:
        """Leave the other ranks and give the devices' memory back; segments belong to who named them."""
        if self._peers is not None:
            self._peers.close()
        for block in self._blocks.values():
            block.close()
        self._blocks.clear()

    def _block(self, name: str, nbytes: int) -> Block | None:
        """Memory of rank 0's device under a name; kept from walk to walk. None on the other ranks."""
        if self._rank != 0:
            return None
        known = self._blocks.get(name)
        if known is not None and known.nbytes != nbytes:
            self._blocks.pop(name).close()
        if name not in self._blocks:
            try:
                self._blocks[name] = Block(nbytes)
            except RuntimeError as error:
                raise PolicyError(
                    f"no memory that servers could open (publish.transport = cuda_ipc): {error}", rank=0
                ) from None
        return self._blocks[name]

    def _map(self, path: Path, nbytes: int) -> memoryview:
        """The segment in every rank; rank 0 makes it."""
        known = self._segments.get(path)
        # Asked of every rank's own mapping; all see the same file, so all answer alike.
        if known is None or not known.is_still(nbytes):
            if self._rank == 0:
                self._segments[path] = Segment.create(path, nbytes)
            if self._world > 1:
                dist.barrier()
            if self._rank != 0:
                self._segments[path] = Segment.open(path, nbytes)
        return self._segments[path].memory

    def _write_parts(
        self, pieces: Sequence[Piece], specs: Sequence[TensorSpec], memory: memoryview, peers: Peers
    ) -> list[str]:
        """Each rank writes its shards where they belong and sums what it fills alone, then its share of the rest.

        What has to wait for other ranks is written first, so that nobody waits long.
        """
        places_of = [place for piece in pieces for place in places(piece)]
        ends = np.cumsum([blocks(nbytes_of(spec)) * SUM for spec in specs])
        table = np.zeros(ends[-1], np.uint8)  # each sum is made by one rank
        sums = np.split(table, ends[:-1])
        tensors = [Target(spec, memory, at, to) for spec, at, to in zip(specs, places_of, sums, strict=True)]
        own = list(self._own_parts(pieces, tensors))
        for tensor, part in own:
            if tensor.shared:
                tensor.put(part, self._rank)
        peers.arrive()
        for tensor, part in own:
            if not tensor.shared:
                tensor.put(part, self._rank)
        peers.all_arrived()
        shared = ((tensor, block) for tensor in tensors for block in tensor.shared)
        for tensor, block in islice(shared, self._rank, None, self._world):
            tensor.sum(block)
        peers.sum_on_first(table)
        return [combined(each.data) for each in sums]

    def _own_parts(self, pieces: Sequence[Piece], tensors: Iterable[Target]) -> Iterator[tuple[Target, torch.Tensor]]:
        """What this rank has of each tensor."""
        tensors = iter(tensors)
        for piece in pieces:
            these = [next(tensors) for _ in piece.tensors]
            if self._rank in piece.ranks:
                param = self._params[piece.chunk][piece.local_name].detach()
                parts = own_parts(self.model.bridge, param, piece)
                yield from zip(these, parts, strict=bool(parts))

    def _write_fetched(self, pieces: Sequence[Piece], spans: Sequence[torch.Tensor]) -> None:
        """Ranks send to rank 0, which writes: from other machines, into its device's memory, and in FP8, whose blocks
        may span several shards.
        """
        whole = (pair for piece in pieces for pair in fetch(self.model.bridge, self.model.chunks, piece))
        tensors = (tensor for name, one in whole for _, tensor in self._formed(name, one))
        for tensor, span in zip(tensors, spans, strict=True):  # a span that nobody fills would be summed as it was
            span.copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))

    def _formed(self, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """What the servers hold of a tensor."""
        return [(name, tensor)] if self._fp8 is None else quantize(self._fp8, name, tensor)

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


def _table(pieces: Sequence[Piece], fp8: Fp8 | None) -> list[TensorSpec]:
    """Where each tensor of a bucket lies, its digest not yet known."""
    specs, offset = [], 0
    for piece in pieces:
        dtype = str(piece.dtype).removeprefix("torch.")
        for whole, shape in piece.tensors:
            for name, part, kind in fp8.tensors(whole, shape) if fp8 else ((whole, tuple(shape), dtype),):
                specs.append(TensorSpec(name=name, dtype=kind, shape=part, offset=offset, digest=""))
                offset = aligned(offset + nbytes_of(specs[-1]))
    return specs


def _sum_of(data: torch.Tensor) -> str:
    """The digest of bytes that lie on a device."""
    total = WordSum(data.device)
    total.update(data)
    return total.hexdigest()


_SUMS: Mapping[str, Callable[[], Sum]] = {"sha256": Sha256, "words": lambda: WordSum(here())}
"""By `HeldLayout.digest`."""


Data = TypeVar("Data", memoryview, torch.Tensor)


def _bytes_of(specs: Sequence[TensorSpec], memory: Data) -> Iterator[Data]:
    """Each tensor's bytes in a bucket."""
    for spec in specs:
        yield memory[spec.offset : spec.offset + nbytes_of(spec)]


def summed_by_servers(specs: Sequence[TensorSpec], memory: torch.Tensor) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """The tensors whose bytes servers sum: those of a bucket, and for FP8 with its scales the BF16 it stands for."""
    spans = zip(specs, _bytes_of(specs, memory), strict=True)
    for spec, data in spans:
        if spec.dtype != "float8_e4m3fn":
            yield spec, data
            continue
        scale, of_scale = next(spans)
        values = data.view(torch.float8_e4m3fn).view(spec.shape)
        floats = dequantize(values, of_scale.view(torch.float32).view(scale.shape))
        yield replace(spec, dtype="bfloat16"), floats.to(torch.bfloat16).view(-1).view(torch.uint8)


def in_turn(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """The pieces of all pipeline stages and experts' ranks side by side, so that all of them write at once.

    Each group of ranks goes through its own in order, at the pace that lets all end together.
    """
    total, reached, places = defaultdict[int, int](int), defaultdict[int, int](int), []
    for piece in pieces:
        total[piece.ranks[0]] += piece.nbytes
    for piece in pieces:
        places.append(reached[piece.ranks[0]] / total[piece.ranks[0]])
        reached[piece.ranks[0]] += piece.nbytes
    return tuple(pieces[i] for i in sorted(range(len(pieces)), key=lambda i: places[i]))


def _one_machine() -> bool:
    """Whether all ranks see the same shared memory. Collective."""
    mine = (socket.gethostname(), os.stat(shared_memory_folder()).st_dev, _boot())
    everyones: list[object] = [mine] * dist.get_world_size()
    if dist.get_world_size() > 1:
        dist.all_gather_object(everyones, mine)
    return all(machine == mine for machine in everyones)


def _boot() -> str:
    """What tells a running kernel from all others, where the system has that."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text() if path.exists() else ""


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
