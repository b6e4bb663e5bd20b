"""Everything that the client and a run rely on, asked over HTTP of each engine: the embedded one and real SGLang.

The first line of each docstring is a row of the table in docs/serving.md, `known_difference` what stands in it.
"""

import asyncio
import os

import numpy as np
import pytest

from megatron_fapo.errors import RequestRejected, WeightsError
from megatron_fapo.held import HeldDigests, differing
from megatron_fapo.publish.publisher import publish
from megatron_fapo.publish.settings import PublishSettings
from megatron_fapo.publish.transports import Delta, make_transport
from megatron_fapo.records import VersionSpan
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.launcher import launch_one
from tests.conftest import lacking
from tests.publish.ends import Source
from tests.serving.conformance import ENGINES, KEY, SGLANG, Served, events, known_difference, settings
from tests.serving.worlds import CONTEXT, EOS, with_kept_cache, write_bucket

SERVERS = [pytest.param(e, marks=pytest.mark.long if e == "sglang" else ()) for e in ENGINES]


@pytest.fixture(scope="module", params=SERVERS)
def launched(request, models, tmp_path_factory):
    """(engine, URL) of a server of the first model."""
    engine, folder = request.param, tmp_path_factory.mktemp("conformance")
    if engine == "sglang" and not SGLANG.exists():
        lacking("SGLang's environment is missing: make sglang-cpu")
    (folder / "key").write_text(KEY)
    with asyncio.Runner() as runner:
        given = settings(engine, models[0], folder / "key", CONTEXT)
        process = runner.run(launch_one(given, folder / f"{engine}.log", 0))
        yield engine, process.url
        runner.run(process.stop())


@pytest.fixture
async def server(request, launched, models):
    """A server, left as it was found."""
    engine, url = launched
    if known := getattr(request.function, "known_differences", {}).get(engine):
        request.node.add_marker(pytest.mark.xfail(reason=known.what, strict=True))
        if not known.run:
            pytest.xfail(known.what)
    async with ServerClient(url, KEY, timeout=60) as client:
        served = Served(engine, url, client)
        yield served
        await client.abort()
        await client.resume_generation()
        if await client.weight_version() != "default":
            body = {"model_path": str(models[0]), "weight_version": "default"}
            assert (await served.post("/update_weights_from_disk", **body))[0] == 200


async def collect(client, request):
    return {sample.id: sample async for sample in client.generate(request)}


# --- health, info, key


async def test_health(server):
    """`GET /health` and `/health_generate` answer 200"""
    assert await server.client.health()
    async with server.session() as session, session.get(f"{server.url}/health_generate") as response:
        assert response.status == 200


async def test_info(server, models):
    """`GET /get_server_info`: `model_path`, `context_length`, `max_running_requests`"""
    info = await server.client.info()
    wanted = {"model_path": str(models[0]), "context_length": CONTEXT, "max_running_requests": 64}
    assert {name: info[name] for name in wanted} == wanted


async def test_current_version(server, models):
    """`GET /get_model_info`: the present `weight_version`, `default` before the first update"""
    assert await server.client.weight_version() == "default"
    await server.client.load_from_disk(str(models[1]), 8)
    assert await server.client.weight_version() == "8"


async def test_key(server, request_for, prompts):
    """A wrong or missing API key is refused with 401"""
    for key in (None, "wrong"):
        async with ServerClient(server.url, key) as stranger:
            with pytest.raises(RequestRejected, match="401"):
                await stranger.info()
            with pytest.raises(RequestRejected, match="401"):
                await collect(stranger, request_for(prompts[0]))


# --- generating


async def test_greedy(server, model_a, prompts, request_for):
    """Greedy tokens are those of Hugging Face, log-probs within 1e-5"""
    for prompt in prompts:
        request = request_for(prompt, temperature=0.0, max_new_tokens=40, stop_token_ids=(EOS,))
        (sample,) = (await collect(server.client, request)).values()
        expected = model_a.greedy(prompt, 40)
        expected = expected[: expected.index(EOS) + 1] if EOS in expected else expected
        assert sample.token_ids.tolist() == expected
        np.testing.assert_allclose(sample.logprobs, model_a.logprobs(prompt, expected), atol=1e-5)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 0.8)])
