"""Tensors in memory as an exporter: real segments, a real sender of a process group."""

import asyncio

import torch

from megatron_fapo.held import HeldDigests, HeldLayout
from megatron_fapo.policy.sender import Sender
from megatron_fapo.records import Bucket, TensorSpec
from megatron_fapo.weights import Segment, aligned, digest


class Source:
    """Writes its tensors into buckets, as many as fit. `flip` is a tensor of which a byte flips once it is summed."""

    def __init__(self, tensors: dict[str, torch.Tensor], flip: str | None = None) -> None:
        self.tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        self.flip = flip
        self.left: list[str] = []
        self.sender: Sender | None = None
        self.exports = 0

    async def open_export(self, layouts) -> None:
        self.left = list(self.tensors)
        self.held = {layout: HeldDigests(layout) for layout in layouts}
        self.exports += 1

    async def expected(self, layout: HeldLayout) -> dict[str, str]:
        return self.held[layout].result()

    async def next_bucket(self, segment: str, nbytes: int) -> Bucket | None:
        if not self.left:
            return None
        memory = Segment.create(segment, nbytes).memory
        offset, specs, flipped = 0, [], None
        while self.left and offset + self.size(self.left[0]) <= nbytes:
            name = self.left.pop(0)
            tensor = self.tensors[name]
            data = tensor.view(-1).view(torch.uint8).numpy().tobytes()
            memory[offset : offset + len(data)] = data
            dtype = str(tensor.dtype).removeprefix("torch.")
            spec = TensorSpec(name=name, dtype=dtype, shape=tuple(tensor.shape), offset=offset, digest=digest(data))
            for held in self.held.values():
                held.add(spec, memory[offset : offset + len(data)])
            specs.append(spec)
            flipped = offset + 1 if name == self.flip else flipped
            offset = aligned(offset + len(data))
        if flipped is not None:
            memory[flipped] ^= 1
        return Bucket(segment=segment, nbytes=offset, tensors=tuple(specs))

    def size(self, name: str) -> int:
        return self.tensors[name].numel() * self.tensors[name].element_size()

    async def open_group(self, name: str, host: str, backend: str, seconds: float) -> tuple[str, int]:
        self.sender = Sender(name, host, backend, seconds)
        return host, self.sender.port

    async def join_group(self, world: int) -> str:
        return await asyncio.to_thread(self.sender.join, world)

    async def send_bucket(self, bucket: Bucket) -> str:
        return await asyncio.to_thread(self.sender.send, bucket)

    async def close_group(self) -> None:
        self.sender = None
