"""The wiring: which processes a run consists of, and the verbs that the loop uses.

driver (this process: loop, sampler, judge scheduling, sinks)
├── policy servers      subprocesses, HTTP on loopback; on other nodes by an actor there, on the node's address
├── judge servers       the same
└── training ranks      Ray actors, torch.distributed among them; weights go to the servers by shared memory, or in a
                        process group between nodes
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_fapo.algorithm.settings import LossSettings
from megatron_fapo.cluster.hosts import Hosts, open_hosts
from megatron_fapo.cluster.lending import open_lending
from megatron_fapo.cluster.model import MegatronModel
from megatron_fapo.cluster.phases import Phases
from megatron_fapo.cluster.publishing import PolicyWeights
from megatron_fapo.cluster.ray_session import ray_session
from megatron_fapo.cluster.recovery import Recovery
from megatron_fapo.cluster.saves import Saves, open_saves
from megatron_fapo.cluster.serve_roles import Watcher, make_evaluator, make_sampler, open_servers, open_task
from megatron_fapo.config import Config, TrainSettings
from megatron_fapo.errors import RankLost
from megatron_fapo.publish.transports import make_transport
from megatron_fapo.records import Recovered, Role, RunState, StepBatch, StepReport, WeightVersion
from megatron_fapo.rollout.ahead import Ahead
from megatron_fapo.rollout.sampler import Sampler
from megatron_fapo.run.folder import RunFolder
from megatron_fapo.serving.group import ServerGroup
from megatron_fapo.tasks.interface import Task
from megatron_fapo.trace import Phase, Switch

log = logging.getLogger(__name__)

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
    weights: PolicyWeights
    folder: RunFolder
    saves: Saves
    recovery: Recovery
    stop: asyncio.Event
    """Set when the run is asked to end (SIGTERM, Ctrl-C)."""
    phases: Phases | None = None
    """Where ranks and servers share their devices: whose turn it is."""

    @property
    def policy(self) -> MegatronModel:
        """The model in training."""
        return self.models["policy"]

    async def publish(self, version: int) -> WeightVersion:
        """The policy's present weights to its servers, confirmed by checksum. Start, resume and each step alike.

        Before, servers that somebody asked for (`fapo servers`) begin to start, and such as are no longer wanted leave.
        """
        for role, count in self.folder.servers_asked_for().items():
            log.warning("%s: %d servers from step %d on", role, count, version)
            self.servers[role].resize(count)
        self.policy.ranks.step = version
        await self._enter("publish")
        weights = await self.weights.publish(version)
        await self._enter("generate")
        return weights

    async def update(self, batch: StepBatch, loss: LossSettings) -> StepReport:
        """All optimizer steps of one step."""
        await self._enter("train")
        return await self.weights.update(batch, loss)

    async def respawn(self) -> None:
        """Start the ranks again, with the weights that training began from; the servers stay."""
        if self.phases is not None:
            await self.phases.make_way()
        self.weights.forget()
        await self.policy.respawn()
        if self.phases is not None:
            await self.phases.make_room()

    async def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint. Raises CheckpointDamaged naming the file."""
        await self._enter("train")
        self.policy.ranks.phase = "start"
        await self.policy.load(checkpoint)

    async def save_hf(self, folder: Path) -> None:
        """Write the policy's weights as a Hugging Face folder."""
        await self._enter("publish")
        await self.policy.save_hf(folder)

    async def save(self, state: RunState) -> int:
        """A checkpoint of everything that resume needs, on disk soon or at the end of the run; returns its step."""
        await self._enter("train")
        self.policy.ranks.phase = "save"
        await self.saves.start(state)
        return state.step

    def switches(self) -> list[Switch]:
        """The changes of phase since the last call."""
        return [] if self.phases is None else self.phases.switches()

    async def _enter(self, phase: Phase) -> None:
        self.policy.ranks.phase = phase
        if self.phases is not None:
            await self.phases.enter(phase)

    async def recover(self, loss: RankLost) -> tuple[RunState, Recovered]:
        """All ranks anew from the last checkpoint; the state to go on from. Raises `loss` once that is too often."""
        await self.saves.settle()
        return await self.recovery.after(self, loss, self.policy.ranks.step or 0)

    def ahead(self, settings: TrainSettings) -> Ahead:
        """The groups of each step, drawn as far ahead as the settings let."""
        return Ahead(self.sampler, max_lead=settings.max_lead, steps=settings.steps)

    async def until_stopped(self, work: Awaitable[T]) -> T | None:
        """The result of `work`, or None when the run was asked to stop first; then `work` is cancelled.

        So it is when a rank is lost meanwhile, and the loss is raised.
        """
        task = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self.stop.wait())
        losing = asyncio.ensure_future(self.policy.ranks.lost())
        try:
            await asyncio.wait({task, stopping, losing}, return_when=asyncio.FIRST_COMPLETED)
            if losing.done():
                losing.result()
            return task.result() if task.done() else None
        finally:
            for future in (task, stopping, losing):
                future.cancel()
            await asyncio.gather(task, stopping, losing, return_exceptions=True)


