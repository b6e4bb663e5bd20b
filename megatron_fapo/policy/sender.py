"""Rank 0 as the sender of a process group whose other members are servers."""

import torch

from megatron_fapo.compat.weight_group import WeightGroup, meet
from megatron_fapo.policy.target import nbytes_of
from megatron_fapo.records import Bucket
from megatron_fapo.weights import Segment


class Sender:
    """One group. Its store is open from the start; the group exists once all members have joined.

    What goes wrong is a server's fault and leaves the ranks well: it is answered and not raised, which would end them.
    """

    def __init__(self, name: str, host: str, backend: str, seconds: float) -> None:
        """`seconds` is the deadline of meeting and of each broadcast."""
        self._name, self._backend, self._seconds = name, backend, seconds
        self._store = meet(host, 0, 1, seconds, first=True)
        self.port = int(self._store.port)
        self._group: WeightGroup | None = None

    def join(self, world: int) -> str:
        """Wait for the members; why they did not come, else ""."""
        try:
            self._group = WeightGroup(self._store, 0, world, self._name, self._backend, self._seconds)
        except RuntimeError as error:
            return f"{world - 1} members of group {self._name} did not meet: {error}"
        return ""

    def send(self, bucket: Bucket) -> str:
        """Broadcast a bucket's tensors, in order; why that failed (a member is gone, or takes too long), else ""."""
        if self._group is None:
            return f"group {self._name}: not joined"
        memory = Segment.open(bucket.segment, bucket.nbytes).memory
        tensors = [
            torch.frombuffer(memory, dtype=torch.uint8, count=nbytes_of(spec), offset=spec.offset)
            .view(getattr(torch, spec.dtype))
            .view(spec.shape)
            for spec in bucket.tensors
        ]
        try:
            self._group.broadcast(tensors)
        except RuntimeError as error:
            return f"group {self._name}: sending failed: {error}"
        return ""
