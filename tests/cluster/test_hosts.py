"""Servers that another process starts for the run, on a node of Ray's: started, watched, ended with their host."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from megatron_fapo.cluster.hosts import Hosts, open_hosts
from megatron_fapo.cluster.ray_session import ray_session
from megatron_fapo.cluster.seats import Seat
from megatron_fapo.config import ClusterSettings
from megatron_fapo.errors import ServerError
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.settings import ServerSettings
from tests.serving.worlds import make_model

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosts(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosts]:
    folder = tmp_path_factory.mktemp("run")
    async with ray_session(ClusterSettings(), 1, folder):
        import ray  # which reads the environment that the session has set

        here = ray.get_runtime_context().get_node_id()
        async with open_hosts([here], 0, 60, folder / "api_key") as hosts:
            yield replace(hosts, addresses=["127.0.0.1"])


@pytest.mark.long
async def test_what_a_server_cannot_load_is_said_by_its_host(hosts: Hosts, tmp_path: Path) -> None:
    start = hosts._start([Seat(node=0)])
    with pytest.raises(ServerError, match=r"config\.json|no Hugging Face model"):
        await start(ServerSettings(model=str(tmp_path / "nothing")), tmp_path / "log", 0)


@pytest.mark.long
async def test_a_server_lives_and_ends_with_its_host(hosts: Hosts, tmp_path: Path) -> None:
    start = hosts._start([Seat(node=0), Seat(node=0)])
    settings = hosts.with_key(ServerSettings(model=str(make_model(tmp_path / "model")), count=2))
    one, other = await asyncio.gather(*(start(settings, tmp_path / f"{place}.log", place) for place in (0, 1)))
    async with ServerClient(one.url, settings.api_key()) as client:
        assert await client.health()
    one.check()
    one.kill()
    await asyncio.wait_for(one.wait(), 60)
    with pytest.raises(ServerError, match=r"server ended with status -9; the end of .*0\.log"):
        one.check()
    process = psutil.Process(other.pid)
    hosts.stop()
    psutil.wait_procs([process], timeout=60)
    assert not process.is_running()
    await asyncio.wait_for(other.wait(), 60)
    with pytest.raises(ServerError, match="the node of a server was lost"):
        other.check()
