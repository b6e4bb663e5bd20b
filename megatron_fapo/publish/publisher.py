"""Moves the policy's weights to its servers and confirms that they arrived whole.

Knows neither Megatron nor Ray: an `Exporter` fills buckets, `WeightReceiver`s load them. No rank, no driver and
no server ever holds a second whole model: two buckets are alive at a time, one being filled, one being read.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from megatron_fapo.errors import WeightsError
from megatron_fapo.held import HeldLayout, differing
from megatron_fapo.publish.settings import PublishSettings
from megatron_fapo.records import Bucket, WeightVersion
from megatron_fapo.serving.interface import WeightReceiver
from megatron_fapo.weights import checksum, shared_memory_folder

T = TypeVar("T")


class Exporter(Protocol):
    """The trained model, as the end that sends."""

    async def open_export(self, layouts: Sequence[HeldLayout]) -> None:
        """Start over at the first tensor; what servers of these layouts must hold is computed on the way."""

    async def next_bucket(self, segment: str, nbytes: int) -> Bucket | None:
        """Write the next tensors, at most `nbytes` together, into a shared-memory file; None when all were sent."""

    async def expected(self, layout: HeldLayout) -> dict[str, str]:
        """{parameter: digest} that a server of this layout must hold, from the exporter's own bytes."""


class WeightTransport(Protocol):
    """A way for tensors to get from an exporter to receivers.

    The receivers have an open update. The transport keeps no weights between calls, and raises what the two ends
    raise.
    """

    async def send(self, exporter: Exporter, receivers: Sequence[WeightReceiver]) -> list[Bucket]:
        """Deliver every tensor to every receiver; the tables of the buckets in the order sent."""

    def close(self) -> None:
        """Free what the transport holds."""


class SharedMemory:
    """Buckets through files in shared memory, for servers on the exporter's machine."""

    def __init__(self, settings: PublishSettings, name: str) -> None:
        self._nbytes = int(settings.bucket_megabytes * 2**20)
        self._segments = [shared_memory_folder() / f"fapo-{name}-{slot}" for slot in (0, 1)]

    async def send(self, exporter: Exporter, receivers: Sequence[WeightReceiver]) -> list[Bucket]:
        """Fill one segment while the receivers read the other."""
        sent: list[Bucket] = []
        loading: asyncio.Future[list[None]] | None = None
        try:
            while True:
                segment = self._segments[len(sent) % 2]
                bucket = await exporter.next_bucket(str(segment), self._nbytes)
                if loading is not None:
                    await loading
                if bucket is None:
                    return sent
                sent.append(bucket)
                loading = asyncio.ensure_future(settled([receiver.load_bucket(bucket) for receiver in receivers]))
        except BaseException:
            if loading is not None:  # the next update writes where they still read
                await asyncio.gather(loading, return_exceptions=True)
            raise

    def close(self) -> None:
        """Unlink both segments."""
        for segment in self._segments:
            segment.unlink(missing_ok=True)


async def settled(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. Of several errors the first is raised, once nothing runs any more: who is left of the
    receivers can then be sent everything again."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


async def publish(
    exporter: Exporter, receivers: Sequence[WeightReceiver], transport: WeightTransport, version: int
) -> WeightVersion:
    """Bring every receiver to the exporter's present weights as `version`, and prove it.

    Each receiver sums the parameters that it holds, fused and sharded as they are; the sums must equal those that
    the exporter computed of its own bytes. Raises WeightsError naming receiver and parameter otherwise; all updates
    then stay open, so that no server answers a request with half-way weights.
    """
    layouts = await settled([receiver.layout() for receiver in receivers])
    await settled([receiver.begin_update() for receiver in receivers])
    await exporter.open_export(tuple(dict.fromkeys(layouts)))
    buckets = await transport.send(exporter, receivers)
    expected = {layout: await exporter.expected(layout) for layout in dict.fromkeys(layouts)}
    held = await settled([receiver.held() for receiver in receivers])
    for place, (layout, sums) in enumerate(zip(layouts, held, strict=True)):
        if wrong := differing(expected[layout], sums):
            raise WeightsError(
                f"server {place} does not hold the weights that were published: {len(wrong)} of "
                f"{len(expected[layout])} parameters differ, the first is {wrong[0]}",
                version=version,
            )
    await settled([receiver.end_update(version) for receiver in receivers])
    tensors = [tensor for bucket in buckets for tensor in bucket.tensors]
    nbytes = sum(bucket.nbytes for bucket in buckets)
    total = checksum({tensor.name: tensor.digest for tensor in tensors})
    return WeightVersion(step=version, checksum=total, tensors=len(tensors), nbytes=nbytes)
