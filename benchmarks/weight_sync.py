"""Weights from Megatron's ranks to a server, in GB/s, against what no path can avoid.

    python benchmarks/weight_sync.py [--quick | --transports | --delta] [--json]

The floor moves the same bytes in the same run, bucket by bucket: one copy into shared memory, one copy out of it,
and the same checksum at both ends, by one thread and by two; the better counts. Ours is a whole publication: real
ranks that export under Hugging Face names, a real server process that loads, sums and continues, with gathering,
naming and HTTP. Sides take turns, so that what else the machine does falls on all of them; shown is the best round.

`--transports` compares the ways for weights at TP2. `--delta` counts the bytes of a delta after each of a few real
optimizer steps of the demo's policy in BF16, for both learning rates, beside those of a full update.

The last line of `--json` has `ratio`, ours over the floor for shared memory with two tensor-parallel ranks, each in
its best round, `ratio_quartiles`, the same within the rounds, and `copy_share`, ours over one plain copy.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_fapo.algorithm.settings import LossSettings
from megatron_fapo.batch.layout import Layout
from megatron_fapo.batch.pack import make_batch
from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.held import HeldLayout
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import OptimizerSettings, ParallelSettings, PolicySettings
from megatron_fapo.publish.publisher import publish
from megatron_fapo.publish.settings import PublishSettings
from megatron_fapo.publish.transports import Delta, make_transport
from megatron_fapo.records import (
    Bucket,
    Group,
    Judged,
    NotJudged,
    Outcome,
    Prompt,
    Rollout,
    StepBatch,
    VersionSpan,
    floats,
    ints,
)
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.launcher import launch_one
from megatron_fapo.serving.settings import ServerSettings
from megatron_fapo.weights import Bytes, Segment, copy, shared_memory_folder

LAYOUTS = {"TP2": {"tensor": 2}, "TP1": {}, "PP2": {"pipeline": 2}}
Transport = Literal["shared_memory", "disk", "group", "delta"]
POLICY = Path(__file__).parent.parent / "configs" / "clock" / "warm-start" / "policy"
CLOCK_RATE = 2e-4
"""The learning rate of configs/clock/fapo.yaml."""


def make_model(folder: Path, layers: int) -> None:
    """A random Qwen3 with matrices of a real model's shape: 12.6 M parameters a layer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")


class Ranks:
    """Local ranks as an `Exporter`."""

    def __init__(self, ranks: LocalRanks) -> None:
        self._ranks = ranks

    async def open_export(self, layouts: Sequence[HeldLayout]) -> None:
        """All ranks."""
        await self._all("open_export", tuple(layouts))

    async def next_bucket(self, segment: str, nbytes: int) -> Bucket | None:
        """All ranks; the first has the table."""
        bucket = (await self._all("next_bucket", segment, nbytes))[0]
        return bucket if isinstance(bucket, Bucket) else None

    async def expected(self, layout: HeldLayout) -> dict[str, str]:
        """The first rank's."""
        return dict((await self._all("expected", layout))[0])

    async def _all(self, method: str, *arguments: object) -> list[object]:
        """The ranks begin at once: whatever this process does next need not be done before."""
        self._ranks.start(method, *arguments)
        return await asyncio.to_thread(self._ranks.finish)

    async def open_group(self, name: str, host: str, backend: str, seconds: float) -> tuple[str, int]:
        """The first rank's address."""
        host, port = await asyncio.to_thread(self._ranks.one, 0, "open_group", name, host, backend, seconds)
        return host, port

    async def join_group(self, world: int) -> str:
        """The first rank."""
        return str(await asyncio.to_thread(self._ranks.one, 0, "join_group", world))

    async def send_bucket(self, bucket: Bucket) -> str:
        """The first rank."""
        return str(await asyncio.to_thread(self._ranks.one, 0, "send_bucket", bucket))

    async def close_group(self) -> None:
        """The first rank."""
        await asyncio.to_thread(self._ranks.one, 0, "close_group")


