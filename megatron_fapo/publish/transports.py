"""The ways for weights: through shared memory, a GPU's memory, a folder, a process group, or as what changed.

Each takes the exporter's buckets one by one; none keeps weights in memory between calls.
"""

import asyncio
import json
import os
import shutil
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fapo.delta import Change, change, least_bytes
from megatron_fapo.errors import BaseDiffers, WeightsError
from megatron_fapo.publish.interface import Exporter, WeightTransport
from megatron_fapo.publish.publisher import settled
from megatron_fapo.publish.settings import PublishSettings
from megatron_fapo.records import Bucket, TensorSpec
from megatron_fapo.serving.interface import WeightReceiver
from megatron_fapo.serving.receiver import Group
from megatron_fapo.weights import ITEMSIZE, Bytes, Segment, shared_memory_folder

_SAFETENSORS = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip

Changes = list[tuple[TensorSpec, Change]]
"""What changed in a bucket, tensor by tensor."""


def make_transport(settings: PublishSettings, name: str, folder: Path) -> WeightTransport:
    """The way that settings choose. `name` marks its segments and groups, `folder` is the run's own."""
    match settings.transport:
        case "disk":
            return Disk(settings, name, settings.folder or folder / "weights")
        case "group":
            return ProcessGroup(settings, name)
        case "cuda_ipc":
            return CudaIpc(settings, name)
        case "delta":
            return Delta(settings, name, settings.folder or folder / "weights")
        case "auto" | "shared_memory":
            return SharedMemory(settings, name)


class SharedMemory:
    """Buckets through files in shared memory, for servers on the exporter's machine."""

    def __init__(self, settings: PublishSettings, name: str) -> None:
        self._nbytes = int(settings.bucket_megabytes * 2**20)
        self._segments = [shared_memory_folder() / f"fapo-{name}-{slot}" for slot in (0, 1)]

    async def send(self, exporter: Exporter, receivers: Sequence[WeightReceiver]) -> list[Bucket]:
        """Fill one segment while the receivers read the other."""
        sent: list[Bucket] = []
        delivering: asyncio.Future[None] | None = None
        try:
            while True:
                segment = self._segments[len(sent) % 2]
                bucket = await exporter.next_bucket(str(segment), self._nbytes)
                if delivering is not None:
                    await delivering
                if bucket is None:
                    return sent
                delivering = asyncio.ensure_future(self._deliver(exporter, bucket, len(sent), receivers))
                sent.append(bucket)
        except BaseException:
            if delivering is not None:  # the next update writes where they still read
                await asyncio.gather(delivering, return_exceptions=True)
            raise

    async def _deliver(
        self, exporter: Exporter, bucket: Bucket, number: int, receivers: Sequence[WeightReceiver]
    ) -> None:
        """Bring a bucket to all receivers; its segment may be written again afterwards."""
        await settled([receiver.load_bucket(bucket) for receiver in receivers])

    def close(self) -> None:
        """Unlink both segments."""
        for segment in self._segments:
            segment.unlink(missing_ok=True)


class CudaIpc(SharedMemory):
    """Buckets in the memory of the first rank's GPU, which servers on the same machine open (CUDA IPC)."""

    def __init__(self, settings: PublishSettings, name: str) -> None:
        super().__init__(settings, name)
        self._segments = [Path(f"cuda-ipc:{slot}") for slot in (0, 1)]

    def close(self) -> None:
        """The memory is the exporter's, who gives it back."""


class Disk(SharedMemory):
    """Safetensors files in a folder that all servers see, a file a bucket; it appears whole or not at all."""

    def __init__(self, settings: PublishSettings, name: str, folder: Path) -> None:
        super().__init__(settings, name)
        self._folder = folder

    async def send(self, exporter: Exporter, receivers: Sequence[WeightReceiver]) -> list[Bucket]:
        """Write all files, then let the receivers read them. The folder is removed when they have."""
        whole, part = self._folder / "published", self._folder / "part"
        for folder in (whole, part):
            shutil.rmtree(folder, ignore_errors=True)
        part.mkdir(parents=True)
        sent = await super().send(exporter, receivers)
        part.rename(whole)
        await settled([receiver.load_folder(str(whole.absolute())) for receiver in receivers])
        shutil.rmtree(whole)
        return sent

    async def _deliver(
        self, exporter: Exporter, bucket: Bucket, number: int, receivers: Sequence[WeightReceiver]
    ) -> None:
        await asyncio.to_thread(write_safetensors, bucket, self._folder / "part" / f"model-{number:05}.safetensors")

    def close(self) -> None:
        """Remove what a failed update left."""
        super().close()
        for folder in ("published", "part"):
            shutil.rmtree(self._folder / folder, ignore_errors=True)


