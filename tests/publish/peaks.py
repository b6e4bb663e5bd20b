"""A whole publication in each way for weights, in a process of its own; prints how far everybody's memory rose.

    python -m tests.publish.peaks FOLDER

Of its own, because what an allocator keeps of earlier tests would count as well. Real ranks (TP2), a real server, and
this process as the driver; a random Qwen3 of more than nine buckets in BF16.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.weight_sync import Ranks
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import ParallelSettings, PolicySettings
from megatron_fapo.publish.publisher import publish
from megatron_fapo.publish.settings import PublishSettings
from megatron_fapo.publish.transports import make_transport
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.launcher import launch_one
from megatron_fapo.serving.settings import ServerSettings

MB = 2**20
BUCKET = 16 * MB
WAYS = {"shared_memory": (0.0,), "group": (0.0,), "disk": (0.0,), "delta": (0.0, 0.04, 1.0)}
"""Of each way, the shares of elements that change from one publication to the next."""


def make_model(folder: Path) -> None:
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


class Peaks:
    """How far each process's resident memory, shared memory and mapped files included, rises from here on."""

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


def alter_base(folder: Path, share: float) -> None:
    """As if the last version had differed in so many of its elements."""
    for path in (folder / "weights" / "base").glob("*") if share else ():
        np.memmap(path, np.uint16, mode="r+")[:: round(1 / share)] ^= 1


async def measure(folder: Path, ranks: LocalRanks, pids: dict[str, int], url: str, way: str) -> list[dict]:
    """Each publication: what was sent, what changed and how far everybody rose, in bytes."""
    given = PublishSettings(transport=way, bucket_megabytes=BUCKET / MB)  # type: ignore[arg-type]
    transport = make_transport(given, f"test-memory-{way}-{os.getpid()}", folder)
    found = []
    async with ServerClient(url) as client:
        await client.layout()
        for version, share in enumerate(WAYS[way]):
            alter_base(folder, share)
            peaks = Peaks(pids)
            published = await publish(Ranks(ranks), [client], transport, version)
            found.append(
                {
                    "nbytes": published.nbytes,
                    "sent": getattr(transport, "nbytes", published.nbytes),
                    "changed": getattr(transport, "changed", None),
                    "rise": peaks.rise(),
                }
            )
    transport.close()
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    model = folder / "model"
    make_model(model)
    policy = PolicySettings(model=model, dtype="bfloat16", parallel=ParallelSettings(tensor=2), timeout=120)
    serving = ServerSettings(model=str(model), dtype="bfloat16", context_length=128)
    with asyncio.Runner() as runner, LocalRanks(policy) as ranks:
        server = runner.run(launch_one(serving, folder / "server.log", 0))
        pids = {"driver": os.getpid(), "server": server.pid}
        pids |= {f"rank {number}": process.pid for number, process in enumerate(ranks._processes)}
        found = {way: runner.run(measure(folder / way, ranks, pids, server.url, way)) for way in WAYS}
        runner.run(server.stop())
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
