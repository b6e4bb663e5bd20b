"""Processes, keys, aborts, and servers that die or misbehave."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from pydantic import ValidationError

from megatron_fapo.errors import ConfigError, RequestRejected, ServerError, ServerUnreachable
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.group import ServerGroup
from megatron_fapo.serving.launcher import launch, launch_one, processes
from megatron_fapo.serving.process import ServerProcess
from megatron_fapo.serving.settings import ServerSettings


async def collect(generator, request):
    return [sample async for sample in generator.generate(request)]


async def until(condition, seconds=10.0):
    """Wait for something to come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)


@pytest.fixture
async def fake():
    """A real server that behaves as its handler says: `fake(handler)` -> URL."""
    runners = []

    async def start(generate):
        app = web.Application()
        app.router.add_post("/generate", generate)
        app.router.add_get("/get_server_info", lambda request: web.json_response({"group_stream": True}))
        runners.append(web.AppRunner(app, shutdown_timeout=0.1))
        await runners[-1].setup()
        await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runners[-1].addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


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


async def test_a_group_goes_on_elsewhere_when_a_server_dies_in_the_middle(
    server_url, client, fake, request_for, prompts
):
    """The first server hands out two samples and dies; the other gives the rest, none twice."""
    request = request_for(prompts[3], seeds=range(6))
    good = {sample.id: sample for sample in await collect(client, request)}

    async def dying(http_request):
        from aiohttp import ClientSession

        async with (
            ClientSession() as session,
            session.post(f"{server_url}/generate", data=await http_request.read()) as real,
        ):
            lines = (await real.read()).splitlines()
        response = web.StreamResponse()
        await response.prepare(http_request)
        await response.write(b"\n".join(lines[:2]) + b"\n")
        http_request.transport.close()
        return response

    dying_client = ServerClient(await fake(dying))
    group = ServerGroup([dying_client, client])
    samples = await collect(group, request)
    assert sorted(sample.id for sample in samples) == sorted(request.ids)
    for sample in samples:
        assert sample.token_ids.tolist() == good[sample.id].token_ids.tolist()
    with pytest.raises(ServerUnreachable):
        await collect(ServerGroup([dying_client]), request_for(prompts[3], seeds=range(9)))
    await dying_client.close()


async def test_requests_go_where_fewest_samples_are_outstanding(fake, request_for, prompts):
    arrived, release = [], asyncio.Event()

    def counting(place):
        async def handler(request):
            body = await request.json()
            arrived.append((place, len(body["rid"])))
            await release.wait()
            return web.json_response({}, status=400)

        return handler

    clients = [ServerClient(await fake(counting(place))) for place in range(2)]
    group = ServerGroup(clients)
    tasks = []
    for count in (4, 1, 1, 1, 2):
        tasks.append(asyncio.ensure_future(collect(group, request_for(prompts[0], seeds=range(count)))))
        await until(lambda: len(arrived) == len(tasks))
    release.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert arrived == [(0, 4), (1, 1), (1, 1), (1, 1), (1, 2)]
    await group.close()


async def test_a_server_that_has_recovered_is_asked_again(fake, request_for, prompts):
    """Asked last from its failure until it answers anything, here a control verb that the group did not send."""
    asked, well = [], asyncio.Event()

    def handler(place):
        async def generate(request):
            asked.append(place)
            if place == 0 and not well.is_set():
                request.transport.abort()
            rid = (await request.json())["rid"]
            lines = [{"id": r, "tokens": "", "logprobs": "", "finish_reason": "stop"} for r in rid]
            return web.Response(text="".join(json.dumps(line) + "\n" for line in lines))

        return generate

    clients = [ServerClient(await fake(handler(place))) for place in range(2)]
    group = ServerGroup(clients)
    for _ in range(2):
        assert len(await collect(group, request_for(prompts[0]))) == 1
    assert asked == [0, 1, 1]
    well.set()
    await clients[0].info()
    assert len(await collect(group, request_for(prompts[0]))) == 1
    assert asked == [0, 1, 1, 0]
    await group.close()