class Floor:
    """The same tensors through shared memory by threads of this process."""

    def __init__(self, sizes: Sequence[int], bucket: int) -> None:
        self.nbytes = sum(sizes)
        self._bucket = bucket
        self._sources = [np.full(size, 1, np.uint8) for size in sizes]
        self._targets = [np.zeros(size, np.uint8) for size in sizes]
        self._segments = [
            Segment.create(shared_memory_folder() / f"fapo-floor-{os.getpid()}-{i}", bucket) for i in (0, 1)
        ]
        for segment in self._segments:
            np.frombuffer(segment.memory, np.uint8)[:] = 0

    def seconds(self, threads: int) -> float:
        """One pass over everything, the tensors dealt to the threads by size."""
        shares: list[list[int]] = [[] for _ in range(threads)]
        loads = [0] * threads
        for index in sorted(range(len(self._sources)), key=lambda i: -len(self._sources[i])):
            least = loads.index(min(loads))
            shares[least].append(index)
            loads[least] += len(self._sources[index])
        workers = [
            threading.Thread(target=self._move, args=(share, np.frombuffer(segment.memory, np.uint8), threads))
            for share, segment in zip(shares, self._segments, strict=False)
        ]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - start

    def _move(self, share: list[int], memory: Bytes, threads: int) -> None:
        """Fill a bucket, then empty it."""
        room, held, used = self._bucket // threads, [], 0
        for index in [*share, -1]:
            size = len(self._sources[index])
            if index < 0 or used + size > room:
                for one, start, end in held:
                    copy(memory[start:end], self._targets[one])
                held, used = [], 0
            if index >= 0:
                copy(self._sources[index], memory[used : used + size])
                held.append((index, used, used + size))
                used += size

    def plain_copy(self) -> float:
        """Seconds of one copy of the bytes, by one thread."""
        start = time.perf_counter()
        for source, target in zip(self._sources, self._targets, strict=True):
            np.copyto(target, source)
        return time.perf_counter() - start

    def close(self) -> None:
        """Unlink."""
        for segment in self._segments:
            segment.remove()


async def measure(
    folder: Path, sides: Sequence[tuple[str, Transport]], megabytes: float, rounds: int
) -> tuple[int, dict[str, list[float]]]:
    """Bytes, and the seconds of each side in each round."""
    sizes = [p.numel() * p.element_size() for p in Qwen3ForCausalLM.from_pretrained(folder).parameters()]
    floor = Floor(sizes, int(megabytes * 2**20))
    seconds = defaultdict[str, list[float]](list)
    server = await launch_one(ServerSettings(model=str(folder), context_length=128), folder / "server.log", 0)
    try:
        async with ServerClient(server.url) as client:
            for layout, way in sides:
                settings = PolicySettings(model=folder, parallel=ParallelSettings(**LAYOUTS[layout]), timeout=120)
                given = PublishSettings(transport=way, bucket_megabytes=megabytes)
                transport = make_transport(given, f"weight-sync-{os.getpid()}", folder)
                with await asyncio.to_thread(LocalRanks, settings) as ranks:
                    for turn in range(rounds + 1):
                        start = time.perf_counter()
                        await publish(Ranks(ranks), [client], transport, turn)
                        ours = time.perf_counter() - start
                        if turn:  # the first round warms up
                            seconds[f"{way.replace('_', ' ')}, {layout}"].append(ours)
                            seconds["floor, 1 thread"].append(floor.seconds(1))
                            seconds["floor, 2 threads"].append(floor.seconds(2))
                            seconds["one plain copy"].append(floor.plain_copy())
                transport.close()
    finally:
        await server.stop()
        floor.close()
    return floor.nbytes, dict(seconds)


def over_floor(seconds: dict[str, list[float]]) -> list[float]:
    """Ours at TP2 over the floor in the same round, sorted."""
    rounds = zip(seconds["shared memory, TP2"], seconds["floor, 1 thread"], seconds["floor, 2 threads"], strict=False)
    return sorted(min(floors) / ours for ours, *floors in rounds)


async def measure_delta(rate: float, steps: int) -> list[float]:
    """Bytes of the changes after each of some optimizer steps, over the bytes of all weights in BF16."""
    optimizer = OptimizerSettings(learning_rate=rate, warmup_steps=0)
    settings = PolicySettings(model=POLICY, dtype="bfloat16", optimizer=optimizer, timeout=300)
    shares = []
    with tempfile.TemporaryDirectory() as temporary:
        server = await launch_one(
            ServerSettings(model=str(POLICY), dtype="bfloat16", context_length=128), Path(temporary) / "log", 0
        )
        delta = Delta(PublishSettings(bucket_megabytes=8), f"weight-sync-{os.getpid()}", Path(temporary))
        try:
            async with ServerClient(server.url) as client:
                with await asyncio.to_thread(LocalRanks, settings) as ranks:
                    for step in range(steps + 1):
                        version = await publish(Ranks(ranks), [client], delta, step)
                        if delta.changed is not None:
                            shares.append(delta.changed / version.nbytes)
                        batch = make_step(step, ranks.layout)
                        await asyncio.to_thread(ranks.call, "update", batch, LossSettings())
        finally:
            delta.close()
            await server.stop()
    return shares


