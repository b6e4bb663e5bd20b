"""New weights arrive whole or not at all, and a token's version is the one that drew it."""

import asyncio
import json
from dataclasses import replace

import aiohttp
import numpy as np
import pytest
import torch

from megatron_fapo.errors import RequestRejected
from megatron_fapo.records import Bucket, VersionSpan
from megatron_fapo.weights import checksum, digest
from tests.serving.worlds import make_model, with_kept_cache


async def greedy(client, request_for, prompt, new=24):
    request = request_for(prompt, temperature=0.0, max_new_tokens=new)
    (sample,) = [sample async for sample in client.generate(request)]
    return sample


def sum_of(reference):
    return checksum(
        {name: digest(t.contiguous().view(torch.uint8).numpy().tobytes()) for name, t in reference.tensors().items()}
    )


async def test_an_update_from_shared_memory_makes_the_new_model(
    client, model_a, model_b, bucket_of, request_for, prompts
):
    assert await client.checksum() == sum_of(model_a)
    tensors = list(model_b.tensors().items())
    await client.begin_update()
    for half in (tensors[:7], tensors[7:]):
        await client.load_bucket(bucket_of(dict(half))[1])
    assert await client.checksum() == sum_of(model_b) != sum_of(model_a)
    await client.end_update(3)
    sample = await greedy(client, request_for, prompts[3])
    expected = model_b.greedy(prompts[3], 24)[: len(sample.token_ids)]
    assert sample.token_ids.tolist() == expected
    assert sample.versions == (VersionSpan(start=0, version=3),)
    np.testing.assert_allclose(sample.logprobs, model_b.logprobs(prompts[3], expected), atol=1e-5)
    assert (await client.info())["weight_version"] == "3"


async def test_a_flipped_byte_is_refused_by_name_and_the_update_stays_open(client, model_b, bucket_of):
    segment, bucket = bucket_of(model_b.tensors())
    bad = bucket.tensors[4]
    segment.memory[bad.offset + 2] ^= 1
    await client.begin_update()
    with pytest.raises(RequestRejected, match=bad.name):
        await client.load_bucket(bucket)
    with pytest.raises(RequestRejected, match="missing"):
        await client.end_update(1)
    segment.memory[bad.offset + 2] ^= 1
    await client.load_bucket(bucket)
    await client.end_update(1)
    assert await client.checksum() == sum_of(model_b)


@pytest.mark.parametrize("what", ["unknown", "shape", "dtype", "beyond", "elsewhere", "gone", "short"])
async def test_a_bucket_that_does_not_fit_is_refused_and_says_why(client, model_b, bucket_of, tmp_path, what):
    name = "model.norm.weight"
    _, good = bucket_of({name: model_b.tensors()[name]})
    spec = good.tensors[0]
    outside = tmp_path / "fapo-x"
    outside.write_bytes(b"0" * 4096)
    bucket, words = {
        "unknown": (replace(good, tensors=(replace(spec, name="model.nrom"),)), "'model.nrom'.*no parameter"),
        "shape": (replace(good, tensors=(replace(spec, shape=(12, 4)),)), r"norm.weight.*\[12, 4\].*\[48\]"),
        "dtype": (replace(good, tensors=(replace(spec, dtype="bfloat16"),)), "norm.weight.*bfloat16.*float32"),
        "beyond": (replace(good, tensors=(replace(spec, offset=4096),)), "norm.weight.*leave its bucket"),
        "elsewhere": (replace(good, segment=str(outside)), "must be a file named fapo-"),
        "gone": (replace(good, segment=good.segment + "-gone"), "No such file"),
        "short": (replace(good, nbytes=10**6), r"has \d+ bytes, 1000000 are needed"),
    }[what]
    await client.begin_update()
    with pytest.raises(RequestRejected, match=words):
        await client.load_bucket(bucket)
    await client.load_bucket(bucket_of(model_b.tensors())[1])
    await client.end_update(1)


async def test_a_bucket_needs_an_open_update(client, model_b, bucket_of):
    with pytest.raises(RequestRejected, match="begin_weight_update"):
        await client.load_bucket(bucket_of(model_b.tensors())[1])
    with pytest.raises(RequestRejected, match="begin_weight_update"):
        await client.end_update(1)
    with pytest.raises(RequestRejected, match="not a table"):
        await client._json("POST", "/update_weights_from_tensor", {"load_format": "shared_memory", "bucket": {}})


async def test_a_tied_head_that_is_sent_along_counts_once(client, model_b, bucket_of):
    tensors = model_b.tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    await client.begin_update()
    await client.load_bucket(bucket_of(tensors)[1])
    await client.end_update(1)
    assert await client.checksum() == sum_of(model_b)


async def test_nothing_is_generated_while_an_update_is_open(client, model_b, bucket_of, request_for, prompts):
    await client.begin_update()
    waiting = asyncio.ensure_future(greedy(client, request_for, prompts[2]))
    await asyncio.wait({waiting}, timeout=0.2)
    assert not waiting.done()
    assert await client.health()
    await client.load_bucket(bucket_of(model_b.tensors())[1])
    await asyncio.wait({waiting}, timeout=0.1)
    assert not waiting.done()
    await client.end_update(9)
    sample = await waiting
    assert sample.token_ids.tolist() == model_b.greedy(prompts[2], 24)[: len(sample.token_ids)]


async def test_an_update_from_disk(client, models, model_b, request_for, prompts):
    await client.load_from_disk(str(models[1]), 4)
    sample = await greedy(client, request_for, prompts[2])
    assert sample.token_ids.tolist() == model_b.greedy(prompts[2], 24)[: len(sample.token_ids)]
    assert sample.versions == (VersionSpan(start=0, version=4),)
    with pytest.raises(RequestRejected, match=r"no config.json|no \*.safetensors"):
        await client.load_from_disk(str(models[1].parent), 5)
    again = await greedy(client, request_for, prompts[2])
    assert again.token_ids.tolist() == sample.token_ids.tolist()
    assert again.versions == (VersionSpan(start=0, version=4),)