class ProcessGroup(SharedMemory):
    """Broadcast by the exporter's first rank, over gloo or NCCL, to servers wherever they are.

    The group is made for each update, so that servers may come and go between updates.
    """

    def __init__(self, settings: PublishSettings, name: str) -> None:
        super().__init__(settings, name)
        self._settings, self._name, self._count = settings, name, 0

    async def send(self, exporter: Exporter, receivers: Sequence[WeightReceiver]) -> list[Bucket]:
        """Meet, send bucket after bucket, part; after a failure, those who are left part too."""
        self._count += 1
        self._group = f"fapo-{self._name}-{self._count}"
        try:
            sent = await self._send(exporter, receivers)
        except Exception:
            leaving = [receiver.leave_group(self._group) for receiver in receivers]
            await asyncio.gather(*leaving, return_exceptions=True)
            raise
        await exporter.close_group()
        await settled([receiver.leave_group(self._group) for receiver in receivers])
        return sent

    async def _send(self, exporter: Exporter, receivers: Sequence[WeightReceiver]) -> list[Bucket]:
        settings = self._settings
        ranks = [(await receiver.layout()).tensor_parallel for receiver in receivers]
        world = 1 + sum(ranks)
        host, port = await exporter.open_group(
            self._group, settings.group_address or "127.0.0.1", settings.group_backend, settings.group_timeout
        )
        first = Group(
            name=self._group, host=host, port=port, rank=1, world=world, backend=settings.group_backend,
            seconds=settings.group_timeout,
        )  # fmt: skip
        places = [replace(first, rank=1 + sum(ranks[:number])) for number in range(len(ranks))]
        joining = [receiver.join_group(place) for receiver, place in zip(receivers, places, strict=True)]
        await _meet(exporter.join_group(world), joining)
        sent: list[Bucket] = []
        while (bucket := await exporter.next_bucket(str(self._segments[0]), self._nbytes)) is not None:
            await self._deliver(exporter, bucket, len(sent), receivers)
            sent.append(bucket)
        return sent

    async def _deliver(
        self, exporter: Exporter, bucket: Bucket, number: int, receivers: Sequence[WeightReceiver]
    ) -> None:
        await _meet(exporter.send_bucket(bucket), [receiver.load_sent(bucket, self._group) for receiver in receivers])


