"""Servers on other nodes: an actor on each starts them, watches them, and takes them along when it ends."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fapo import lifeline
from megatron_fapo.cluster.seats import Seat, seats, wishes_of
from megatron_fapo.config import Config
from megatron_fapo.errors import FapoError, ServerError
from megatron_fapo.records import Role
from megatron_fapo.serving.launcher import Start, launch_one
from megatron_fapo.serving.process import Server, ServerProcess
from megatron_fapo.serving.settings import ServerSettings

log = logging.getLogger(__name__)


class Host:
    """Starts servers on the node that it lives on. A Ray actor; the kernel ends its servers with it."""

    def __init__(self) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._servers: dict[int, ServerProcess] = {}

    async def start(self, settings: ServerSettings, path: str, port: int) -> tuple[str, int]:
        """URL and process id of a server that is healthy now. Raises ServerError."""
        lifeline.this_thread_lasts()  # Ray's event loop has a thread of its own, for as long as the actor lives
        server = await launch_one(settings, Path(path), port)
        self._servers[server.pid] = server
        return server.url, server.pid

    async def wait(self, pid: int) -> FapoError:
        """How a server has ended, once it has."""
        server = self._servers[pid]
        await server.wait()
        try:
            server.check()
        except FapoError as error:
            return error
        raise AssertionError("a process that has been waited for has ended")

    async def kill(self, pid: int) -> None:
        """End a server at once."""
        self._servers[pid].kill()

    async def stop(self, pid: int) -> None:
        """Ask a server to end; kill it when it does not."""
        await self._servers[pid].stop()


@dataclass(slots=True, kw_only=True)
class RemoteServer:
    """A server on a host's node, as `serving.process.Server`."""

    host: Any
    node: str
    url: str
    pid: int
    _ended: FapoError | None = field(default=None, init=False)

    async def wait(self) -> None:
        """Return when it has ended, or its node is lost."""
        self._ended = await self._asked(self.host.wait.remote(self.pid))

    def check(self) -> None:
        """Raise what `wait` has found."""
        if self._ended is not None:
            raise self._ended

    def kill(self) -> None:
        """End it at once."""
        self.host.kill.remote(self.pid)

    async def stop(self) -> None:
        """Ask it to end; kill it when it does not."""
        await self._asked(self.host.stop.remote(self.pid))

    async def _asked(self, reference: Any) -> FapoError:
        try:
            answer = await _result(reference)
        except FapoError as error:
            return error
        return answer if isinstance(answer, FapoError) else ServerError("stopped", pid=self.pid)


def _start_host(node_id: str) -> Any:
    """The actor that starts servers on a node of Ray's."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Ray would hide the GPUs from an actor that asks for none; they are dealt out by `cluster.seats`.
    environment = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
    here = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    actor = ray.remote(max_restarts=0, num_cpus=0, max_concurrency=1000, runtime_env=environment)(Host)
    return actor.options(scheduling_strategy=here).remote()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """The nodes that serve: the actor and the address of each."""

    trainer: str
    """Address of the first rank's node."""
    actors: Sequence[Any]
    addresses: Sequence[str]
    gpus: Sequence[int]
    """Of each node."""
    key_file: Path
    """The key that servers ask for which other machines can reach."""

    def starts(self, config: Config) -> dict[Role, Start]:
        """How the servers of each role are started: each on its seat. Raises ConfigError where they do not fit."""
        wishes, bays = wishes_of(config)
        placed = seats(wishes, nodes=len(self.actors), gpus=self.gpus, bays=bays)
        return {role: self._start(places) for role, places in placed.items()}

    def _start(self, places: Sequence[Seat]) -> Start:

        async def start(settings: ServerSettings, path: Path, place: int) -> Server:
            seat = places[place]
            settings = self.with_key(settings).changed(host=self.addresses[seat.node])
            if seat.gpu is not None:
                settings = settings.changed(sglang=settings.sglang.changed(first_gpu=seat.gpu))
            port = settings.port + place if settings.port else 0
            started = self.actors[seat.node].start.remote(settings, str(path), port)
            url, pid = await _result(started)
            return RemoteServer(host=self.actors[seat.node], node=self.addresses[seat.node], url=url, pid=pid)

        return start

    def with_key(self, settings: ServerSettings) -> ServerSettings:
        """The same servers, with a key of the run's where they have none: others can reach them."""
        return settings.changed(api_key_file=settings.api_key_file or str(self.key_file))

    def stop(self) -> None:
        """End all actors, and with them what is left of their servers."""
        import ray

        for actor in self.actors:
            ray.kill(actor, no_restart=True)


@asynccontextmanager
async def open_hosts(nodes: Sequence[str], serving_nodes: int, deadline: float, key: Path) -> AsyncIterator[Hosts]:
    """Hosts on the ranks' `nodes` (Ray's ids, the first rank's first), or on `serving_nodes` others; ended afterwards.

    Others are waited for. `key` is where the run's own key is put. Raises ServerError when nodes are missing after
    `deadline` seconds.
    """
    import ray

    end, chosen = asyncio.get_running_loop().time() + deadline, list(nodes)
    while serving_nodes:
        others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in nodes]
        if len(others) >= serving_nodes:
            chosen = sorted(others)[:serving_nodes]
            break
        if asyncio.get_running_loop().time() > end:
            raise ServerError(
                f"{serving_nodes} nodes for servers alone (cluster.serving_nodes) were not there within {deadline:g} s "
                f"(cluster.setup_deadline); beside those of the ranks Ray has {len(others)}"
            )
        await asyncio.sleep(0.5)
    facts = {node["NodeID"]: node for node in ray.nodes()}
    hosts = Hosts(
        trainer=facts[nodes[0]]["NodeManagerAddress"],
        actors=[_start_host(node) for node in chosen],
        addresses=[facts[node]["NodeManagerAddress"] for node in chosen],
        gpus=[int(facts[node]["Resources"].get("GPU", 0)) for node in chosen],
        key_file=_make_key(key),
    )
    try:
        yield hosts
    finally:
        hosts.stop()
        key.unlink(missing_ok=True)


def _make_key(path: Path) -> Path:
    """A new key in a file for this user alone."""
    path.unlink(missing_ok=True)
    path.touch(0o600)
    path.write_text(secrets.token_hex(32))
    return path


async def _result(reference: Any) -> Any:
    """What a host answers; that it is gone becomes a ServerError."""
    import ray

    try:
        return await asyncio.wrap_future(reference.future())
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, FapoError) else ServerError(f"a server's host failed: {cause}") from None
    except ray.exceptions.RayActorError as error:
        raise ServerError(f"the node of a server was lost: {str(error).strip().splitlines()[-1]}") from None
