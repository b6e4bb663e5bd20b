"""What any engine behind the client must do: run against the embedded engine here."""

import asyncio
import json

import aiohttp
import numpy as np
import pytest

from megatron_fapo.errors import RequestRejected
from megatron_fapo.records import ints
from tests.serving.worlds import CONTEXT, EOS


async def collect(generator, request):
    return {sample.id: sample async for sample in generator.generate(request)}


async def test_greedy_tokens_are_those_of_hugging_face(client, model_a, prompts, request_for):
    async def one(place, prompt):
        (sample,) = (
            await collect(client, request_for(prompt, name=f"p{place}", temperature=0.0, max_new_tokens=40))
        ).values()
        return sample

    samples = await asyncio.gather(*(one(place, prompt) for place, prompt in enumerate(prompts)))
    for prompt, sample in zip(prompts, samples, strict=True):
        expected = model_a.greedy(prompt, 40)
        if EOS in expected:
            expected = expected[: expected.index(EOS) + 1]
        assert sample.token_ids.tolist() == expected
        np.testing.assert_allclose(sample.logprobs, model_a.logprobs(prompt, expected), atol=1e-5)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 0.8)])
async def test_logprobs_are_those_of_the_tempered_softmax_before_top_p(
    client, model_a, prompts, request_for, temperature, top_p
):
    for prompt in prompts:
        request = request_for(prompt, seeds=range(4), temperature=temperature, top_p=top_p, max_new_tokens=24)
        for sample in (await collect(client, request)).values():
            tokens = sample.token_ids.tolist()
            np.testing.assert_allclose(sample.logprobs, model_a.logprobs(prompt, tokens, temperature), atol=1e-5)


async def test_a_sample_depends_on_its_seed_and_not_on_the_batch(client, prompts, request_for):
    seeds = tuple(range(100, 108))
    together = await collect(client, request_for(prompts[3], seeds))
    again = await collect(client, request_for(prompts[3], seeds))
    for rid in together:
        assert again[rid].token_ids.tolist() == together[rid].token_ids.tolist()
    others = asyncio.gather(*(collect(client, request_for(p, seeds, name=f"o{i}")) for i, p in enumerate(prompts)))
    crowded = await collect(client, request_for(prompts[3], seeds[:1], name="alone"))
    await others
    assert crowded["alone-r0"].token_ids.tolist() == together["q-r0"].token_ids.tolist()
    assert len({tuple(sample.token_ids.tolist()) for sample in together.values()}) > 4


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
async def test_first_tokens_follow_the_distribution(client, model_a, prompts, request_for, temperature, top_p):
    draws = 4000
    request = request_for(prompts[0], range(draws), temperature=temperature, top_p=top_p, max_new_tokens=1)
    firsts = [sample.token_ids[0] async for sample in client.generate(request)]
    expected = model_a.distribution(prompts[0], temperature).double().numpy()
    order = np.argsort(-expected)
    kept = order[: np.searchsorted(np.cumsum(expected[order]), top_p) + 1]
    mask = np.isin(np.arange(len(expected)), kept)
    expected = np.where(mask, expected, 0) / expected[mask].sum()
    counts = np.bincount(firsts, minlength=len(expected))
    assert counts[~mask].sum() == 0
    likely = expected * draws >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum()) * draws
    chi2 = ((observed - wanted) ** 2 / np.maximum(wanted, 1e-9))[wanted > 1e-6].sum()
    freedom = (wanted > 1e-6).sum() - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom), (chi2, freedom)


async def test_consecutive_tokens_are_independent_draws(client, model_a, prompts, request_for):
    """The second token, given the first, follows its own distribution: its number is not the first one's."""
    request = request_for(prompts[0], range(4000), max_new_tokens=2)
    pairs = [sample.token_ids.tolist() async for sample in client.generate(request)]
    firsts = np.array([p[0] for p in pairs if len(p) == 2])
    common = np.bincount(firsts).argmax()
    seconds = [p[1] for p in pairs if len(p) == 2 and p[0] == common]
    expected = model_a.distribution([*prompts[0], int(common)]).double().numpy()
    counts, wanted = np.bincount(seconds, minlength=len(expected)), expected * len(seconds)
    likely = wanted >= 5
    chi2 = ((counts - wanted)[likely] ** 2 / wanted[likely]).sum()
    assert chi2 < likely.sum() + 4 * np.sqrt(2 * likely.sum())


