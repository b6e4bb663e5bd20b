"""Moves the policy's weights to its servers and confirms that they arrived whole.

Knows neither Megatron nor Ray: an `Exporter` fills buckets, `WeightReceiver`s load them. No rank, no driver and
no server ever holds a second whole model: two buckets are alive at a time, one being filled, one being read.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from megatron_fapo.errors import ServerUnreachable, WeightsError
from megatron_fapo.held import differing
from megatron_fapo.publish.interface import Exporter, WeightTransport
from megatron_fapo.records import WeightVersion
from megatron_fapo.serving.interface import WeightReceiver
from megatron_fapo.weights import checksum

T = TypeVar("T")


async def settled(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. An error is raised once nothing runs any more: who is left of the receivers can then be
    sent everything again. Of several it is that of a server which is gone, as the others may follow from that one.
    """
    results = await asyncio.gather(*work, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise next((error for error in errors if isinstance(error, ServerUnreachable)), errors[0])
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
    different = tuple(dict.fromkeys(layouts))
    beginning = [receiver.begin_update() for receiver in receivers]
    await settled([exporter.open_export(different), *beginning])
    buckets = await transport.send(exporter, receivers)
    expecting, asking = [exporter.expected(layout) for layout in different], [receiver.held() for receiver in receivers]
    found = await settled([*expecting, *asking])
    expected, held = dict(zip(different, found, strict=False)), found[len(different) :]
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
