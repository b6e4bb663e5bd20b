"""Where a group's requests go."""

import asyncio
import json

import pytest
from aiohttp import web

from megatron_fapo.errors import ServerUnreachable
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.group import ServerGroup
from tests.serving.waiting import collect, until


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
