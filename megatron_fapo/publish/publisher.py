"""Moves the policy's weights to its servers and confirms that they arrived whole.

Knows neither Megatron nor Ray: an `Exporter` fills buckets, `WeightReceiver`s load them. No rank, no driver and
no server ever holds a second whole model: two buckets are alive at a time, one being filled, one being read.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_fapo.errors import WeightsError
from megatron_fapo.publish.settings import PublishSettings
from megatron_fapo.records import Bucket, WeightVersion
from megatron_fapo.serving.interface import WeightReceiver
from megatron_fapo.weights import checksum, shared_memory_folder


class Exporter(Protocol):
    """The trained model, as the end that sends."""

    async def open_export(self) -> None:
        """Start over at the first tensor."""

    async def next_bucket(self, segment: str, nbytes: int) -> Bucket | None:
        """Write the next tensors, at most `nbytes` together, into a shared-memory file; None when all were sent."""


class WeightTransport(Protocol):
    """A way for tensors to get from an exporter to receivers.

    The receivers have an open update; `send` returns {tensor name: digest} of everything that it delivered, as
    the exporter computed them, and raises what the two ends raise. It holds no model between calls.
    """

    async def send(self, exporter: Exporter, receivers: Sequence[WeightReceiver]) -> dict[str, Bucket]:
        """Deliver every tensor to every receiver; {segment and number: bucket} in the order sent."""

    def close(self) -> None:
        """Free what the transport holds."""


class SharedMemory:
    """Buckets through files in shared memory, for servers on the exporter's machine."""

    def __init__(self, settings: PublishSettings, name: str) -> None:
        self._nbytes = int(settings.bucket_megabytes * 2**20)
        self._segments = [shared_memory_folder() / f"fapo-{name}-{slot}" for slot in (0, 1)]

    async def send(self, exporter: Exporter, receivers: Sequence[WeightReceiver]) -> dict[str, Bucket]:
        """Fill one segment while the receivers read the other."""
        sent: dict[str, Bucket] = {}
        loading: asyncio.Future[list[None]] | None = None
        await exporter.open_export()
        while True:
            segment = self._segments[len(sent) % 2]
            bucket = await exporter.next_bucket(str(segment), self._nbytes)
            if loading is not None:
                await loading
            if bucket is None:
                return sent
            sent[f"{len(sent)}"] = bucket
            loading = asyncio.gather(*(receiver.load_bucket(bucket) for receiver in receivers))

    def close(self) -> None:
        """Unlink both segments."""
        for segment in self._segments:
            Path(segment).unlink(missing_ok=True)


async def publish(
    exporter: Exporter, receivers: Sequence[WeightReceiver], transport: WeightTransport, version: int
) -> WeightVersion:
    """Bring every receiver to the exporter's present weights as `version`, and prove it.

    Each receiver computes a checksum from the parameters that it holds; it must equal the one over the digests of
    what the exporter sent. Raises WeightsError naming the receiver's place otherwise; its update then stays open,
    so it answers no request with half-way weights.
    """
    await asyncio.gather(*(receiver.begin_update() for receiver in receivers))
    buckets = (await transport.send(exporter, receivers)).values()
    tensors = [tensor for bucket in buckets for tensor in bucket.tensors]
    expected = WeightVersion(
        step=version,
        checksum=checksum({tensor.name: tensor.digest for tensor in tensors}),
        tensors=len(tensors),
        nbytes=sum(bucket.nbytes for bucket in buckets),
    )
    held = await asyncio.gather(*(receiver.end_update(version) for receiver in receivers))
    for place, found in enumerate(held):
        if found.checksum != expected.checksum or found.step != version:
            raise WeightsError(
                f"server {place} holds version {found.step} with checksum {found.checksum}, "
                f"published was version {version} with {expected.checksum} ({expected.tensors} tensors)"
            )
    return expected
