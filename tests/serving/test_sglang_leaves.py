"""Real SGLang behind its router: a server that is no longer wanted finishes what it has, and another one comes."""

import asyncio
import json

import psutil
import pytest

from megatron_fapo.serving.client import ServerClient
from tests.conftest import lacking
from tests.serving.conformance import KEY, SGLANG, settings
from tests.serving.test_keeping import Faults, collect, group_of_servers, until
from tests.serving.test_sglang import members
from tests.serving.worlds import CONTEXT

TOKENS = 300


@pytest.fixture
def endless(models, tmp_path):
    """A model whose answers end at their limit alone."""
    folder = tmp_path / "endless"
    folder.mkdir()
    for file in models[0].iterdir():
        text = file.read_bytes()
        if file.name in ("config.json", "generation_config.json"):
            text = json.dumps(json.loads(text) | {"eos_token_id": None}).encode()
        elif file.name.startswith("tokenizer_config"):
            text = json.dumps(json.loads(text) | {"eos_token": None}).encode()
        (folder / file.name).write_bytes(text)
    return folder


def launcher_of(client: ServerClient) -> int:
    """The process id of a server that this process has started."""
    port = client.url.rpartition(":")[2]
    (found,) = [p.pid for p in psutil.Process().children() if f"--port {port}" in " ".join(p.cmdline())]
    return found


async def until_busy(asking: asyncio.Future, *clients: ServerClient) -> None:
    """Wait until each of them says so, as it does to the keeper."""
    async with asyncio.timeout(60):
        for client in clients:
            while not await client.busy():
                assert not asking.done()
                await asyncio.sleep(0.01)


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_a_server_leaves_in_the_middle_and_another_one_comes(endless, tmp_path, request_for, prompts):
    if not SGLANG.exists():
        lacking("SGLang's environment is missing: make sglang-cpu")
    (tmp_path / "key").write_text(KEY)
    sglang = settings("sglang", endless, tmp_path / "key", CONTEXT).model_dump() | {"count": 2, "router": "sglang"}
    faults = Faults()
    requests = [
        request_for(prompt, seeds=range(3), name=f"p{i}", max_new_tokens=TOKENS) for i, prompt in enumerate(prompts[:4])
    ]
    async with group_of_servers((endless,), tmp_path, faults, **(sglang | {"deterministic": False})) as group:
        first, second = group.clients
        leaving = launcher_of(second)
        assert not await second.busy()
        arrived: list[str] = []
        asking = asyncio.ensure_future(collect(group, requests, lambda sample: arrived.append(sample.id)))
        await until_busy(asking, first, second)
        group.resize(1)
        assert group.clients == (first,)
        assert not arrived, "all are in the middle"
        answers = await asking
        assert sorted(arrived) == sorted(rid for request in requests for rid in request.ids)
        assert {len(sample.token_ids) for samples in answers for sample in samples} == {TOKENS}
        await until(lambda: not members(leaving))
        assert group.clients == (first,)
        assert [len(samples) for samples in await collect(group, requests[:1])] == [3]

        group.resize(2)
        await until(lambda: len(group.clients) == 2 and group.may_ask(group.clients[1]), 120)
        (third,) = set(group.clients) - {first}
        assert faults.came == [third]
        spread = [request_for(prompts[0], name=f"again-{i}", max_new_tokens=TOKENS) for i in range(4)]
        asking = asyncio.ensure_future(collect(group, spread))
        await until_busy(asking, third)
        assert [len(samples) for samples in await asking] == [1] * 4
    assert (faults.retries, faults.restarts) == (0, 0)


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_what_a_server_ends_early_goes_on_at_another(endless, tmp_path, request_for, prompts):
    """Greedy, so that its tokens are those of an undisturbed server; some wait in its queue when it is stopped."""
    if not SGLANG.exists():
        lacking("SGLang's environment is missing: make sglang-cpu")
    (tmp_path / "key").write_text(KEY)
    sglang = settings("sglang", endless, tmp_path / "key", CONTEXT).model_dump()
    sglang |= {"count": 2, "router": "sglang", "max_running": 4, "deterministic": False}
    requests = [
        request_for(prompt, seeds=range(4), name=f"p{i}", max_new_tokens=TOKENS, temperature=0.0)
        for i, prompt in enumerate(prompts[:4])
    ]
    moved: list[int] = []
    async with group_of_servers((endless,), tmp_path, Faults(), **sglang) as group:
        alone = {sample.id: sample for samples in await collect(group, requests) for sample in samples}
        group.moves, group.hooks.moved = "on", moved.append
        first, second = group.clients
        asking = asyncio.ensure_future(collect(group, requests))
        for resting in (second, first):
            await until_busy(asking, resting)
            await group.rest([resting])
            assert not await resting.busy()
            assert not asking.done()
            await group.work([resting])
        found = {sample.id: sample for samples in await asking for sample in samples}
    assert sum(moved) > 0
    assert sorted(found) == sorted(alone)
    for name, sample in found.items():
        assert len(sample.token_ids) == len(sample.logprobs) == TOKENS
        assert sample.token_ids.tolist() == alone[name].token_ids.tolist()
        assert abs(sample.logprobs - alone[name].logprobs).max() < 1e-3
