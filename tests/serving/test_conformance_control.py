"""What is refused, ended, paused and given back, asked over HTTP of each engine.

The first line of each docstring is a row of the table in docs/serving.md, `known_difference` what stands in it.
"""

import asyncio

import numpy as np
import pytest

from megatron_fapo.errors import RequestRejected
from tests.serving.conformance import collect, known_difference
from tests.serving.worlds import with_kept_cache


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [3, "x"]}, "input_ids"),
        ({}, "input_ids"),
        ({"input_ids": [3], "sampling_params": {"temprature": 1}}, "temprature"),
        ({"input_ids": [3], "sampling_params": {"temperature": -1}}, "temperature"),
        ({"input_ids": [3], "sampling_params": {"top_p": 0}}, "top_p"),
        ({"input_ids": [[3], [4]], "rid": ["a", "b", "c"]}, "rid"),
    ],
    ids=["no tokens", "a word", "nothing", "misspelt", "temperature", "top_p", "ids"],
)
async def test_refusals(server, body, words):
    """What is wrong with a request is refused with 400 and named"""
    with pytest.raises(RequestRejected, match=f"(?i){words}.*status 400"):
        await server.client.command("/generate", body)


async def test_too_long(server, request_for):
    """A prompt and answer that do not fit the context are refused with 400 and both lengths"""
    with pytest.raises(RequestRejected, match=r"1100.*1024|1024.*1100"):
        await collect(server.client, request_for([5] * 1000, max_new_tokens=100))


@known_difference("sglang", "it ends the server (CPU); a run sends what the model's tokenizer made", run=False)
async def test_unknown_token(server):
    """A token outside of the vocabulary is refused with 400"""
    with pytest.raises(RequestRejected, match="token 64"):
        await server.client.command("/generate", {"input_ids": [3, 64]})


@known_difference("sglang", "is ignored")
async def test_unknown_field(server):
    """A field of /generate that is not supported is refused with 400"""
    with pytest.raises(RequestRejected, match="imagedata"):
        await server.client.command("/generate", {"input_ids": [3], "imagedata": "x", "sampling_params": {"n": 1}})


async def test_bad_bodies(server):
    """A body that is not JSON is refused with 400, an unknown route with 404"""
    async with server.session() as session:
        async with session.post(f"{server.url}/generate", data=b"{oops") as response:
            assert response.status == 400
        async with session.post(f"{server.url}/no_such_route") as response:
            assert response.status == 404


async def test_abort_by_id(server, prompts):
    """`/abort_request` with `rid` ends that request; it returns what it has"""
    one, two = await server.start(prompts[3], "one"), await server.start(prompts[3], "two")
    await server.client.abort("one")
    answer = await one
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(answer["output_ids"]) < 900
    assert not two.done()
    await server.client.abort("two")
    assert (await two)["meta_info"]["finish_reason"]["type"] == "abort"


@known_difference("sglang", "whole ids only")
async def test_abort_by_prefix(server, prompts):
    """`/abort_request` ends all requests whose id begins with `rid`"""
    running = await server.start(prompts[3], "one-r0", 300)
    await server.client.abort("one-")
    assert (await running)["meta_info"]["finish_reason"]["type"] == "abort"


async def test_abort_all(server, prompts):
    """`/abort_request` with `abort_all` ends everything"""
    tasks = [await server.start(prompts[3], name) for name in ("one", "two")]
    await server.client.abort()
    for task in tasks:
        assert (await task)["meta_info"]["finish_reason"]["type"] == "abort"


async def test_abandoned(server, prompts):
    """A request whose client leaves is dropped"""
    parameters = {"max_new_tokens": 1000, "ignore_eos": True}
    body = {"input_ids": prompts[0], "sampling_params": parameters}
    task = asyncio.ensure_future(server.post("/generate", **body))
    while (await server.post("/flush_cache"))[0] == 200:  # until it runs
        await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.wait({task})
    await server.until_idle()


async def test_flush(server, prompts):
    """`/flush_cache` is refused with 400 while something runs"""
    assert (await server.post("/flush_cache"))[0] == 200
    task = await server.start(prompts[3], "busy")
    with pytest.raises(RequestRejected, match="flush"):
        await server.client.flush_cache()
    await server.client.abort()
    await task


async def changed_in_flight(server, models, prompt, mode):
    """An answer of 300 tokens whose weights changed in the middle: its tokens, their log-probs, and the split."""
    running = await server.start(prompt, "long", 300)
    await server.client.pause(mode)
    body = {"model_path": str(models[1]), "weight_version": "1", "flush_cache": mode == "retract"}
    assert (await server.post("/update_weights_from_disk", **body))[0] == 200
    await asyncio.wait({running}, timeout=0.3)
    assert not running.done()
    await server.client.resume_generation()
    answer = await running
    (zero, first), (split, second) = [(s["start"], s["version"]) for s in answer["meta_info"]["weight_versions"]]
    assert (zero, first, second) == (0, "default", "1")
    assert 0 < split < 300
    logprobs = np.array([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
    return answer["output_ids"], logprobs, split


async def test_versions(server, models, model_a, model_b, prompts):
    """Weights that change between pause with `retract` and continue: `weight_versions` is the exact split"""
    tokens, logprobs, split = await changed_in_flight(server, models, prompts[3], "retract")
    np.testing.assert_allclose(logprobs[:split], model_a.logprobs(prompts[3], tokens[:split]), atol=2e-5)
    np.testing.assert_allclose(logprobs[split:], model_b.logprobs(prompts[3], tokens)[split:], atol=2e-5)


@known_difference("sglang", "the token that was under way (overlapped scheduling) counts to the new version")
async def test_versions_in_place(server, models, model_a, model_b, prompts):
    """The same with `in_place`, where the old keys and values stay"""
    tokens, logprobs, split = await changed_in_flight(server, models, prompts[3], "in_place")
    np.testing.assert_allclose(logprobs[:split], model_a.logprobs(prompts[3], tokens[:split]), atol=2e-5)
    after = with_kept_cache(model_a.model, model_b.model, prompts[3], tokens, split)
    np.testing.assert_allclose(logprobs[split:], after, atol=2e-5)


async def test_pause_abort(server, prompts):
    """`/pause_generation` with `abort` ends what runs; unknown modes are refused with 400"""
    running = await server.start(prompts[3], "long")
    await server.client.pause("abort")
    answer = await running
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    with pytest.raises(RequestRejected):
        await server.client.pause("sideways")


async def test_release_cache(server, model_a, prompts):
    """`/release_memory_occupation` and `/resume_memory_occupation` with `kv_cache`: answers are as before"""
    await server.client.release_memory(["kv_cache"])
    await server.client.resume_memory(["kv_cache"])
    assert (await server.generate(prompts[0], 24))["output_ids"] == model_a.greedy(prompts[0], 24)


@known_difference("sglang", "without the memory saver (CPU) nothing is released and weights stay")
async def test_release_weights(server, models, model_a, prompts):
    """Released weights are needed again before anything is generated"""
    await server.client.release_memory()
    await server.client.resume_memory()
    with pytest.raises(RequestRejected, match="loaded"):
        await server.client.command("/generate", {"input_ids": prompts[0]})
    await server.client.load_from_disk(str(models[0]), 2)
    assert (await server.generate(prompts[0], 24))["output_ids"] == model_a.greedy(prompts[0], 24)


@known_difference("sglang", "is ignored")
async def test_unknown_tags(server):
    """Unknown memory tags are refused with 400"""
    with pytest.raises(RequestRejected, match="wights"):
        await server.client.release_memory(["wights"])