def make_step(step: int, layout: Layout) -> StepBatch:
    """Eight groups of eight answers of 32 random tokens, with random advantages."""
    rng = np.random.default_rng(step)
    groups, advantages = [], []
    outcome = Outcome(right=True, score=1.0, answer=None, why="equal")
    for number in range(8):
        judged = []
        for answer in range(8):
            rollout = Rollout(
                id=f"s{step}-p{number}-r{answer}",
                prompt_id=f"p{number}",
                token_ids=ints(rng.integers(3, 40, 32)),
                logprobs=floats(rng.normal(-3.0, 0.3, 32)),
                versions=(VersionSpan(start=0, version=step),),
                temperature=1.0,
                seed=0,
                text="",
                finish_reason="stop",
            )
            judged.append(Judged(rollout=rollout, outcome=outcome, verdict=NotJudged(reason="off"), oracle=None))
        tokens = ints(rng.integers(3, 40, 16))
        prompt = Prompt(id=f"p{number}", task="t", question="", messages=(), token_ids=tokens, reference_answer="")
        groups.append(Group(step=step, prompt=prompt, judged=tuple(judged)))
        advantages.append([floats(np.full(32, rng.normal())) for _ in judged])
    return make_batch(groups, advantages, layout, BatchSettings(), seed=step)


def report_delta(*, as_json: bool) -> None:
    """The table of `--delta`."""
    table = Table(title="bytes of what changed over those of all weights, BF16, after an optimizer step")
    found = {}
    table.add_column("learning rate")
    for step in range(1, 4):
        table.add_column(f"step {step}", justify="right")
    for rate in (1e-6, CLOCK_RATE):
        found[f"{rate:g}"] = shares = asyncio.run(measure_delta(rate, 3))
        table.add_row(f"{rate:g}", *(f"{share:.1%}" for share in shares))
    Console(width=120).print(table)
    if as_json:
        sys.stdout.write(json.dumps({"delta_share": found}) + "\n")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="TP2 alone, and fewer rounds")
    parser.add_argument("--transports", action="store_true", help="all ways for weights, at TP2")
    parser.add_argument("--delta", action="store_true", help="bytes of a delta after real optimizer steps")
    parser.add_argument("--json", action="store_true", help="a last line of JSON")
    usual = PublishSettings().bucket_megabytes
    parser.add_argument(
        "--bucket", type=float, default=usual, help=f"megabytes of a bucket ({usual:g}, as a run has it)"
    )
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.delta:
        return report_delta(as_json=arguments.json)
    sides: list[tuple[str, Transport]] = [(layout, "shared_memory") for layout in LAYOUTS]
    if arguments.quick or arguments.transports:
        sides = sides[:1]
    if arguments.transports:
        sides += [("TP2", "disk"), ("TP2", "group"), ("TP2", "delta")]
    rounds = 12
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder, 8)
        nbytes, seconds = asyncio.run(measure(folder, sides, arguments.bucket, rounds))
    speeds = {name: nbytes / min(values) / 1e9 for name, values in seconds.items()}
    floor = max(speeds["floor, 1 thread"], speeds["floor, 2 threads"])
    table = Table(title=f"{nbytes / 1e9:.2f} GB in buckets of {arguments.bucket:g} MB, best of {rounds} rounds")
    for column in ("", "GB/s", "over the floor"):
        table.add_column(column, justify="right" if column else "left")
    for name, speed in speeds.items():
        table.add_row(name, f"{speed:.2f}", f"{speed / floor:.2f}")
    Console(width=120).print(table)
    if arguments.json:
        ours = speeds["shared memory, TP2"]
        in_rounds = over_floor(seconds)
        result = {
            "ratio": round(ours / floor, 3),
            "ratio_quartiles": [round(in_rounds[len(in_rounds) * q // 4], 3) for q in (1, 2, 3)],
            "copy_share": round(ours / speeds["one plain copy"], 3),
            "gigabytes_per_second": {name: round(speed, 3) for name, speed in speeds.items()},
        }
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
