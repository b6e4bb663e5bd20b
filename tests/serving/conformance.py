"""The engines of the conformance suite, what they are known to do differently, and how a test gets a server."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.settings import ServerSettings

ENGINES = ("embedded", "sglang")
KEY = "open sesame"
SGLANG = Path(".venvs/sglang/bin/python")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What an engine does instead, and whether that can be tried."""

    what: str
    run: bool


def known_difference(engine: str, what: str, *, run: bool = True):
    """The engine fails this test, for a reason that the table of docs/serving.md gives.

    It is strict: an engine that passes fails the suite, so that the table stays true. `run=False` where trying it
    would end the server.
    """

    def mark(function):
        known = getattr(function, "known_differences", {})
        function.known_differences = {**known, engine: Difference(what=what, run=run)}
        return function

    return mark


def settings(engine: str, model: Path, key: Path, context: int) -> ServerSettings:
    """A server of either engine on the CPU, small."""
    common = {"model": str(model), "api_key_file": str(key), "context_length": context, "max_running": 64}
    if engine == "embedded":
        return ServerSettings.model_validate(common)
    sglang = {"on_cpu": True, "max_total_tokens": 65536, "python": str(SGLANG), "memory_fraction": 0.3}
    return ServerSettings.model_validate({**common, "engine": "sglang", "sglang": sglang})


@dataclass(frozen=True)
class Served:
    """A running server, as our client and as any HTTP client sees it."""

    engine: str
    url: str
    client: ServerClient

    async def post(self, path: str, **body):
        """(status, parsed body) of a POST; a body that is not JSON is a text."""
        async with self.session() as session, session.post(self.url + path, json=body) as response:
            if response.content_type == "application/json":
                return response.status, await response.json()
            return response.status, await response.text()

    def session(self) -> aiohttp.ClientSession:
        """An HTTP session with the key."""
        return aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"})

    async def generate(self, prompt, new=16, **parameters):
        """One answer of /generate, greedy unless said otherwise, with log-probs."""
        parameters = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True, **parameters}
        body = {"input_ids": list(prompt), "sampling_params": parameters, "return_logprob": True}
        status, answer = await self.post("/generate", **body)
        assert status == 200, answer
        return answer

    async def start(self, prompt, rid, new=900):
        """A streaming request that has drawn its first token: (what is left of it as a task)."""
        parameters = {"max_new_tokens": new, "temperature": 1.0, "ignore_eos": True}
        body = {"input_ids": list(prompt), "sampling_params": parameters, "rid": rid, "stream": True}
        session = self.session()
        response = await session.post(f"{self.url}/generate", json={**body, "return_logprob": True})
        await response.content.readuntil(b"\n\n")

        async def rest():
            async with session:
                return events(await response.text())[-1]

        return asyncio.ensure_future(rest())

    async def until_idle(self, seconds=20.0):
        """Wait until a flush is accepted, which takes that nothing runs."""
        for _ in range(int(seconds / 0.1)):
            if (await self.post("/flush_cache"))[0] == 200:
                return
            await asyncio.sleep(0.1)
        pytest.fail("the server did not become idle")


def events(body: str) -> list:
    """The JSON of server-sent events, the closing [DONE] left out."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line.strip()]
    return [json.loads(line) for line in lines if line != "[DONE]"]


async def collect(client, request):
    """{id: sample} of a request."""
    return {sample.id: sample async for sample in client.generate(request)}