@asynccontextmanager
async def open_cluster(
    config: Config, folder: RunFolder, watcher: Watcher, stop: asyncio.Event
) -> AsyncIterator[Cluster]:
    """Start ranks and servers; at the end, whatever happened, stop all of them.

    They start side by side, but where they share devices: a server sizes its cache by the memory that it finds.
    """
    config = with_servers_asked_for(config, folder)
    async with AsyncExitStack() as stack:
        phases, publishing = None, config.publish
        if config.cluster.placement == "split" and not config.cluster.servers_elsewhere:
            model, servers = await _start_side_by_side(config, folder, stack, watcher)
        else:
            model = await _start_model(config, folder, stack)
            if config.cluster.placement == "colocated":
                phases = Phases(model)
                await phases.make_room()
            hosts = await _open_hosts(config, folder, stack, model) if config.cluster.servers_elsewhere else None
            if hosts is not None:
                publishing = publishing.across(hosts.trainer)
            servers = await stack.enter_async_context(open_servers(config, folder.logs, watcher, hosts=hosts))
            if phases is not None:
                await stack.enter_async_context(open_lending(config, servers, phases, watcher.worked))
        task = await stack.enter_async_context(open_task(config))
        # Named after the run, so that a resumed run reuses (and removes) what a killed one left behind.
        name = hashlib.blake2b(bytes(folder.path), digest_size=8).hexdigest()
        transport = make_transport(publishing, name, folder.path)
        stack.callback(transport.close)
        saves = await stack.enter_async_context(open_saves(model, folder, config.checkpoint))
        yield Cluster(
            models={"policy": model},
            servers=servers,
            sampler=make_sampler(config, task, servers, watcher),
            evaluator=make_evaluator(config, task, servers),
            task=task,
            weights=PolicyWeights(model, servers["policy"], transport, at_any_time=phases is None),
            folder=folder,
            saves=saves,
            recovery=Recovery(folder, config.cluster.recoveries),
            stop=stop,
            phases=phases,
        )


def with_servers_asked_for(config: Config, folder: RunFolder) -> Config:
    """A run that is resumed begins with as many servers as `fapo servers` asked for last: it may have been queued again
    without anybody's doing. A `count` that was changed since then is what somebody said last, and counts; so does
    the configuration where it has no room for as many."""
    started = dict(config.started_servers())
    begin = folder.begin_with_servers({role: settings.count for role, settings in started.items()})
    servers = config.servers
    for role, count in begin.items():
        settings = started[role]
        if count == settings.count:
            continue
        if count > settings.places or config.cluster.placement == "colocated":
            log.warning("%s: %d servers were asked for, the run has room for %d", role, count, settings.places)
            continue
        log.warning("%s: beginning with %d servers, as was asked for", role, count)
        servers = servers.changed(**{role: settings.changed(count=count)})
    return config.changed(servers=servers)


async def _start_model(config: Config, folder: RunFolder, stack: AsyncExitStack) -> MegatronModel:
    await stack.enter_async_context(ray_session(config.cluster, config.policy.parallel.world, folder.path))
    model = await MegatronModel.start("policy", config.policy, config.cluster, config.train.seed, folder.logs)
    stack.callback(model.stop)
    return model


async def _open_hosts(config: Config, folder: RunFolder, stack: AsyncExitStack, model: MegatronModel) -> Hosts:
    """After the ranks: on their nodes, or on others that Ray knows by now."""
    serving, deadline = config.cluster.serving_nodes, config.cluster.setup_deadline
    return await stack.enter_async_context(open_hosts(model.nodes, serving, deadline, folder.path / "api_key"))


async def _start_side_by_side(
    config: Config, folder: RunFolder, stack: AsyncExitStack, watcher: Watcher
) -> tuple[MegatronModel, dict[Role, ServerGroup]]:
    servers_starting = asyncio.ensure_future(
        stack.enter_async_context(open_servers(config, folder.logs, watcher, gpus_taken=config.policy.parallel.world))
    )
    try:
        model = await _start_model(config, folder, stack)
        return model, await servers_starting
    except BaseException:
        servers_starting.cancel()
        await asyncio.gather(servers_starting, return_exceptions=True)
        raise
