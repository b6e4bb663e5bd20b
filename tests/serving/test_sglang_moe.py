"""Models that SGLang's ranks share, dense and of experts: what its checker sums, against the trainer's own shards."""

import asyncio
import os
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks.weight_sync import Ranks
from megatron_fapo.errors import WeightsError
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import ParallelSettings, PolicySettings
from megatron_fapo.publish.publisher import publish
from megatron_fapo.publish.settings import PublishSettings
from megatron_fapo.publish.transports import SharedMemory
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.launcher import launch_one
from megatron_fapo.weights import Segment
from tests.conftest import lacking
from tests.serving.conformance import KEY, SGLANG, settings
from tests.serving.worlds import CONTEXT, Reference, make_model

FLIPPED = "model.layers.1.mlp.experts.2.up_proj.weight"
RANKS = {"whole": (1, ()), "cut": (2, ()), "spread": (2, ("--ep-size", "2"))}
"""How a server's ranks hold the experts: their number, and what SGLang is told."""
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64, "initializer_range": 0.05}
"""FP8 has scales of 128 x 128 values."""

pytestmark = pytest.mark.long


class Flipping(SharedMemory):
    """A byte of an expert flips on its way."""

    async def _deliver(self, exporter, bucket, number, receivers):
        for spec in bucket.tensors:
            if spec.name == FLIPPED:
                Segment.open(bucket.segment, bucket.nbytes).memory[spec.offset + 1] ^= 1
        await super()._deliver(exporter, bucket, number, receivers)


@asynccontextmanager
async def served(model, folder, ranks=1, arguments=(), **given):
    """A client of a real server of so many ranks."""
    if not SGLANG.exists():
        lacking("SGLang's environment is missing: make sglang-cpu")
    (folder / "key").write_text(KEY)
    small = settings("sglang", model, folder / "key", CONTEXT).changed(**given)
    server = await launch_one(
        small.changed(sglang=small.sglang.changed(tensor_parallel=ranks, arguments=arguments)), folder / "log", 0
    )
    try:
        async with ServerClient(server.url, KEY, timeout=60) as client:
            yield client
    finally:
        await server.stop()


@asynccontextmanager
async def trained(model, **parallel):
    """Two ranks of a policy, as an exporter."""
    settings = PolicySettings(model=model, parallel=ParallelSettings(**parallel), timeout=120)
    with await asyncio.to_thread(LocalRanks, settings) as ranks:
        yield Ranks(ranks)


def transport(kind=SharedMemory, megabytes=48 / 1024):
    return kind(PublishSettings(bucket_megabytes=megabytes), f"test-sglang-{os.getpid()}")


async def is_generated(model, client, request_for, prompt):
    """Whether the server's greedy tokens are the model's."""
    (sample,) = [s async for s in client.generate(request_for(prompt, max_new_tokens=24, temperature=0))]
    return sample.token_ids.tolist() == Reference(model).greedy(prompt, 24)[: len(sample.token_ids)]


async def test_a_dense_model_with_biases_is_cut_in_two(tmp_path, request_for, prompts):
    """From two tensor-parallel ranks to the two of a real server."""
    old, new = (make_model(tmp_path / name, "qwen2", seed, intermediate_size=128) for seed, name in enumerate("ab"))
    way = transport()
    async with served(old, tmp_path, 2) as client, trained(new, tensor=2) as exporter:
        await publish(exporter, [client], way, 1)
        way.close()
        assert {name[-2:] for name in await client.held()} == {"@0", "@1"}
        assert await is_generated(new, client, request_for, prompts[2])


@pytest.mark.parametrize("held", RANKS)
async def test_experts_that_are_trained_apart_arrive_stacked_and_proven(tmp_path, request_for, prompts, held):
    """Two expert-parallel ranks to a real server, in many buckets; before, a byte that flips stops by name."""
    old, new = (make_model(tmp_path / name, "qwen3-moe", seed) for seed, name in enumerate("ab"))
    async with served(old, tmp_path, *RANKS[held]) as client, trained(new, expert=2, data=2) as exporter:
        with pytest.raises(WeightsError, match=r"1 of \d+ parameters differ.*layers\.1\.mlp\.experts\.w13_weight"):
            await publish(exporter, [client], transport(Flipping), 1)
        way = transport()
        await publish(exporter, [client], way, 2)
        way.close()
        assert await is_generated(new, client, request_for, prompts[2])
        assert await client.weight_version() == "2"


async def test_experts_in_fp8_are_quantised_on_the_way_out_and_proven(tmp_path, request_for, prompts):
    """Two expert-parallel ranks to a real server of a folder that `fapo convert` made, also of its experts."""
    old, new = (make_model(tmp_path / name, "qwen3-moe", seed, **WIDE) for seed, name in enumerate("ab"))
    fapo = [str(Path(sys.executable).parent / "fapo"), "convert", str(old), "--to", str(tmp_path / "fp8")]
    subprocess.run([*fapo, "--quantize", "fp8"], check=True, capture_output=True)
    way = transport(megabytes=0.3)
    fp8 = {"quantization": "fp8", "dtype": "bfloat16"}
    async with served(tmp_path / "fp8", tmp_path, **fp8) as client, trained(new, expert=2, data=2) as exporter:
        layout = await client.layout()
        assert layout.kept_in_bf16 == ("lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
        assert layout.experts == 4
        await publish(exporter, [client], way, 1)
        way.close()
        assert {f"model.layers.1.mlp.experts.{name}_weight" for name in ("w13", "w2")} <= (await client.held()).keys()
        (sample,) = [s async for s in client.generate(request_for(prompts[4], max_new_tokens=24))]
    drawn = sample.token_ids.tolist()
    ours, before = (
        abs(Reference(folder).logprobs(prompts[4], drawn) - sample.logprobs).mean() for folder in (new, old)
    )
    assert ours < before / 4, (ours, before)
