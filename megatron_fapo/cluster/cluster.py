"""The wiring: which processes a run consists of, and the verbs that the loop uses.

driver (this process: loop, sampler, judge scheduling, sinks)
├── policy servers      subprocesses, HTTP on loopback
├── judge servers       subprocesses, HTTP on loopback
└── training ranks      Ray actors, torch.distributed among them; weights go to the servers by shared memory
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from megatron_fapo.cluster.ranks import MegatronModel
from megatron_fapo.cluster.ray_session import ray_session
from megatron_fapo.cluster.saves import Saves, open_saves
from megatron_fapo.cluster.serve_roles import Watcher, make_evaluator, make_sampler, open_servers, open_task
from megatron_fapo.config import Config
from megatron_fapo.errors import ServerUnreachable
from megatron_fapo.publish.publisher import SharedMemory, WeightTransport, publish
from megatron_fapo.records import Role, RunState, WeightVersion
from megatron_fapo.rollout.sampler import Sampler
from megatron_fapo.run.folder import RunFolder
from megatron_fapo.serving.client import ServerGroup
from megatron_fapo.tasks.interface import Task

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Cluster:
    """Everything that runs, with the verbs that the loop needs."""

    models: dict[Role, MegatronModel]
    servers: dict[Role, ServerGroup]
    sampler: Sampler
    evaluator: Sampler
    """Samples as held-out evaluation does."""
    task: Task
    transport: WeightTransport
    saves: Saves
    stop: asyncio.Event
    """Set when the run is asked to end (SIGTERM, Ctrl-C)."""

    @property
    def policy(self) -> MegatronModel:
        """The model in training."""
        return self.models["policy"]

    async def publish(self, version: int) -> WeightVersion:
        """The policy's present weights to its servers, confirmed by checksum. Start, resume and each step alike."""
        servers = self.servers["policy"]
        try:
            return await publish(self.policy, servers.clients, self.transport, version)
        except ServerUnreachable:
            servers.diagnose()
            raise

    async def save(self, state: RunState) -> int:
        """A checkpoint of everything that resume needs, on disk soon or at the end of the run; returns its step."""
        await self.saves.start(state)
        return state.step

    async def until_stopped(self, work: Awaitable[T]) -> T | None:
        """The result of `work`, or None when the run was asked to stop first; then `work` is cancelled."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            stopping.cancel()
            await asyncio.gather(task, stopping, return_exceptions=True)


@asynccontextmanager
async def open_cluster(
    config: Config, folder: RunFolder, watcher: Watcher, stop: asyncio.Event
) -> AsyncIterator[Cluster]:
    """Start ranks and servers side by side; at the end, whatever happened, stop all of them."""
    async with AsyncExitStack() as stack:
        servers_starting = asyncio.ensure_future(stack.enter_async_context(open_servers(config, folder.logs)))
        try:
            await stack.enter_async_context(ray_session(config.cluster, config.policy.parallel.world, folder.path))
            model = await MegatronModel.start("policy", config.policy, config.cluster, config.train.seed)
            stack.callback(model.stop)
            servers = await servers_starting
        except BaseException:
            servers_starting.cancel()
            await asyncio.gather(servers_starting, return_exceptions=True)
            raise
        task = await stack.enter_async_context(open_task(config))
        # Named after the run, so that a resumed run reuses (and removes) what a killed one left behind.
        transport = SharedMemory(config.publish, hashlib.blake2b(bytes(folder.path), digest_size=8).hexdigest())
        stack.callback(transport.close)
        saves = await stack.enter_async_context(open_saves(model, folder, config.checkpoint))
        yield Cluster(
            models={"policy": model},
            servers=servers,
            sampler=make_sampler(config, task, servers, watcher),
            evaluator=make_evaluator(config, task, servers),
            task=task,
            transport=transport,
            saves=saves,
            stop=stop,
        )
