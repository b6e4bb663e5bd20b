"""A deterministic engine gives the same bytes in any order, at any time, beside any company."""

import asyncio
import random

import numpy as np
import pytest
import torch

from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.engine.decoder import Decoder, Shape
from megatron_fapo.serving.engine.invariance import find_granularity, holds
from megatron_fapo.serving.settings import ServerSettings

REQUESTS = 64


@pytest.fixture(scope="module")
def deterministic_url(start_server, models):
    return start_server(model=str(models[0]), deterministic=True, max_running=40).url


async def test_the_same_requests_in_three_orders_and_timings_give_the_same_bytes(deterministic_url, request_for):
    """Requests of all kinds side by side, on a server whose rows have been used by others before."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(2, 64, int(size)) for size in rng.integers(1, 40, REQUESTS)]
    kinds = [{}, {"top_p": 0.7}, {"temperature": 0.6}, {"temperature": 1.5, "top_p": 0.9}, {"temperature": 0.0}]
    requests = [
        request_for(
            prompt,
            seeds=range(i, i + 1 + i % 3),
            name=f"p{i}",
            max_new_tokens=int(rng.integers(5, 60)),
            **kinds[i % len(kinds)],
        )
        for i, prompt in enumerate(prompts)
    ]
    others = [request_for(prompts[i], range(40), f"o{i}", temperature=2.0, top_p=0.5 + 0.1 * i) for i in range(3)]

    async def one(client, request, delay):
        await asyncio.sleep(delay)
        return [sample async for sample in client.generate(request)]

    async def bytes_of(seed, spread):
        order = random.Random(seed)
        shuffled = order.sample(requests, REQUESTS)
        async with ServerClient(deterministic_url) as client:
            answers = await asyncio.gather(*(one(client, request, order.uniform(0, spread)) for request in shuffled))
        samples = {sample.id: sample for samples in answers for sample in samples}
        return {rid: (s.token_ids.tobytes(), s.logprobs.tobytes()) for rid, s in samples.items()}

    async with ServerClient(deterministic_url) as client:
        await asyncio.gather(*(one(client, request, 0.0) for request in others))
    first = await bytes_of(1, 0.0)
    assert len(first) == sum(len(request.ids) for request in requests)
    assert await bytes_of(2, 0.3) == first
    assert await bytes_of(3, 1.0) == first


async def test_unseeded_requests_are_deterministic_too(deterministic_url, post_to):
    body = {"input_ids": [5, 6, 7], "sampling_params": {"n": 3, "max_new_tokens": 20}}
    first, second = await post_to(deterministic_url, body), await post_to(deterministic_url, body)
    assert [a["output_ids"] for a in first] == [a["output_ids"] for a in second]
    assert len({tuple(a["output_ids"]) for a in first}) > 1


@pytest.fixture
def post_to():
    import aiohttp

    async def post(url, body):
        async with aiohttp.ClientSession() as session, session.post(f"{url}/generate", json=body) as response:
            return await response.json()

    return post


class Leaky(Decoder):
    """A model whose rows depend on how many rows there are."""

    def decode(self, tokens, positions, cache, length):
        return super().decode(tokens, positions, cache, length) + 1e-6 * len(tokens)


@pytest.fixture
def shape():
    return Shape(
        vocabulary=40, hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp=64, epsilon=1e-6,
        rope_theta=1e4, positions=128, tied=True, qkv_bias=False, qk_norm=True,
    )  # fmt: skip


def randomised(model):
    generator = torch.Generator().manual_seed(3)
    for tensor in model.parameters.values():
        tensor.normal_(std=0.3, generator=generator)
    model.refresh()
    return model


def test_the_trial_at_start_sees_a_model_whose_rows_are_not_independent(shape):
    sound, leaky = (randomised(kind(shape, torch.float32, 128)) for kind in (Decoder, Leaky))
    assert find_granularity(sound, 128) in (16, 32, 64, 128)
    assert not holds(leaky, 16, 128)
    assert find_granularity(leaky, 128) == 128  # one fixed shape is all that is left


def test_settings_name_it():
    assert ServerSettings(model="m", deterministic=True).deterministic
