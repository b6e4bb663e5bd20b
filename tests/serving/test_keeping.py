"""Servers that die or fall silent while they are asked: nothing is lost, nothing comes twice, others take over."""

import asyncio
import json
import os
import signal
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.util import find_spec

import psutil
import pytest
from aiohttp import web

from megatron_fapo.errors import ServerError, ServerUnreachable
from megatron_fapo.records import ints
from megatron_fapo.serving.client import ServerClient, group_of
from megatron_fapo.serving.group import ServerGroup
from megatron_fapo.serving.hooks import Hooks
from megatron_fapo.serving.launcher import launch
from megatron_fapo.serving.router import launch_router
from megatron_fapo.serving.settings import ServerSettings
from tests.conftest import lacking
from tests.serving.worlds import CONTEXT

ROUTERS = ["none", pytest.param("sglang", marks=pytest.mark.long)]


class Faults:
    """What a group said about its servers, and servers that wait for their weights while `gate` is closed."""

    def __init__(self):
        self.retries = self.restarts = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.came, self.brings = [], True

    def hooks(self) -> Hooks:
        return Hooks(retried=self.retried, restarted=self.restarted, catch_up=self.catch_up)

    def retried(self, samples):
        self.retries += samples

    def restarted(self):
        self.restarts += 1

    async def catch_up(self, client):
        self.came.append(client)
        await self.gate.wait()
        return self.brings


@asynccontextmanager
async def group_of_servers(models, folder, faults, **settings):
    given = {"model": str(models[0]), "context_length": CONTEXT, "deterministic": True, "max_running": 32, **settings}
    if given.get("router") == "sglang" and find_spec("sglang_router") is None:
        lacking("sglang-router is not installed: pip install sglang-router")
    async with launch(ServerSettings.model_validate(given), "policy", folder, faults.hooks()) as group:
        yield group


async def collect(group, requests, landed=lambda sample: None):
    async def one(request):
        samples = []
        async for sample in group.generate(request):
            samples.append(sample)
            landed(sample)
        return samples

    return await asyncio.gather(*(one(request) for request in requests))


def tokens(answers):
    found = {sample.id: sample.token_ids.tolist() for samples in answers for sample in samples}
    assert len(found) == sum(len(samples) for samples in answers)
    return dict(sorted(found.items()))


async def pid_of(client) -> int:
    return (await client.info())["pid"]