async def test_a_folder_of_another_shape_changes_nothing(client, model_a, request_for, prompts, tmp_path):
    make_model(tmp_path / "llama", "llama")
    with pytest.raises(RequestRejected, match=r"has shape|tensors are missing"):
        await client.load_from_disk(str(tmp_path / "llama"), 5)
    assert await client.checksum() == sum_of(model_a)
    sample = await greedy(client, request_for, prompts[2])
    assert sample.token_ids.tolist() == model_a.greedy(prompts[2], 24)[: len(sample.token_ids)]


async def start_streaming(server_url, body):
    """A streaming request that has drawn some tokens; (session, its events so far, the rest as a coroutine)."""
    session = aiohttp.ClientSession()
    response = await session.post(f"{server_url}/generate", json={**body, "stream": True, "return_logprob": True})
    seen = json.loads((await response.content.readuntil(b"\n\n"))[6:])

    async def last():
        events = [line[6:] for line in (await response.text()).split("\n\n") if line]
        await session.close()
        return json.loads(events[-2])

    return seen, asyncio.ensure_future(last())


def spans_of(answer):
    return [(span["start"], span["version"]) for span in answer["meta_info"]["weight_versions"]]


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_versions_tell_to_the_token_which_weights_drew_it(
    server_url, client, models, model_a, model_b, prompts, mode
):
    parameters = {"max_new_tokens": 400, "sampling_seed": 3, "ignore_eos": True}
    body = {"input_ids": prompts[3], "sampling_params": parameters}
    _, last = await start_streaming(server_url, body)
    await client.pause(mode)
    await client.load_from_disk(str(models[1]), 1)
    await asyncio.wait({last}, timeout=0.1)
    assert not last.done()
    await client.resume_generation()
    answer = await last
    (zero, first), (split, second) = spans_of(answer)
    assert (zero, first, second) == (0, "default", "1")
    assert 0 < split < 400
    tokens = answer["output_ids"]
    logprobs = np.array([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
    before = model_a.logprobs(prompts[3], tokens[:split])
    np.testing.assert_allclose(logprobs[:split], before, atol=1e-5)
    if mode == "retract":
        after = model_b.logprobs(prompts[3], tokens)[split:]
    else:
        after = with_kept_cache(model_a.model, model_b.model, prompts[3], tokens, split)
    np.testing.assert_allclose(logprobs[split:], after, atol=2e-5)


async def test_pausing_with_abort_ends_what_runs(server_url, client, prompts):
    body = {"input_ids": prompts[3], "sampling_params": {"max_new_tokens": 800, "ignore_eos": True}}
    _, last = await start_streaming(server_url, body)
    await client.pause("abort")
    answer = await last
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(answer["output_ids"]) < 800
    with pytest.raises(RequestRejected, match="sideways"):
        await client.pause("sideways")


async def test_released_weights_are_needed_again(client, model_a, models, request_for, prompts):
    await client.release_memory()
    with pytest.raises(RequestRejected, match="released"):
        await greedy(client, request_for, prompts[0])
    with pytest.raises(RequestRejected, match="released"):
        await client.begin_update()
    await client.resume_memory()
    with pytest.raises(RequestRejected, match="loaded"):
        await greedy(client, request_for, prompts[0])
    await client.load_from_disk(str(models[0]), 2)
    sample = await greedy(client, request_for, prompts[0])
    assert sample.token_ids.tolist() == model_a.greedy(prompts[0], 24)[: len(sample.token_ids)]


async def test_a_released_cache_comes_back_empty(client, model_a, request_for, prompts):
    await client.release_memory(["kv_cache"])
    with pytest.raises(RequestRejected, match="KV cache"):
        await greedy(client, request_for, prompts[0])
    await client.resume_memory(["kv_cache"])
    sample = await greedy(client, request_for, prompts[0])
    assert sample.token_ids.tolist() == model_a.greedy(prompts[0], 24)[: len(sample.token_ids)]
    with pytest.raises(RequestRejected, match="wights"):
        await client.release_memory(["wights"])


def test_a_backup_brings_the_weights_back():
    from megatron_fapo.serving.engine.decoder import Decoder, Shape
    from megatron_fapo.serving.engine.weights import Weights

    shape = Shape(
        vocabulary=8, hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16, epsilon=1e-6,
        rope_theta=1e4, positions=8, tied=True, qkv_bias=False, qk_norm=True,
    )  # fmt: skip
    model = Decoder(shape, torch.float32, 8)
    weights = Weights(model)
    weights.begin()
    for tensor in model.parameters.values():
        tensor.normal_()
    weights._missing.clear()
    weights.end()
    before = weights.checksum()
    storages = [tensor.untyped_storage() for tensor in model.parameters.values()]
    weights.release(backup=True)
    assert sum(storage.nbytes() for storage in storages) == 0
    assert not weights.usable
    weights.resume()
    assert (weights.checksum(), weights.usable) == (before, True)
    weights.release(backup=False)
    weights.resume()
    assert not weights.usable


def test_a_bucket_survives_its_trip_as_json(bucket_of, model_a):
    from dataclasses import asdict

    from megatron_fapo.serving.engine.weight_bodies import parse_bucket

    _, bucket = bucket_of(model_a.tensors())
    again = parse_bucket(json.loads(json.dumps({"load_format": "shared_memory", "bucket": asdict(bucket)})))
    assert again == bucket
    assert isinstance(again, Bucket)
