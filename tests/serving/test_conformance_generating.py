"""What a run relies on when it generates, asked over HTTP of each engine: the embedded one and real SGLang.

The first line of each docstring is a row of the table in docs/serving.md, `known_difference` what stands in it.
"""

import asyncio

import numpy as np
import pytest

from megatron_fapo.errors import RequestRejected
from megatron_fapo.serving.client import ServerClient
from tests.serving.conformance import collect, events, known_difference
from tests.serving.worlds import CONTEXT, EOS


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