class Delta(SharedMemory):
    """Only the elements that changed since the last version, in the requests themselves.

    The last version lies in files of `folder`, a bucket each, read and written tensor by tensor. Where it does not
    fit (the first update, another plan) or a receiver holds something else, everything is sent in full; so is a
    bucket of which more than a quarter would have to be sent, and all to a receiver that takes no changes.
    """

    _WORTH = 0.25

    def __init__(self, settings: PublishSettings, name: str, folder: Path) -> None:
        super().__init__(settings, name)
        self._folder = folder / "base"
        self._last: list[Bucket] = []
        self._full = True
        self.nbytes = 0
        """Bytes that the last update sent to all receivers."""
        self.changed: int | None = 0
        """Bytes of what changed in the last update, sent or not; of a bucket that was sent in full at least so many.
        None for an update without a base."""

    async def send(self, exporter: Exporter, receivers: Sequence[WeightReceiver]) -> list[Bucket]:
        """Send what changed; everything once more when a receiver refuses for its base."""
        self._folder.mkdir(parents=True, exist_ok=True)
        layouts = tuple(dict.fromkeys([await receiver.layout() for receiver in receivers]))
        try:
            sent = await self._send(exporter, receivers, full=not self._last)
        except BaseDiffers:
            await exporter.open_export(layouts)
            sent = await self._send(exporter, receivers, full=True)
        return sent

    async def _send(self, exporter: Exporter, receivers: Sequence[WeightReceiver], *, full: bool) -> list[Bucket]:
        # Until this update is through, the files are of no version: a failure must not leave a base behind.
        self._base, self._last, self._full, self.nbytes = self._last, [], full, 0
        self.changed = None if full else 0
        self._last = await super().send(exporter, receivers)
        return self._last

    async def _deliver(
        self, exporter: Exporter, bucket: Bucket, number: int, receivers: Sequence[WeightReceiver]
    ) -> None:
        path = self._folder / f"{number:05}"
        fits = not self._full and number < len(self._base) and _same_places(self._base[number], bucket)
        base, most = self._base[number] if fits else None, int(self._WORTH * bucket.nbytes)
        changes, nbytes = await asyncio.to_thread(replace_base, path, bucket, base, most)
        self.changed = None if self.changed is None or nbytes is None else self.changed + nbytes
        await settled([self._bring(receiver, bucket, changes) for receiver in receivers])

    async def _bring(self, receiver: WeightReceiver, bucket: Bucket, changes: Changes | None) -> None:
        if changes is not None and await receiver.load_changes(changes):
            self.nbytes += sum(made.nbytes for _, made in changes)
        else:
            await receiver.load_bucket(bucket)
            self.nbytes += bucket.nbytes

    def close(self) -> None:
        """Remove segments and base."""
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)


async def _meet(sending: Coroutine[Any, Any, str], receiving: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Both ends of a collective, until both are done. A failure of the sender's own counts first, since those of the
    receivers follow from it; what a receiver says counts before what the sender complains of.
    """
    complaint, received = await asyncio.gather(sending, settled(receiving), return_exceptions=True)
    for result in (complaint, received):
        if isinstance(result, BaseException):
            raise result
    if complaint:
        raise WeightsError(str(complaint))


def write_safetensors(bucket: Bucket, path: Path) -> None:
    """A bucket as a file of the safetensors format, durable when this returns."""
    memory = Segment.open(bucket.segment, bucket.nbytes).memory
    header, offset = {}, 0
    for spec in bucket.tensors:
        end = offset + nbytes_of(spec)
        header[spec.name] = {
            "dtype": _SAFETENSORS[spec.dtype], "shape": spec.shape, "data_offsets": (offset, end)
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in bucket.tensors:
            file.write(memory[spec.offset : spec.offset + nbytes_of(spec)])
        file.flush()
        os.fsync(file.fileno())


def replace_base(path: Path, bucket: Bucket, base: Bucket | None, most: int) -> tuple[Changes | None, int | None]:
    """Let a file hold the bucket instead of `base`, the bucket that it holds now.

    What changed, tensor by tensor, None where that is more than `most` bytes; and its bytes, None without a base.
    """
    new = np.frombuffer(Segment.open(bucket.segment, bucket.nbytes).memory, np.uint8)
    if base is None:
        path.write_bytes(new.data)
        return None, None
    changes: Changes | None = []
    total = 0
    for before, spec in zip(base.tensors, bucket.tensors, strict=True):
        size, itemsize = nbytes_of(spec), ITEMSIZE[spec.dtype]
        there = new[spec.offset : spec.offset + size]
        held: Bytes = np.memmap(path, np.uint8, mode="r+", offset=spec.offset, shape=(size,))
        least = least_bytes(held, there, itemsize)
        if changes is None or total + least > most:
            changes, total = None, total + least
            held[:] = there
            continue
        made = change(held, there, itemsize, before.digest)
        made.apply(held)
        changes.append((spec, made))
        total += made.nbytes
    return (None if total > most else changes), total


def nbytes_of(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    return prod(spec.shape) * ITEMSIZE[spec.dtype]


def _same_places(one: Bucket, other: Bucket) -> bool:
    """Whether two buckets have the same tensors at the same places."""
    return [(t.name, t.dtype, t.shape, t.offset) for t in one.tensors] == [
        (t.name, t.dtype, t.shape, t.offset) for t in other.tensors
    ]
