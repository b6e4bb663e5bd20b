"""Weights from a rank to a process beside it through the GPU's memory, and how SGLang sums them there."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_fapo.errors import PolicyError
from megatron_fapo.held import HeldLayout
from megatron_fapo.publish.settings import PublishSettings
from megatron_fapo.publish.transports import make_transport
from megatron_fapo.records import Bucket
from tests.gpu.probe import ROOT
from tests.gpu.test_policy_on_gpu import SMALL, save_model, settings_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

MB = 2**20


@pytest.fixture
def reader(card: str) -> Iterator[Any]:
    """Asks a process on the same GPU to load a bucket; what it then holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.reader"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    ask, answers = process.stdin, process.stdout

    def load(bucket: Bucket) -> dict[str, Any]:
        ask.write(json.dumps(asdict(bucket)) + "\n")
        ask.flush()
        answer: dict[str, Any] = json.loads(answers.readline())
        return answer

    yield load
    ask.close()
    assert process.wait(60) == 0


@pytest.fixture
def rank(card: str, tmp_path: Path) -> Iterator[Any]:
    from megatron_fapo.policy.rank import PolicyRank

    save_model(tmp_path / "model", SMALL)
    rank = PolicyRank()
    rank.setup(0, 1, *rank.address(), settings_of(tmp_path / "model", "bfloat16"), 5)
    yield rank
    rank.shutdown()


class Ranks:
    """One rank as an exporter."""

    def __init__(self, rank: Any) -> None:
        self._rank = rank

    async def next_bucket(self, segment: str, nbytes: int) -> Bucket | None:
        found: Bucket | None = self._rank.next_bucket(segment, nbytes)
        return found


class Receiver:
    """A server that notes what it holds."""

    def __init__(self, load: Any) -> None:
        self._load = load
        self.held: dict[str, str] = {}
        self.free: list[int] = []

    async def load_bucket(self, bucket: Bucket) -> None:
        answer = await asyncio.to_thread(self._load, bucket)
        self.held |= answer["sums"]
        self.free.append(answer["free"])


def publish(rank: Any, receiver: Receiver) -> list[Bucket]:
    """All weights, in buckets of which the model needs several."""
    rank.open_export((HeldLayout(),))
    transport = make_transport(PublishSettings(transport="cuda_ipc", bucket_megabytes=2), "test", Path("unused"))
    return asyncio.run(transport.send(Ranks(rank), [receiver]))


def test_a_process_beside_the_rank_holds_what_the_rank_has_however_often(rank: Any, reader: Any) -> None:
    import torch

    receiver = Receiver(reader)
    for _ in range(20):
        with torch.no_grad():
            for part in rank.model.parallel:
                for param in part.parameters():
                    param.add_(torch.randn_like(param) * 0.01)
        before, buckets = dict(receiver.held), publish(rank, receiver)
        assert len(buckets) > 2
        sent = {spec.name: spec.digest for bucket in buckets for spec in bucket.tensors}
        assert receiver.held == sent == rank.expected(HeldLayout())
        assert all(before[name] != digest for name, digest in sent.items() if before)
    half = len(receiver.free) // 2
    assert min(receiver.free[half:]) >= receiver.free[len(buckets)] - 4 * MB, "memory is lost from update to update"


def test_what_the_rank_took_for_it_is_given_back_with_the_weights(rank: Any, reader: Any) -> None:
    import torch

    publish(rank, Receiver(reader))
    before = torch.cuda.mem_get_info()[0]
    rank.offload(("parameters",))
    assert torch.cuda.mem_get_info()[0] - before >= 4 * MB
    rank.onload(("parameters",))
    receiver = Receiver(reader)
    buckets = publish(rank, receiver)
    assert receiver.held == {spec.name: spec.digest for bucket in buckets for spec in bucket.tensors}


def test_a_bucket_that_the_device_has_no_room_for_is_refused_by_name(rank: Any) -> None:
    rank.open_export((HeldLayout(),))
    with pytest.raises(PolicyError, match=r"cuMemAlloc.*out of memory"):
        rank.next_bucket("cuda-ipc:0", 2**50)


def test_sums_are_those_of_sglangs_kernel(card: str) -> None:
    """On the GPU itself; `tests/compat/test_word_sum.py` compares with what the kernel gives in an interpreter."""
    if find_spec("sglang") is None:
        pytest.skip("SGLang is not installed beside torch")
    import torch
    from sglang.kernels.ops.memory.gpu_tensor_hash import gpu_tensor_hash

    from megatron_fapo.compat.word_sum import WordSum

    for shape in ((151, 37), (4096, 5120), (3,), (70001, 129)):
        tensor = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        total = WordSum(tensor.device)
        total.update(tensor.view(-1).view(torch.uint8))
        assert total.hexdigest() == f"{gpu_tensor_hash(tensor):016x}", shape