async def test_a_launched_server_that_is_killed_is_noticed_with_its_log(models, tmp_path, request_for, prompts):
    settings = ServerSettings(model=str(models[0]), count=2)
    async with processes(settings, "policy", tmp_path) as servers:
        assert servers[0].url != servers[1].url
        servers[0].check()
        os.kill(servers[0].pid, signal.SIGKILL)
        await asyncio.wait_for(servers[0].process.wait(), 10)
        with pytest.raises(ServerError, match=r"(?s)status -9.*policy-0.log.*serving"):
            servers[0].check()
        survivor = servers[1]
    assert survivor.process.returncode == 0


async def test_when_no_server_is_left_the_error_quotes_the_log(models, tmp_path, request_for, prompts):
    before = children()
    async with launch(ServerSettings(model=str(models[0]), restarts=0), "policy", tmp_path) as group:
        assert len(await collect(group, request_for(prompts[0]))) == 1
        (pid,) = children() - before
        os.kill(pid, signal.SIGKILL)
        await until(lambda: pid not in children())
        with pytest.raises(ServerError, match=r"(?s)ended with (status -9|an unknown status).*serving"):
            await collect(group, request_for(prompts[0]))


async def test_killing_a_server_that_has_just_died_leaves_its_status_readable(tmp_path):
    """At ever later moments between its death and the one at which asyncio hears of it."""
    statuses = set()
    for turn in range(200):
        process = await asyncio.create_subprocess_exec("sleep", "100")
        server = ServerProcess(url="", pid=process.pid, log=tmp_path / "log", process=process)
        os.kill(process.pid, signal.SIGTERM)
        moment = time.perf_counter() + turn * 2e-5
        while time.perf_counter() < moment:
            pass
        server.kill()
        await server.wait()
        statuses.add(process.returncode)
    assert statuses <= {-signal.SIGTERM, -signal.SIGKILL}


def children():
    """Process ids of our own running servers."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z" and b"engine.main" in (process / "cmdline").read_bytes():
                found.add(int(process.name))
    return found


async def test_a_server_that_cannot_start_says_why(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    settings = ServerSettings(model=str(tmp_path / "nothing"))
    with pytest.raises(ServerError, match=r"(?s)status 2.*no config.json"):
        await launch_one(settings, tmp_path / "log", 0)


DRIVER = """
import asyncio, pathlib, signal, sys
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.launcher import launch_one
from megatron_fapo.serving.settings import ServerSettings

async def main():
    model, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    interrupted = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
    server = await launch_one(ServerSettings(model=model), folder / "log", 0)
    (folder / "pid").write_text(f"{server.pid}\\n")
    await interrupted.wait()
    async with ServerClient(server.url) as client:
        (folder / "saved").write_text(await client.checksum() + "\\n")
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_servers_outlive_a_ctrl_c_and_end_with_the_process_that_launched_them(models, tmp_path):
    """Ctrl-C goes to the process group of the terminal; the driver then still needs its servers to save."""

    def said(name):
        path = tmp_path / name
        return path.exists() and path.read_text().endswith("\n")

    driver = subprocess.Popen([sys.executable, "-c", DRIVER, models[0], tmp_path], start_new_session=True)
    try:
        await until(lambda: said("pid"), 60)
        server = int((tmp_path / "pid").read_text())
        os.killpg(driver.pid, signal.SIGINT)
        await until(lambda: said("saved") or driver.poll() is not None, 20)
        assert driver.poll() is None
        assert alive(server)
    finally:
        driver.kill()
        driver.wait()
    await until(lambda: not alive(server))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[1].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


async def test_a_server_told_to_stop_does_not_wait_for_what_runs(models, tmp_path, request_for, prompts):
    async with processes(ServerSettings(model=str(models[0])), "policy", tmp_path) as (server,):
        async with ServerClient(server.url) as client:
            await client.pause()
            waiting = asyncio.ensure_future(collect(client, request_for(prompts[0])))
            while (await client.info())["waiting"] == 0:
                await asyncio.sleep(0.01)
            await server.stop()
            assert server.process.returncode == 0  # by itself, not killed
            with pytest.raises(ServerError):
                await waiting
