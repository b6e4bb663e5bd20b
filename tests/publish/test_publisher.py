"""Weights through real shared memory: whole, in small buckets, and refused when a byte flips on the way."""

import asyncio

import numpy as np
import pytest

from megatron_fapo.errors import WeightsError
from megatron_fapo.held import HeldLayout
from megatron_fapo.publish.publisher import publish
from megatron_fapo.publish.settings import PublishSettings
from megatron_fapo.publish.transports import SharedMemory
from megatron_fapo.records import Bucket, TensorSpec
from megatron_fapo.weights import Segment, aligned, checksum, digest, shared_memory_folder


class Source:
    """Writes its tensors into buckets, as many as fit."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors
        self.left: list[str] = []

    async def open_export(self, layouts) -> None:
        self.left = list(self.tensors)

    async def expected(self, layout: HeldLayout) -> dict[str, str]:
        return {name: digest(tensor.tobytes()) for name, tensor in self.tensors.items()}

    async def next_bucket(self, segment: str, nbytes: int) -> Bucket | None:
        if not self.left:
            return None
        memory = Segment.create(segment, nbytes).memory
        offset, specs = 0, []
        while self.left and offset + self.tensors[self.left[0]].nbytes <= nbytes:
            name = self.left.pop(0)
            data = self.tensors[name].tobytes()
            memory[offset : offset + len(data)] = data
            specs.append(
                TensorSpec(
                    name=name, dtype="float32", shape=self.tensors[name].shape, offset=offset, digest=digest(data)
                )
            )
            offset = aligned(offset + len(data))
        return Bucket(segment=segment, nbytes=offset, tensors=tuple(specs))


class Sink:
    """Holds tensors; `flip` damages one byte of the tensor of that name after it arrived."""

    def __init__(self, flip: str | None = None, slow: float = 0.0) -> None:
        self.has: dict[str, bytes] = {}
        self.flip, self.slow = flip, slow
        self.open, self.version = False, None

    async def layout(self) -> HeldLayout:
        return HeldLayout()

    async def begin_update(self) -> None:
        self.open = True

    async def load_bucket(self, bucket: Bucket) -> None:
        await asyncio.sleep(self.slow)
        memory = Segment.open(bucket.segment, bucket.nbytes).memory
        for tensor in bucket.tensors:
            data = bytearray(memory[tensor.offset : tensor.offset + int(np.prod(tensor.shape)) * 4])
            data[0] ^= tensor.name == self.flip
            self.has[tensor.name] = bytes(data)

    async def held(self) -> dict[str, str]:
        return {name: digest(data) for name, data in self.has.items()}

    async def end_update(self, version: int) -> None:
        self.open, self.version = False, version


@pytest.fixture
def tensors():
    generator = np.random.default_rng(0)
    return {f"layer.{i}.weight": generator.normal(size=(50, i + 1)).astype(np.float32) for i in range(9)}


def send(tensors, sinks, kilobytes=2.5):
    transport = SharedMemory(PublishSettings(bucket_megabytes=kilobytes / 1024), "test-publish")
    try:
        return asyncio.run(publish(Source(tensors), sinks, transport, version=7))
    finally:
        transport.close()


@pytest.mark.parametrize("kilobytes", [2.5, 1000], ids=["many buckets", "one bucket"])
def test_every_server_ends_with_the_exporters_bytes(tensors, kilobytes):
    sinks = [Sink(), Sink(slow=0.001)]
    version = send(tensors, sinks, kilobytes)
    for sink in sinks:
        assert sink.has == {name: tensor.tobytes() for name, tensor in tensors.items()}
        assert (sink.open, sink.version) == (False, 7)
    assert (version.step, version.tensors) == (7, 9)
    assert version.checksum == checksum(asyncio.run(sinks[0].held()))


def test_a_flipped_byte_stops_the_run_by_name_and_no_server_continues(tensors):
    sinks = [Sink(), Sink(flip="layer.4.weight")]
    with pytest.raises(WeightsError, match=r"server 1 does not hold.*1 of 9 parameters.*layer\.4"):
        send(tensors, sinks)
    assert all(sink.open for sink in sinks)


def test_a_missing_tensor_is_noticed(tensors):
    class Forgetful(Sink):
        async def load_bucket(self, bucket: Bucket) -> None:
            await super().load_bucket(bucket)
            self.has.pop("layer.2.weight", None)

    with pytest.raises(WeightsError):
        send(tensors, [Forgetful()])


def test_nothing_stays_in_shared_memory(tensors):
    send(tensors, [Sink()])
    assert not list(shared_memory_folder().glob("fapo-test-publish-*"))


def test_the_checksum_depends_on_names_and_bytes_but_not_on_order():
    one, two = digest(b"one"), digest(b"two")
    assert checksum({"a": one, "b": two}) == checksum({"b": two, "a": one})
    assert checksum({"a": one, "b": two}) != checksum({"a": two, "b": one})
