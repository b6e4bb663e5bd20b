"""The ends between which weights are moved, and a way for them to go. Light: no torch."""

from collections.abc import Sequence
from typing import Protocol

from megatron_fapo.held import HeldLayout
from megatron_fapo.records import Bucket
from megatron_fapo.serving.interface import WeightReceiver


class Exporter(Protocol):
    """The trained model, as the end that sends."""

    async def open_export(self, layouts: Sequence[HeldLayout]) -> None:
        """Start over at the first tensor; what servers of these layouts must hold is computed on the way."""

    async def next_bucket(self, segment: str, nbytes: int) -> Bucket | None:
        """Write the next tensors, at most `nbytes` together, into a shared-memory file; None when all were sent."""

    async def expected(self, layout: HeldLayout) -> dict[str, str]:
        """{parameter: digest} that a server of this layout must hold, from the exporter's own bytes."""

    async def open_group(self, name: str, host: str, backend: str, seconds: float) -> tuple[str, int]:
        """Prepare a process group of its first rank and servers; the address at which they meet."""

    async def join_group(self, world: int) -> str:
        """Wait until all `world` members of the group have met; why they did not, else ""."""

    async def send_bucket(self, bucket: Bucket) -> str:
        """Broadcast the last bucket to the group, tensor by tensor; why that failed, else ""."""

    async def close_group(self) -> None:
        """Leave the group."""


class WeightTransport(Protocol):
    """A way for tensors to get from an exporter to receivers.

    The receivers have an open update. The transport keeps no weights between calls, and raises what the two ends
    raise.
    """

    async def send(self, exporter: Exporter, receivers: Sequence[WeightReceiver]) -> list[Bucket]:
        """Deliver every tensor to every receiver; the tables of the buckets in the order sent."""

    def close(self) -> None:
        """Free what the transport holds."""
