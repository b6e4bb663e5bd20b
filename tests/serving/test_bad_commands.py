"""A command that is wrong, fails or is abandoned is its sender's trouble alone: the server goes on."""

import asyncio

import numpy as np
import pytest
import torch

from megatron_fapo.errors import RequestRejected, ServerError
from megatron_fapo.serving.engine.decoder import Decoder, Shape
from megatron_fapo.serving.engine.engine import Engine
from megatron_fapo.serving.engine.folder import read_config
from megatron_fapo.serving.engine.sample import Options, Sample
from megatron_fapo.serving.engine.weights import Weights
from tests.serving.worlds import CONTEXT


@pytest.fixture
async def engine(models):
    """An engine in this process; `engine.start(loop, on_failure)` is left to the test."""
    model = Decoder(Shape.read(read_config(models[0])), torch.float32, CONTEXT)
    weights = Weights(model)
    weights.load(models[0])
    engine = Engine(model, weights, max_running=8, threads=1, granularity=1, find_stop=lambda answer: None)
    yield engine
    engine.stop()


def submit(engine, prompt, name="s", new=12):
    """Ask for greedy tokens; their answer comes to the queue that is returned."""
    inbox = asyncio.Queue()
    options = Options(temperature=0.0, max_new_tokens=new)
    engine.submit(
        [Sample(id=name, index=0, prompt=np.array(prompt), options=options, seed=0, stream=False, inbox=inbox)]
    )
    return inbox


async def draws_rightly(engine, prompt, model):
    answer = await asyncio.wait_for(submit(engine, prompt).get(), 10)
    assert answer.tokens.tolist() == model.greedy(prompt, 12)
    engine.check()


async def test_a_command_whose_caller_left_is_not_run(engine, model_a, prompts):
    ran = []
    waiting = [asyncio.ensure_future(engine.call(lambda place=place: ran.append(place))) for place in range(3)]
    await asyncio.sleep(0)
    waiting[1].cancel()
    await asyncio.wait({waiting[1]})
    engine.start(asyncio.get_running_loop(), lambda: None)
    await asyncio.wait_for(asyncio.gather(waiting[0], waiting[2]), 10)
    assert ran == [0, 2]
    await draws_rightly(engine, prompts[3], model_a)


async def test_a_command_that_fails_tells_its_caller_and_nobody_else(engine, model_a, prompts):
    engine.start(asyncio.get_running_loop(), lambda: None)
    with pytest.raises(ServerError, match="the command failed: ZeroDivisionError"):
        await engine.call(lambda: 1 // 0)
    await draws_rightly(engine, prompts[3], model_a)


async def test_a_failure_in_the_middle_of_moving_rows_ends_the_engine(engine, prompts):
    """Rows whose samples and keys no longer belong together must not be drawn from; who waits is told."""
    ended = asyncio.Event()
    engine.start(asyncio.get_running_loop(), ended.set)
    inboxes = [submit(engine, prompts[3], name, 1000) for name in ("one", "two")]
    while not (await engine.call(lambda: engine.pause("in_place"))):
        await engine.call(engine.proceed)
    engine._batch.cache.move = None
    with pytest.raises(ServerError, match="the command failed: TypeError"):
        await engine.call(lambda: engine.abort("one", "gone"))
    await asyncio.wait_for(ended.wait(), 10)
    assert [(await asyncio.wait_for(inbox.get(), 10)).reason for inbox in inboxes] == ["abort", "abort"]
    with pytest.raises(ServerError, match="the engine failed"):
        await engine.call(engine.proceed)


async def still_right(client, model, prompt, request_for):
    request = request_for(prompt, name="after", temperature=0.0, max_new_tokens=12)
    (sample,) = [sample async for sample in client.generate(request)]
    assert sample.token_ids.tolist() == model.greedy(prompt, 12)[: len(sample.token_ids)]
    assert await client.health()


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/abort_request", {"rid": 5}, "rid: must be a string, found 5"),
        ("/abort_request", {"rid": ["a"]}, "rid: must be a string"),
        ("/generate", {"rid": 5}, "rid: must be a string"),
        ("/generate", {"rid": [5]}, "rid: must be a string"),
        ("/generate", {"sampling_params": {"stop": [5]}}, "'stop': must be a text"),
        ("/generate", {"sampling_params": {"stop": 5}}, "'stop': must be a text"),
        ("/generate", {"sampling_params": {"stop": [""]}}, "'stop': must be a text"),
        ("/generate", {"sampling_params": {"stop_token_ids": [2**70]}}, "is outside the vocabulary of 64"),
        ("/generate", {"sampling_params": {"stop_token_ids": [-1]}}, "-1 is outside the vocabulary of 64"),
        ("/generate", {"input_ids": None, "text": 5}, "text: must be a text"),
    ],
)
async def test_what_could_stop_the_engine_is_refused_at_the_door(
    post, client, model_a, prompts, request_for, path, body, words
):
    status, answer = await post(path, **({"input_ids": prompts[0], **body} if path == "/generate" else body))
    assert (status, words in answer["error"]["message"]) == (400, True), answer
    await still_right(client, model_a, prompts[3], request_for)


@pytest.mark.parametrize("damage", ["cut", "header", "folder"])
async def test_weights_on_disk_that_are_damaged_are_refused_by_name(
    client, models, model_a, prompts, request_for, tmp_path, damage
):
    whole, target = (models[1] / "model.safetensors").read_bytes(), tmp_path / "model.safetensors"
    if damage == "folder":
        target.mkdir()
    else:
        target.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"\xff" * 100)
    with pytest.raises(RequestRejected, match=r"model\.safetensors: cannot be read"):
        await client.load_from_disk(str(tmp_path), 5)
    await still_right(client, model_a, prompts[3], request_for)
    assert (await client.info())["weight_version"] == "default"