async def test_logprobs(server, model_a, prompts, request_for, temperature, top_p):
    """Log-probs are of softmax(logits / temperature), before top-p cuts it, within 1e-5"""
    for prompt in prompts[:4]:
        request = request_for(prompt, seeds=range(4), temperature=temperature, top_p=top_p, max_new_tokens=24)
        for sample in (await collect(server.client, request)).values():
            tokens = sample.token_ids.tolist()
            np.testing.assert_allclose(sample.logprobs, model_a.logprobs(prompt, tokens, temperature), atol=1e-5)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
async def test_distribution(server, model_a, prompts, temperature, top_p):
    """Tokens follow softmax(logits / temperature) cut by `top_p` (χ² of 1024 first tokens)"""
    draws = 1024
    parameters = {"temperature": temperature, "top_p": top_p, "n": draws, "max_new_tokens": 1, "ignore_eos": True}
    status, answers = await server.post("/generate", input_ids=prompts[0], sampling_params=parameters)
    assert status == 200, answers
    firsts = [answer["output_ids"][0] for answer in answers]
    expected = model_a.distribution(prompts[0], temperature).double().numpy()
    order = np.argsort(-expected)
    kept = np.isin(np.arange(len(expected)), order[: np.searchsorted(np.cumsum(expected[order]), top_p) + 1])
    wanted = draws * np.where(kept, expected, 0) / expected[kept].sum()
    counts = np.bincount(firsts, minlength=len(expected))
    assert counts[~kept].sum() == 0
    likely = wanted >= 5
    observed, wanted = (
        np.append(counts[likely], counts[~likely].sum()),
        np.append(wanted[likely], wanted[~likely].sum()),
    )
    chi2 = ((observed - wanted) ** 2 / np.maximum(wanted, 1e-9))[wanted > 1e-6].sum()
    freedom = (wanted > 1e-6).sum() - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom), (chi2, freedom)


async def test_group(server, prompts, request_for):
    """A request for n samples yields each of them once, under its id, and they differ"""
    requests = [request_for(p, seeds=range(12), name=f"p{i}") for i, p in enumerate(prompts[:3])]
    answers = await asyncio.gather(*(collect(server.client, request) for request in requests))
    for request, samples in zip(requests, answers, strict=True):
        assert samples.keys() == set(request.ids)
        assert len({tuple(sample.token_ids.tolist()) for sample in samples.values()}) > 6


@known_difference("sglang", "`sampling_seed` is ignored on the CPU: a run is reproducible in distribution only")
async def test_seeds(server, prompts, request_for):
    """`sampling_seed`: equal seeds draw equal tokens"""
    request = request_for(prompts[3], seeds=range(4), max_new_tokens=24)
    one, two = await collect(server.client, request), await collect(server.client, request)
    for rid in request.ids:
        assert one[rid].token_ids.tolist() == two[rid].token_ids.tolist()


async def test_batch(server, model_a, prompts):
    """`input_ids` with several prompts: a list of answers in their order"""
    parameters = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    status, answers = await server.post("/generate", input_ids=prompts[:4], sampling_params=parameters)
    assert status == 200
    assert [answer["output_ids"] for answer in answers] == [model_a.greedy(prompt, 8) for prompt in prompts[:4]]


async def test_meta(server, prompts):
    """`meta_info`: `id`, `prompt_tokens`, `completion_tokens`, `weight_version`, `output_token_logprobs`"""
    parameters = {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompts[1], "sampling_params": parameters, "rid": "mine", "return_logprob": True}
    _, answer = await server.post("/generate", **body)
    meta = answer["meta_info"]
    wanted = {"id": "mine", "prompt_tokens": 5, "completion_tokens": 5, "weight_version": "default"}
    assert {name: meta[name] for name in wanted} == wanted
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]


async def test_length(server, prompts):
    """`finish_reason` `length` at `max_new_tokens`"""
    answer = await server.generate(prompts[1], 30)
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 30}


