"""A mixture of experts on SGLang: what its checker sums of the stacked experts, against the trainer's own shards."""

import asyncio
import os

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


class Flipping(SharedMemory):
    """A byte of an expert flips on its way."""

    async def _deliver(self, exporter, bucket, number, receivers):
        for spec in bucket.tensors:
            if spec.name == FLIPPED:
                Segment.open(bucket.segment, bucket.nbytes).memory[spec.offset + 1] ^= 1
        await super()._deliver(exporter, bucket, number, receivers)


@pytest.mark.long
async def test_experts_that_are_trained_apart_arrive_stacked_and_proven(tmp_path, request_for, prompts):
    """Two expert-parallel ranks to a real server, in many buckets; before, a byte that flips stops by name."""
    if not SGLANG.exists():
        lacking("SGLang's environment is missing: make sglang-cpu")
    old, new = (make_model(tmp_path / name, "qwen3-moe", seed) for seed, name in enumerate("ab"))
    (tmp_path / "key").write_text(KEY)
    policy = PolicySettings(model=new, parallel=ParallelSettings(expert=2, data=2), timeout=120)
    given, name = PublishSettings(bucket_megabytes=48 / 1024), f"test-moe-{os.getpid()}"
    server = await launch_one(settings("sglang", old, tmp_path / "key", CONTEXT), tmp_path / "log", 0)
    try:
        with await asyncio.to_thread(LocalRanks, policy) as ranks:
            async with ServerClient(server.url, KEY, timeout=60) as client:
                with pytest.raises(
                    WeightsError, match=r"1 of \d+ parameters differ.*layers\.1\.mlp\.experts\.w13_weight"
                ):
                    await publish(Ranks(ranks), [client], Flipping(given, name), 1)
                transport = SharedMemory(given, name)
                await publish(Ranks(ranks), [client], transport, 2)
                transport.close()
                (sample,) = [
                    s async for s in client.generate(request_for(prompts[2], max_new_tokens=24, temperature=0))
                ]
                assert await client.weight_version() == "2"
        expected = Reference(new).greedy(prompts[2], 24)
        assert sample.token_ids.tolist() == expected[: len(sample.token_ids)]
    finally:
        await server.stop()
