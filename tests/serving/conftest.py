import asyncio
import os
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from megatron_fapo.records import GenerationRequest, Sampling, ints
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.launcher import launch_one
from megatron_fapo.serving.settings import ServerSettings
from tests.conftest import lacking
from tests.serving.conformance import ENGINES, KEY, SGLANG, Served, settings
from tests.serving.worlds import CONTEXT, Reference, make_model, write_bucket

SERVERS = [pytest.param(e, marks=pytest.mark.long if e == "sglang" else ()) for e in ENGINES]

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """Two models of one shape."""
    root = tmp_path_factory.mktemp("models")
    return make_model(root / "a", seed=0), make_model(root / "b", seed=1)


@pytest.fixture(scope="session")
def model_a(models) -> Reference:
    return Reference(models[0])


@pytest.fixture(scope="session")
def model_b(models) -> Reference:
    return Reference(models[1])


@pytest.fixture(scope="session")
def start_server(tmp_path_factory):
    """Start a server and return its process; all are stopped at the end of the session."""
    with asyncio.Runner() as runner:
        started = []

        def start(**settings):
            log = tmp_path_factory.mktemp("server") / "server.log"
            settings = ServerSettings.model_validate({"max_running": 64, "context_length": CONTEXT, **settings})
            started.append(runner.run(launch_one(settings, log, 0)))
            return started[-1]

        yield start
        for server in started:
            runner.run(server.stop())


@pytest.fixture(scope="session")
def server_url(start_server, models) -> str:
    """The server that the conformance tests talk to, serving the first model."""
    return start_server(model=str(models[0])).url


@pytest.fixture
async def client(server_url, models):
    """A client of that server; the server is left as it was found."""
    async with ServerClient(server_url, timeout=30) as client:
        yield client
        await client.resume_memory()
        await client.resume_generation()
        if (await client.info())["weight_version"] != "default":
            await client._json(
                "POST", "/update_weights_from_disk", {"model_path": str(models[0]), "weight_version": "default"}
            )


@pytest.fixture
async def post(server_url, client):
    """POST a body as any HTTP client would: (status, JSON)."""
    async with aiohttp.ClientSession() as session:

        async def post(path, **body):
            async with session.post(server_url + path, json=body) as response:
                return response.status, await response.json()

        yield post


@pytest.fixture
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(2, 64, size).tolist() for size in (3, 5, 5, 8, 13, 1)]


@pytest.fixture
def request_for():
    """A request by its few varying parts."""

    def make(prompt, seeds=(1,), name="q", **sampling):
        sampling = Sampling(**{"max_new_tokens": 16, **sampling})
        ids = tuple(f"{name}-r{i}" for i in range(len(seeds)))
        return GenerationRequest(ids=ids, token_ids=ints(prompt), seeds=tuple(seeds), sampling=sampling)

    return make


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


@pytest.fixture
def bucket_of():
    """Tensors in shared memory; segments are removed at the end."""
    segments = []

    def make(tensors):
        segment, bucket = write_bucket(f"test-{os.getpid()}-{len(segments)}", tensors)
        segments.append(segment)
        return segment, bucket

    yield make
    for segment in segments:
        segment.remove()