async def test_stop_tokens(server, model_a, prompts):
    """`stop_token_ids` end an answer, the token included"""
    expected = model_a.greedy(prompts[1], 30)
    stop = expected[7]
    answer = await server.generate(prompts[1], 30, stop_token_ids=[stop], ignore_eos=False)
    assert answer["output_ids"] == expected[: expected.index(stop) + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


async def test_stop_texts(server, model_a, prompts):
    """`stop` texts end an answer; the text is cut from `text`"""
    expected = model_a.greedy(prompts[1], 30)
    stop = expected[7]
    answer = await server.generate(prompts[1], 30, stop=[f"w{stop}"])
    assert answer["output_ids"] == expected[: expected.index(stop) + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": f"w{stop}"}
    assert f"w{stop}" not in answer["text"].split()


async def test_end_of_sequence(server, prompts):
    """The model's end of sequence ends an answer, unless `ignore_eos`"""
    for ignored in (False, True):
        parameters = {"n": 32, "max_new_tokens": 60, "ignore_eos": ignored, "temperature": 1.0}
        _, answers = await server.post("/generate", input_ids=prompts[0], sampling_params=parameters)
        ended = [a for a in answers if a["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}]
        assert bool(ended) is not ignored
        assert all(answer["output_ids"].index(EOS) == len(answer["output_ids"]) - 1 for answer in ended)


async def test_stream(server, model_a, prompts):
    """`stream`: server-sent events with all tokens so far, the last with its finish reason, then `[DONE]`"""
    body = {"input_ids": prompts[1], "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 6}}
    async with server.session() as session, session.post(f"{server.url}/generate", json=body) as response:
        text = await response.text()
    assert text.rstrip().endswith("data: [DONE]")
    expected = model_a.greedy(prompts[1], 6)
    seen = events(text)
    assert all(event["output_ids"] == expected[: len(event["output_ids"])] for event in seen)
    assert seen[-1]["output_ids"] == expected
    assert [bool(event["meta_info"]["finish_reason"]) for event in seen] == [False] * (len(seen) - 1) + [True]


async def test_text(server, model_a):
    """`text` instead of `input_ids`; answers carry `text`"""
    _, answer = await server.post("/generate", text="w5 w6 w7", sampling_params={"temperature": 0, "max_new_tokens": 5})
    expected = model_a.greedy([5, 6, 7], 5)
    assert (answer["output_ids"], answer["text"].split()) == (expected, [f"w{i}" for i in expected])


CHAT = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w6 w7"}]
"""[5, 6, 7, 2] under the template of the tiny model."""


async def chat(server, **body):
    greedy = {"messages": CHAT, "temperature": 0, "max_tokens": 8, "ignore_eos": True, "model": "m"}
    return await server.post("/v1/chat/completions", **{**greedy, **body})


async def test_models(server, models):
    """`GET /v1/models`: the one model under its path"""
    async with server.session() as session, session.get(f"{server.url}/v1/models") as response:
        (model,) = (await response.json())["data"]
    assert {"id": str(models[0]), "object": "model", "max_model_len": CONTEXT}.items() <= model.items()


async def test_chat(server, model_a):
    """`/v1/chat/completions`: `content`, `finish_reason`, `usage` of greedy answers; `max_tokens`, `n`, `logprobs`"""
    expected = model_a.greedy([5, 6, 7, 2], 8)
    status, answer = await chat(server, n=2, logprobs=True)
    assert status == 200, answer
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"].split() == [f"w{token}" for token in expected]
        assert choice["finish_reason"] == "length"
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        np.testing.assert_allclose(logprobs, model_a.logprobs([5, 6, 7, 2], expected), atol=1e-5)
    used = {"completion_tokens": 16, "prompt_tokens": 4, "total_tokens": 20}
    assert used.items() <= answer["usage"].items()


async def test_chat_end(server, model_a):
    """`/v1/chat/completions`: the end of sequence and `stop` texts end an answer and are cut from it"""
    expected = model_a.greedy([5, 6, 7, 2], 8)
    _, answer = await chat(server, stop=[f"w{expected[4]}"])
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    before = expected[: expected.index(expected[4])]
    assert choice["message"]["content"].split() == [f"w{token}" for token in before]
    _, answer = await chat(server, n=64, temperature=1.0, max_tokens=100, ignore_eos=False)
    ended = [choice for choice in answer["choices"] if choice["finish_reason"] == "stop"]
    assert ended
    assert not any(f"w{EOS}" in choice["message"]["content"].split() for choice in ended)


async def test_chat_stream(server, model_a):
    """`/v1/chat/completions` with `stream`: pieces of `content`, then `usage` where `stream_options` asks, `[DONE]`"""
    body = {"messages": CHAT, "temperature": 0, "max_tokens": 8, "ignore_eos": True, "model": "m", "stream": True}
    body["stream_options"] = {"include_usage": True}
    async with server.session() as session, session.post(f"{server.url}/v1/chat/completions", json=body) as response:
        text = await response.text()
    assert text.rstrip().endswith("data: [DONE]")
    *chunks, last = events(text)
    words = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert words.split() == [f"w{token}" for token in model_a.greedy([5, 6, 7, 2], 8)]
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]] == ["length"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 12)


async def test_chat_refusals(server):
    """`/v1/chat/completions`: what is wrong with a request is refused with 400"""
    for wrong in ({"messages": []}, {"messages": "w5"}, {"temperature": -1}, {"max_tokens": 2000}):
        status, answer = await chat(server, **wrong)
        assert status == 400, (wrong, answer)


# --- errors


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


# --- control


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


# --- weights


@pytest.fixture
def bucket_of():
    """Tensors in shared memory; segments are removed at the end."""
    segments = []

    def make(tensors):
        segment, bucket = write_bucket(f"conformance-{len(segments)}", tensors)
        segments.append(segment)
        return segment, bucket

    yield make
    for segment in segments:
        segment.remove()


async def expected_of(client, buckets):
    """What the server must hold, from the bytes of its buckets."""
    digests = HeldDigests(await client.layout())
    for segment, bucket in buckets:
        for spec in bucket.tensors:
            nbytes = int(np.prod(spec.shape)) * 4
            digests.add(spec, segment.memory[spec.offset : spec.offset + nbytes])
    return digests.result()


async def test_from_disk(server, models, model_b, prompts):
    """`/update_weights_from_disk`: the folder's weights, under `weight_version`"""
    await server.client.load_from_disk(str(models[1]), 4)
    answer = await server.generate(prompts[2], 24)
    assert answer["output_ids"] == model_b.greedy(prompts[2], 24)
    assert answer["meta_info"]["weight_version"] == "4"


async def test_from_nowhere(server, model_a, prompts):
    """A folder that cannot be read is refused with 400; the weights stay"""
    with pytest.raises(RequestRejected, match="status 400"):
        await server.client.load_from_disk("no-such-folder", 5)
    assert (await server.generate(prompts[2], 24))["output_ids"] == model_a.greedy(prompts[2], 24)


async def test_from_shared_memory(server, model_b, bucket_of, prompts, request_for):
    """`begin_weight_update`, buckets in shared memory, `end_weight_update`: the new model under its version"""
    tensors = list(model_b.tensors().items())
    await server.client.begin_update()
    for half in (tensors[:7], tensors[7:]):
        await server.client.load_bucket(bucket_of(dict(half))[1])
    await server.client.end_update(3)
    (sample,) = (await collect(server.client, request_for(prompts[3], temperature=0.0, max_new_tokens=24))).values()
    expected = model_b.greedy(prompts[3], 24)[: len(sample.token_ids)]
    assert sample.token_ids.tolist() == expected
    assert sample.versions == (VersionSpan(start=0, version=3),)
    np.testing.assert_allclose(sample.logprobs, model_b.logprobs(prompts[3], expected), atol=1e-5)


async def test_old_prefixes(server, model_b, bucket_of, prompts):
    """Prefixes that old weights computed are not used after an update"""
    prompt = prompts[4] * 4
    await server.generate(prompt, 2)
    await server.client.begin_update()
    await server.client.load_bucket(bucket_of(model_b.tensors())[1])
    await server.client.end_update(3)
    answer = await server.generate(prompt, 12)
    logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    np.testing.assert_allclose(logprobs, model_b.logprobs(prompt, answer["output_ids"]), atol=1e-5)


async def test_waits(server, model_b, bucket_of, prompts):
    """Nothing is generated while an update is open; `/health` answers"""
    await server.client.begin_update()
    waiting = asyncio.ensure_future(server.generate(prompts[2], 24))
    await asyncio.wait({waiting}, timeout=0.3)
    assert not waiting.done()
    assert await server.client.health()
    await server.client.load_bucket(bucket_of(model_b.tensors())[1])
    await asyncio.wait({waiting}, timeout=0.3)
    assert not waiting.done()
    await server.client.end_update(9)
    assert (await waiting)["output_ids"] == model_b.greedy(prompts[2], 24)


async def test_held(server, model_a, model_b, bucket_of):
    """`/weights_checker`: the digests of what is held are those of what was sent"""
    old, new = bucket_of(model_a.tensors()), bucket_of(model_b.tensors())
    assert await server.client.held() == await expected_of(server.client, [old])
    await server.client.begin_update()
    await server.client.load_bucket(new[1])
    assert await server.client.held() == await expected_of(server.client, [new])
    await server.client.end_update(3)


async def test_flipped_byte(server, model_b, bucket_of):
    """A byte that flips on its way is found by name, at the latest in the digests of what is held"""
    segment, bucket = bucket_of(model_b.tensors())
    expected = await expected_of(server.client, [(segment, bucket)])
    place = next(spec for spec in bucket.tensors if spec.name.endswith("1.self_attn.k_proj.weight"))
    segment.memory[place.offset + 1] ^= 1
    await server.client.begin_update()
    refused = ""
    try:
        await server.client.load_bucket(bucket)
    except RequestRejected as error:
        refused = str(error)
    if refused:
        assert place.name in refused
    else:
        (wrong,) = differing(expected, await server.client.held())
        assert wrong == place.name.replace("k_proj", "qkv_proj")
    segment.memory[place.offset + 1] ^= 1
    await server.client.load_bucket(bucket)
    await server.client.end_update(1)
    assert await server.client.held() == expected


async def published(server, tmp_path, transport, tensors, version, flip=None, kilobytes=48):
    """Publish tensors in several buckets, proven by what the server holds; the transport and the exporter."""
    if isinstance(transport, str):
        given = PublishSettings(transport=transport, bucket_megabytes=kilobytes / 1024, group_timeout=20)
        transport = make_transport(given, f"conformance-{os.getpid()}", tmp_path)
    source = Source(tensors, flip)
    try:
        await publish(source, [server.client], transport, version)
    finally:
        if not isinstance(transport, Delta):
            transport.close()
    return transport, source


async def arrives(server, tmp_path, transport, model, prompt):
    """A whole update; before, one with a byte that flips on its way, which stops by name."""
    place = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises((WeightsError, RequestRejected), match=r"layers\.1\.self_attn\.(k|qkv)_proj\.weight"):
        await published(server, tmp_path, transport, model.tensors(), 2, flip=place)
    assert await server.client.weight_version() == "default"
    transport, _ = await published(server, tmp_path, transport, model.tensors(), 3)
    answer = await server.generate(prompt, 24)
    assert answer["output_ids"] == model.greedy(prompt, 24)
    assert answer["meta_info"]["weight_version"] == "3"
    return transport


async def test_publish_disk(server, model_b, prompts, tmp_path):
    """Published as files on disk, proven by what is held; a flipped byte is found by name"""
    await arrives(server, tmp_path, "disk", model_b, prompts[2])
    assert not list((tmp_path / "weights").iterdir())


async def test_publish_group(server, model_b, prompts, tmp_path):
    """Published in a process group (gloo), proven by what is held; a flipped byte is found by name"""
    await arrives(server, tmp_path, "group", model_b, prompts[2])


async def test_publish_delta(server, model_b, prompts, tmp_path):
    """Published as a delta, proven by what is held; a flipped byte is found by name"""
    delta = await arrives(server, tmp_path, "delta", model_b, prompts[2])
    await published(server, tmp_path, delta, model_b.tensors(), 4)
    delta.close()


@known_difference("sglang", "takes no changes: it is sent everything")
async def test_changes(server, model_b, models, tmp_path):
    """A delta sends what changed; from another base it is refused by name, and everything is sent in full"""
    delta, _ = await published(server, tmp_path, "delta", model_b.tensors(), 3)
    full = delta.nbytes
    tensors = {name: tensor.clone() for name, tensor in model_b.tensors().items()}
    for tensor in tensors.values():
        tensor.view(-1)[::40] *= 1.5
    try:
        _, source = await published(server, tmp_path, delta, tensors, 4)
        assert (source.exports, delta.nbytes < full / 10) == (1, True)
        await server.client.load_from_disk(str(models[0]), 5)
        _, source = await published(server, tmp_path, delta, tensors, 6)
        assert (source.exports, delta.nbytes) == (2, full)
        assert await server.client.weight_version() == "6"
    finally:
        delta.close()


@known_difference("sglang", "it loads what comes: the digests of what is held tell")
async def test_incomplete(server, model_b, bucket_of):
    """An update that lacks a tensor cannot be closed"""
    name, *_ = tensors = model_b.tensors()
    _, all_of_them = bucket_of(tensors)
    await server.client.begin_update()
    await server.client.load_bucket(bucket_of({key: tensors[key] for key in tensors if key != name})[1])
    try:
        with pytest.raises(RequestRejected, match="missing"):
            await server.client.end_update(1)
    finally:
        if await server.client.weight_version() != "1":
            await server.client.load_bucket(all_of_them)
            await server.client.end_update(1)


async def test_needs_session(server):
    """Weights outside of an update are refused with 400"""
    with pytest.raises(RequestRejected, match="begin_weight_update"):
        await server.client.command("/end_weight_update", {"weight_version": "1"})
