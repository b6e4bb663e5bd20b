"""A client and one server: what is asked of it, refused, and goes wrong."""

import asyncio
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web
from pydantic import ValidationError

from megatron_fapo.errors import ConfigError, RequestRejected, ServerError, ServerUnreachable
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.settings import ServerSettings
from tests.serving.waiting import collect


@pytest.fixture
async def endless(server_url, client):
    """Start a request that draws 1000 tokens whatever they are, and wait until it runs: `await endless(rid, n)`."""
    async with aiohttp.ClientSession() as session:
        expected = 0

        async def post(rid, n):
            parameters = {"n": n, "max_new_tokens": 1000, "ignore_eos": True}
            body = {"rid": rid, "input_ids": [5, 6], "sampling_params": parameters}
            async with session.post(f"{server_url}/generate", json=body) as response:
                answers = await response.json()
                return [answer["meta_info"]["finish_reason"]["type"] for answer in answers]

        async def start(rid, n):
            nonlocal expected
            expected += n
            task = asyncio.ensure_future(post(rid, n))
            while (await client.info())["running"] < expected:
                await asyncio.sleep(0.005)
            return task

        yield start


async def test_abort_by_id_and_of_all(client, endless):
    one, two, onetwo = [await endless(name, 2) for name in ("one", "two", "onetwo")]
    await client.abort("one-")
    assert await one == ["abort", "abort"]
    assert not two.done()
    assert not onetwo.done()
    await client.abort()
    assert await two == await onetwo == ["abort", "abort"]
    with pytest.raises(RequestRejected, match="rid"):
        await client._json("POST", "/abort_request", {})


async def test_what_a_client_leaves_behind_is_dropped(client, endless):
    task = await endless("left", 8)
    task.cancel()
    await asyncio.wait({task})
    while (await client.info())["running"]:
        await asyncio.sleep(0.01)
    assert (await client.info())["waiting"] == 0


async def test_what_waits_goes_by_priority(client, request_for, prompts):
    """64 rows; while nothing runs, 128 samples without a hurry arrive, then 4 urgent ones: these end first of all."""
    ended = []

    async def ask(name, count, priority, tokens):
        request = request_for(prompts[1], seeds=range(count), name=name, max_new_tokens=tokens)
        async for sample in client.generate(replace(request, priority=priority)):
            ended.append(sample.id)

    await client.pause()
    tasks = []
    for name, count, priority, tokens in (("slow", 128, -1, 20), ("fast", 4, 0, 10), ("faster", 2, 1, 10)):
        tasks.append(asyncio.ensure_future(ask(name, count, priority, tokens)))
        while (await client.info())["waiting"] < sum([128, 4, 2][: len(tasks)]):
            await asyncio.sleep(0.005)
    await client.resume_generation()
    await asyncio.gather(*tasks)
    last_of_the_hurried = max(place for place, name in enumerate(ended) if name.startswith("fast"))
    first_wave = [name for name in ended[: last_of_the_hurried + 1] if name.startswith("slow")]
    assert len(first_wave) <= 64 - 6
    assert len(ended) == 134


async def test_flush_waits_for_nobody(client, endless, request_for, prompts):
    await client.flush_cache()
    assert len(await collect(client, request_for(prompts[0]))) == 1
    task = await endless("busy", 4)
    with pytest.raises(RequestRejected, match="samples run"):
        await client.flush_cache()
    await client.abort()
    await task


@pytest.fixture(scope="module")
def locked_url(start_server, models, tmp_path_factory):
    """A server that asks for a key."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text("open sesame\n")
    return start_server(model=str(models[0]), api_key_file=str(key)).url


async def test_a_key_is_asked_for_where_there_is_one(locked_url, request_for, prompts):
    url = locked_url
    async with ServerClient(url) as stranger, ServerClient(url, "open sesame") as friend:
        assert not await stranger.health()
        with pytest.raises(RequestRejected, match="API key"):
            await stranger.info()
        with pytest.raises(RequestRejected, match="API key"):
            await collect(stranger, request_for(prompts[0]))
        assert len(await collect(friend, request_for(prompts[0]))) == 1


def test_an_address_that_others_reach_needs_a_key(tmp_path):
    for host in ("0.0.0.0", "::", "10.0.0.7", "gpu-box"):
        with pytest.raises(ValidationError, match="api_key_file"):
            ServerSettings(model="m", host=host)
    for host in ("127.0.0.1", "localhost", "::1"):
        ServerSettings(model="m", host=host)
    with pytest.raises(ConfigError, match="No such file"):
        ServerSettings(model="m", host="0.0.0.0", api_key_file=str(tmp_path / "none")).api_key()
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(ConfigError, match="empty"):
        ServerSettings(model="m", api_key_file=str(tmp_path / "empty")).api_key()


async def test_nobody_there(request_for, prompts, unused_tcp_port):
    url = f"http://127.0.0.1:{unused_tcp_port}"
    async with ServerClient(url) as client:
        assert not await client.health()
        with pytest.raises(ServerUnreachable, match=url):
            await collect(client, request_for(prompts[0]))


async def test_silence_is_a_server_that_cannot_be_reached(fake, request_for, prompts):
    async def silent(request):
        await asyncio.sleep(60)

    async with ServerClient(await fake(silent), timeout=0.2) as client:
        with pytest.raises(ServerUnreachable, match="Timeout"):
            await collect(client, request_for(prompts[0]))


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (lambda: web.Response(text="busy", status=503), ServerError, "busy.*status 503, request q-r0"),
        (lambda: web.Response(text="no", status=422), RequestRejected, "no.*status 422"),
        (lambda: web.Response(text="{}{\n"), ServerError, "not JSON"),
        (lambda: web.Response(text="[1]\n"), ServerError, "list"),
        (lambda: web.Response(text='{"id": "q-r0"}\n'), ServerError, "without"),
        (lambda: web.Response(text=""), ServerUnreachable, "stopped before 1 samples"),
    ],
)
async def test_what_a_server_does_wrong_becomes_one_of_our_errors(fake, request_for, prompts, answer, kind, words):
    async def handler(request):
        return answer()

    async with ServerClient(await fake(handler)) as client:
        with pytest.raises(kind, match=words):
            await collect(client, request_for(prompts[0]))