async def test_why_an_answer_ends(post, model_a, prompts):
    prompt, expected = prompts[1], model_a.greedy(prompts[1], 30)
    greedy = {"temperature": 0, "max_new_tokens": 30}
    _, full = await post("/generate", input_ids=prompt, sampling_params={**greedy, "ignore_eos": True})
    assert full["output_ids"] == expected
    assert full["meta_info"]["finish_reason"] == {"type": "length", "length": 30}
    assert (full["meta_info"]["prompt_tokens"], full["meta_info"]["completion_tokens"]) == (5, 30)
    stop = expected[7]
    parameters = {**greedy, "ignore_eos": True, "stop_token_ids": [stop]}
    _, cut = await post("/generate", input_ids=prompt, sampling_params=parameters)
    assert cut["output_ids"] == expected[: expected.index(stop) + 1]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    parameters = {**greedy, "ignore_eos": True, "stop": [f"w{stop}"]}
    _, cut = await post("/generate", input_ids=prompt, sampling_params=parameters)
    assert cut["output_ids"] == expected[: expected.index(stop) + 1]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": f"w{stop}"}
    assert f"w{stop}" not in cut["text"].split()


async def test_end_of_sequence_stops_unless_ignored(post, prompts):
    parameters = {"n": 64, "max_new_tokens": 60, "sampling_seed": 5}
    _, stopped = await post("/generate", input_ids=prompts[0], sampling_params=parameters)
    _, ignored = await post("/generate", input_ids=prompts[0], sampling_params={**parameters, "ignore_eos": True})
    ended = [a for a in stopped if a["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}]
    assert ended
    answers = [a["output_ids"] for a in ended]
    assert all(tokens.index(EOS) == len(tokens) - 1 for tokens in answers)
    assert all(len(b["output_ids"]) == 60 for b in ignored)
    assert all(
        b["output_ids"][: len(a["output_ids"])] == a["output_ids"] for a, b in zip(stopped, ignored, strict=True)
    )


async def test_batches_n_and_seed_lists_agree_with_single_requests(post, prompts):
    parameters = {"max_new_tokens": 12, "sampling_seed": [7, 8, 9], "n": 3, "ignore_eos": True}
    _, grouped = await post("/generate", input_ids=prompts[:2], sampling_params=parameters, return_logprob=True)
    assert [answer["index"] for answer in grouped] == list(range(6))
    for place, answer in enumerate(grouped):
        single = {"max_new_tokens": 12, "sampling_seed": 7 + place % 3, "ignore_eos": True}
        _, alone = await post("/generate", input_ids=prompts[place // 3], sampling_params=single, return_logprob=True)
        assert alone["output_ids"] == answer["output_ids"]
        entries = answer["meta_info"]["output_token_logprobs"]
        assert [entry[1] for entry in entries] == answer["output_ids"]
        assert all(entry[2] is None for entry in entries)


async def test_a_group_is_prefilled_once(post, prompts):
    parameters = {"n": 4, "max_new_tokens": 2}
    _, answers = await post("/generate", input_ids=prompts[4], sampling_params=parameters)
    assert sorted(a["meta_info"]["cached_tokens"] for a in answers) == [0, 13, 13, 13]


async def test_a_server_without_group_streams_is_asked_sample_by_sample(client, prompts, request_for):
    request = request_for(prompts[2], seeds=range(5), max_new_tokens=20)
    as_group = await collect(client, request)
    client._group_stream = False
    singly = await collect(client, request)
    assert as_group.keys() == singly.keys() == set(request.ids)
    for rid, sample in as_group.items():
        assert sample.token_ids.tolist() == singly[rid].token_ids.tolist()
        np.testing.assert_allclose(sample.logprobs, singly[rid].logprobs, atol=1e-5)
        assert (sample.finish_reason, sample.versions) == (singly[rid].finish_reason, singly[rid].versions)


async def test_more_samples_than_rows_all_come_once(client, prompts, request_for):
    requests = [request_for(p, seeds=range(70), name=f"p{i}") for i, p in enumerate(prompts[:3])]
    answers = await asyncio.gather(*(collect(client, request) for request in requests))
    assert [len(answer) for answer in answers] == [70, 70, 70]


async def test_streams_are_server_sent_events_with_all_tokens_so_far(server_url, client, model_a, prompts):
    body = {"input_ids": prompts[1], "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 6}}
    async with aiohttp.ClientSession() as session, session.post(f"{server_url}/generate", json=body) as response:
        lines = [line[6:] for line in (await response.text()).split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    expected = model_a.greedy(prompts[1], 6)
    assert [event["output_ids"] for event in events] == [expected[: i + 1] for i in range(6)]
    assert [bool(event["meta_info"]["finish_reason"]) for event in events] == [False] * 5 + [True]


async def test_text_in_and_out(post, model_a):
    _, answer = await post("/generate", text="w5 w6 w7", sampling_params={"temperature": 0, "max_new_tokens": 5})
    expected = model_a.greedy([5, 6, 7], 5)
    assert (answer["output_ids"], answer["text"]) == (expected, " ".join(f"w{i}" for i in expected))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [3, 64]}, "token 64 is outside the vocabulary of 64"),
        ({"input_ids": [3, "x"]}, "input_ids"),
        ({}, "input_ids"),
        ({"input_ids": [3], "sampling_params": {"temprature": 1}}, "'temprature' is not supported"),
        ({"input_ids": [3], "sampling_params": {"temperature": -1}}, "temperature"),
        ({"input_ids": [3], "sampling_params": {"top_p": 0}}, "top_p"),
        ({"input_ids": [3], "sampling_params": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"input_ids": [3], "sampling_params": {"top_k": 5}}, "top_k"),
        ({"input_ids": [3], "sampling_params": {"n": 2, "sampling_seed": [1]}}, "sampling_seed"),
        ({"input_ids": [3], "image_data": "x"}, "image_data"),
        ({"input_ids": [[3], [4]], "rid": ["a", "b", "c"]}, "3 ids for 2 prompts"),
    ],
)
async def test_what_is_wrong_with_a_request_is_said(post, body, words):
    status, answer = await post("/generate", **body)
    assert status == 400
    assert words in answer["error"]["message"]


async def test_a_request_that_does_not_fit_says_how_long_it_is(client, request_for):
    with pytest.raises(RequestRejected, match=rf"1000 prompt tokens .* 100 are 1100 together.* is {CONTEXT}.*big-r0"):
        await collect(client, request_for([5] * 1000, name="big", max_new_tokens=100))


async def test_bodies_that_are_not_json_and_unknown_routes_are_refused_in_json(server_url, client):
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{server_url}/generate", data=b"{oops") as response:
            assert (response.status, "not JSON" in (await response.json())["error"]["message"]) == (400, True)
        async with session.post(f"{server_url}/no_such_route") as response:
            assert (response.status, "no_such_route" in (await response.json())["error"]["message"]) == (404, True)
        async with session.get(f"{server_url}/health_generate") as response:
            assert response.status == 200


async def test_log_probs_of_chosen_tokens_are_those_of_the_softmax(client, model_a, prompts):
    """A prefill alone: whatever token is drawn, those asked for are scored."""
    choices = [3, 1, 7]
    asked = [*prompts, [*prompts[0][:-1], (prompts[0][-1] + 1) % 50]]  # two of one length, computed together
    found = await asyncio.gather(*(client.choices(f"s{i}", ints(p), choices) for i, p in enumerate(asked * 2)))
    for prompt, values in zip(asked * 2, found, strict=True):
        expected = [model_a.logprobs(prompt, [token])[0] for token in choices]
        np.testing.assert_allclose(values, expected, atol=1e-5)
    with pytest.raises(RequestRejected, match="token_ids_logprob"):
        await client.choices("score", ints(prompts[0]), [10**6])
