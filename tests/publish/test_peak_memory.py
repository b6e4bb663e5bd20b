"""What a publication takes while it runs: nobody ever holds the whole model a second time, two buckets at most.

Measured is the peak of what each process has resident, shared memory and mapped files included, in a whole publication:
real ranks (TP2), a real server, and this process as the driver.
"""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.weight_sync import Ranks
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import ParallelSettings, PolicySettings
from megatron_fapo.publish.publisher import publish
from megatron_fapo.publish.settings import PublishSettings
from megatron_fapo.publish.transports import Delta, make_transport
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.launcher import launch_one
from megatron_fapo.serving.process import ServerProcess
from megatron_fapo.serving.settings import ServerSettings
from tests.conftest import lacking

MB = 2**20
BUCKET = 16 * MB
ALLOWANCE = 4 * MB
"""For code that runs for the first time, messages, and blocks that are worked on."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random Qwen3 of more than nine buckets in BF16."""
    folder = tmp_path_factory.mktemp("model")
    config = Qwen3Config(
        vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=24, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def ends(model) -> Iterator[tuple[LocalRanks, ServerProcess]]:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        lacking("the peak of a process's memory cannot be reset here: /proc/self/clear_refs is missing")
    policy = PolicySettings(model=model, dtype="bfloat16", parallel=ParallelSettings(tensor=2), timeout=120)
    serving = ServerSettings(model=str(model), dtype="bfloat16", context_length=128)
    with asyncio.Runner() as runner, LocalRanks(policy) as ranks:
        server = runner.run(launch_one(serving, model / "server.log", 0))
        yield ranks, server
        runner.run(server.stop())


class Peaks:
    """How far each process's resident memory rises from here on."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        for pid in pids.values():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is what is resident now
        self._before = {name: resident(pid, "VmRSS") for name, pid in pids.items()}

    def rise(self) -> dict[str, int]:
        """Bytes by process."""
        return {name: resident(pid, "VmHWM") - self._before[name] for name, pid in self._pids.items()}


def resident(pid: int, what: str) -> int:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("way", ["shared_memory", "group", "disk", "delta"])
async def test_nobody_holds_more_than_two_buckets(model, ends, way, tmp_path):
    ranks, server = ends
    pids = {"driver": os.getpid(), "server": server.pid}
    pids |= {f"rank {number}": process.pid for number, process in enumerate(ranks._processes)}
    given = PublishSettings(transport=way, bucket_megabytes=BUCKET / MB)
    transport = make_transport(given, f"test-memory-{way}-{os.getpid()}", tmp_path)
    rises = {}
    async with ServerClient(server.url) as client:
        await client.layout()
        for version, changed in enumerate((0.0, 0.04, 1.0) if way == "delta" else (0.0,)):
            alter_base(tmp_path, changed)
            peaks = Peaks(pids)
            published = await publish(Ranks(ranks), [client], transport, version)
            rises |= {f"{name}, {changed:.0%} changed": rise for name, rise in peaks.rise().items()}
            if isinstance(transport, Delta) and transport.changed is not None:
                assert transport.changed / published.nbytes == pytest.approx(1.5 * changed, rel=0.1)
                assert (transport.nbytes == published.nbytes) == (changed == 1.0)
    transport.close()
    assert published.nbytes > 9 * BUCKET
    assert {name: rise for name, rise in rises.items() if rise > 2 * BUCKET + ALLOWANCE} == {}


def alter_base(folder: Path, share: float) -> None:
    """As if the last version had differed in so many of its elements."""
    for path in (folder / "weights" / "base").glob("*") if share else ():
        np.memmap(path, np.uint16, mode="r+")[:: round(1 / share)] ^= 1