async def until(condition, seconds=60.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("router", ROUTERS)
async def test_a_server_killed_in_the_middle_changes_no_sample(models, tmp_path, request_for, prompts, router):
    """Two servers, one is killed; the other goes on, and the first gets no work before it holds the weights."""
    faults = Faults()
    requests = [
        request_for(prompt, seeds=range(4), name=f"p{i}", max_new_tokens=120) for i, prompt in enumerate(prompts[:4])
    ]
    async with group_of_servers(models, tmp_path, faults, count=2, router=router) as group:
        undisturbed = tokens(await collect(group, requests))
        victim = group.clients[0]
        pid, landed = await pid_of(victim), []
        faults.gate.clear()

        def kill(sample):
            landed.append(sample.id)
            if len(landed) == 3:
                os.kill(pid, signal.SIGKILL)

        disturbed = await collect(group, requests, kill)
        assert sorted(landed) == sorted(undisturbed)
        assert tokens(disturbed) == undisturbed
        assert faults.retries > 0
        await until(lambda: faults.came)
        (again,) = faults.came
        assert (faults.restarts, again in group.clients, group.may_ask(again)) == (1, True, False)
        assert victim not in group.clients
        assert tokens(await collect(group, requests[:2])).items() <= undisturbed.items()
        assert (await again.info())["served"] == 0
        faults.gate.set()
        await until(lambda: group.may_ask(again))
        moved = [replace(r, ids=tuple(f"new-{rid}" for rid in r.ids)) for r in requests]  # a router keeps to known ones
        assert list(tokens(await collect(group, moved)).values()) == list(undisturbed.values())
        assert (await again.info())["served"] > 0


@pytest.mark.long
async def test_a_router_keeps_groups_together_and_may_die(models, tmp_path, request_for, prompts):
    faults = Faults()
    async with group_of_servers(models, tmp_path, faults, count=2, router="sglang") as group:
        requests = [request_for(prompts[0], seeds=range(4), name=name, max_new_tokens=60) for name in "abcdef"]
        expected = tokens(await collect(group, requests))
        served = [(await client.info())["served"] for client in group.clients]
        assert sorted(expected) == sorted(rid for request in requests for rid in request.ids)
        assert (sum(served), served[0] % 4, min(served) > 0) == (24, 0, True)
        found = await group.choices("a-r0", ints(prompts[0]), [3, 5])
        assert found == await group.clients[0].choices("a-r0", ints(prompts[0]), [3, 5])
        leaving = asyncio.ensure_future(collect(group, [request_for(prompts[0], max_new_tokens=900, name="left")]))
        await running(group, 1)
        leaving.cancel()
        await running(group, 0)
        for process in psutil.Process().children():
            if "sglang_router" in " ".join(process.cmdline()) or "router" in process.name():
                process.kill()
        assert tokens(await collect(group, requests)) == expected


async def running(group, count):
    async with asyncio.timeout(60):
        while sum([(await client.info())["running"] for client in group.clients]) != count:
            await asyncio.sleep(0.02)


async def test_a_silent_server_is_replaced_and_the_next_update_brings_its_weights(
    models, tmp_path, request_for, prompts
):
    """The only server is stopped: its request waits for a new one, and for an update, the first being impossible."""
    faults = Faults()
    faults.brings = False
    request = request_for(prompts[3], seeds=range(3), max_new_tokens=50)
    timely = {"health_interval": 0.1, "health_deadline": 1.0, "restarts": 50}
    async with group_of_servers(models, tmp_path, faults, count=1, **timely) as group:
        expected = tokens(await collect(group, [request]))
        os.kill(await pid_of(group.clients[0]), signal.SIGSTOP)
        asking = asyncio.ensure_future(collect(group, [request]))
        await until(lambda: faults.came)
        assert not asking.done()
        await group.admit(await group.some())
        assert tokens(await asking) == expected
    assert faults.retries == 3


@pytest.mark.parametrize("router", ROUTERS)
async def test_servers_come_and_go_while_requests_run(models, tmp_path, request_for, prompts, router):
    """One that comes gets no work before it holds the weights; one that leaves finishes what it has."""
    faults = Faults()
    faults.gate.clear()
    requests = [
        request_for(prompt, seeds=range(4), name=f"p{i}", max_new_tokens=200) for i, prompt in enumerate(prompts[:4])
    ]
    async with group_of_servers(models, tmp_path, faults, count=1, max_count=2, router=router) as group:
        (first,) = group.clients
        expected = tokens(await collect(group, requests))
        group.resize(2)
        await until(lambda: faults.came)
        (second,) = faults.came
        assert tokens(await collect(group, requests)) == expected
        assert ((await second.info())["served"], group.may_ask(second)) == (0, False)
        faults.gate.set()
        await until(lambda: group.may_ask(second))
        moved = [replace(r, ids=tuple(f"new-{rid}" for rid in r.ids)) for r in requests]
        asking = asyncio.ensure_future(collect(group, moved))
        while not (await second.info())["running"]:
            await asyncio.sleep(0.01)
        pid = await pid_of(second)
        group.resize(1)
        assert group.clients == (first,)
        assert list(tokens(await asking).values()) == list(expected.values())
        await until(lambda: not psutil.pid_exists(pid))
        assert tokens(await collect(group, requests)) == expected
        with pytest.raises(ServerError, match="3 servers are wanted, 1 to 2 can be had"):
            group.resize(3)
    assert (faults.retries, faults.restarts) == (0, 0)


async def test_a_place_is_filled_again_that_is_wanted_while_its_server_leaves(models, tmp_path, request_for, prompts):
    """Two servers; one of them is told to leave, killed while it still generates, and wanted again."""
    faults = Faults()
    request = request_for(prompts[0], seeds=range(4), max_new_tokens=300)
    async with group_of_servers(models, tmp_path, faults, count=2) as group:
        expected = tokens(await collect(group, [request]))
        asking = asyncio.ensure_future(
            collect(group, [request, replace(request, ids=tuple(f"o-r{i}" for i in range(4)))])
        )
        last = group.clients[1]
        while not (await last.info())["running"]:
            await asyncio.sleep(0.01)
        group.resize(1)
        os.kill(await pid_of(last), signal.SIGKILL)
        group.resize(2)
        assert tokens(await asking).items() >= expected.items()
        await until(lambda: len(group.clients) == 2 and all(map(group.may_ask, group.clients)))
        assert last not in group.clients
    assert 0 < faults.retries <= 4  # those that had not arrived when it was killed


def test_what_belongs_to_a_group():
    assert group_of("s12-q-r3-x-r17") == group_of("s12-q-r3-x-r2-judge-a0-v1") == "s12-q-r3-x"
    assert group_of("alone") == "alone"


async def test_a_connection_that_breaks_is_not_a_server_that_died(request_for, prompts):
    """The only server closes two connections without an answer, and answers the third request."""
    asked = []

    async def handle(request):
        asked.append((await request.json())["rid"])
        if len(asked) < 3:
            request.transport.abort()
        lines = [{"id": r, "tokens": "", "logprobs": "", "finish_reason": "stop"} for r in asked[-1]]
        return web.Response(text="".join(json.dumps(line) + "\n" for line in lines))

    app = web.Application()
    app.router.add_post("/generate", handle)
    app.router.add_get("/get_server_info", lambda request: web.json_response({"group_stream": True}))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with ServerClient(f"http://127.0.0.1:{runner.addresses[0][1]}") as client:
        (samples,) = await collect(ServerGroup([client]), [request_for(prompts[0], seeds=range(2))])
    assert (len(samples), len(asked)) == (2, 3)
    await runner.cleanup()


@pytest.mark.long
async def test_many_connections_that_break_do_not_close_a_router_s_way_to_a_server(request_for, prompts, tmp_path):
    """The only server closes the first connection of each of 40 requests, as one does that was idle for long."""
    asked = Counter()

    async def handle(request):
        rid = (await request.json())["rid"]
        asked[rid] += 1
        if asked[rid] == 1:
            request.transport.abort()
        meta = {"id": rid, "finish_reason": {"type": "stop"}, "output_token_logprobs": [[-0.5, 7, None]]}
        return web.json_response({"output_ids": [7], "meta_info": meta})

    async def well(request):
        return web.json_response({})

    app = web.Application()
    app.add_routes([web.post("/generate", handle), web.get("/health", well), web.get("/get_server_info", well)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    settings = ServerSettings(model="none", router="sglang")
    requests = [request_for(prompts[0], name=f"p{i}") for i in range(40)]
    async with (
        ServerClient(f"http://127.0.0.1:{runner.addresses[0][1]}") as client,
        launch_router(settings, tmp_path / "log") as router,
    ):
        await router.add(client)
        faults = Faults()
        answers = await collect(ServerGroup([client], faults.hooks(), router=router), requests)
    await runner.cleanup()
    assert (set(asked.values()), faults.retries) == ({2}, 40)
    assert [len(samples) for samples in answers] == [1] * 40


async def test_a_deadline_ends_a_request_that_nobody_answers(server_url, client, request_for, prompts):
    group = ServerGroup([client], deadline=0.5)
    await client.pause()
    with pytest.raises(ServerUnreachable, match=r"2 samples did not come within 0.5 s"):
        await collect(group, [request_for(prompts[0], seeds=range(2))])
    with pytest.raises(ServerUnreachable, match="1 samples did not come"):
        await group.choices("q", ints(prompts[0]), [3])


async def test_a_sample_that_comes_twice_is_an_error(request_for, prompts):
    async def twice(request):
        line = {"id": (await request.json())["rid"][0], "tokens": "", "logprobs": "", "finish_reason": "stop"}
        return web.Response(text=2 * (json.dumps(line) + "\n"))

    app = web.Application()
    app.router.add_post("/generate", twice)
    app.router.add_get("/get_server_info", lambda request: web.json_response({"group_stream": True}))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with ServerClient(f"http://127.0.0.1:{runner.addresses[0][1]}") as client:
        with pytest.raises(ServerError, match="sent a sample twice"):
            await collect(ServerGroup([client]), [request_for(prompts[0], seeds=range(2))])
    await runner.cleanup()
