"""A Megatron model whose ranks are Ray actors, as one object with asynchronous verbs."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fapo.algorithm.settings import LossSettings
from megatron_fapo.batch.layout import Layout
from megatron_fapo.cluster.rank_actor import RankActor
from megatron_fapo.cluster.ray_session import ray
from megatron_fapo.config import ClusterSettings
from megatron_fapo.errors import FapoError, PolicyError
from megatron_fapo.policy.settings import PolicySettings
from megatron_fapo.records import Bucket, Role, StepBatch, StepReport


class MegatronModel:
    """All ranks of one model (role). Every verb runs on all of them; the first failure stops all.

    A rank's error arrives as it was raised there; a rank that dies or stays silent past the deadline becomes a
    PolicyError that names rank and verb. After any failure the ranks are gone.
    """

    def __init__(self, role: Role, actors: Sequence[Any], deadline: float) -> None:
        self.role = role
        self._actors = list(actors)
        self._deadline = deadline
        self.layout = Layout()

    @classmethod
    async def start(cls, role: Role, settings: PolicySettings, cluster: ClusterSettings, seed: int) -> "MegatronModel":
        """Spawn the ranks and load the model."""
        threads = str(settings.threads)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TORCHDYNAMO_DISABLE": "1"}
        actor = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(RankActor)
        options = {"runtime_env": {"env_vars": environment}}
        actors = [actor.options(**options).remote() for _ in range(settings.parallel.world)]
        model = cls(role, actors, cluster.setup_deadline)
        host, port = await model._one(0, "address")
        layouts = await model._gather(
            "setup",
            [
                a.call.remote("setup", rank, len(actors), host, port, settings, seed)
                for rank, a in enumerate(model._actors)
            ],
        )
        model.layout = layouts[0]
        model._deadline = cluster.phase_deadline
        return model

    async def pids(self) -> list[int]:
        """Process ids in the order of ranks."""
        return list(await self._gather("pid", [actor.pid.remote() for actor in self._actors]))

    async def update(self, batch: StepBatch, loss: LossSettings) -> StepReport:
        """All optimizer steps of one step."""
        reports = await self._all("update", ray.put(batch), loss)
        return next(report for report in reports if isinstance(report, StepReport))

    async def open_export(self) -> None:
        """Start an export at the first tensor."""
        await self._all("open_export")

    async def next_bucket(self, segment: str, nbytes: int) -> Bucket | None:
        """Write the next tensors into a shared-memory file; None when all were sent."""
        buckets = await self._all("next_bucket", segment, nbytes)
        return next((bucket for bucket in buckets if isinstance(bucket, Bucket)), None)

    async def save(self, folder: Path) -> None:
        """Write weights, optimizer, schedule and random states."""
        await self._all("save", str(folder))

    async def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        await self._all("load", str(folder))

    async def save_hf(self, folder: Path) -> None:
        """Write the weights as a Hugging Face folder."""
        await self._all("save_hf", str(folder))

    def stop(self) -> None:
        """End all ranks."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []

    async def _one(self, rank: int, verb: str) -> Any:
        return (await self._gather(verb, [self._actors[rank].call.remote(verb)]))[0]

    async def _all(self, verb: str, *arguments: Any) -> list[Any]:
        return await self._gather(verb, [actor.call.remote(verb, *arguments) for actor in self._actors])

    async def _gather(self, verb: str, references: Sequence[Any]) -> list[Any]:
        futures = [asyncio.wrap_future(reference.future()) for reference in references]
        done, silent = await asyncio.wait(futures, timeout=self._deadline, return_when=asyncio.FIRST_EXCEPTION)
        failed = [rank for rank, future in enumerate(futures) if future in done and future.exception() is not None]
        if failed:
            error = _translate(futures[failed[0]].exception(), self.role, failed[0], verb)
            self.stop()
            raise error
        if silent:
            names = ", ".join(str(rank) for rank, future in enumerate(futures) if future in silent)
            self.stop()
            raise PolicyError(
                f"no answer from rank {names} within {self._deadline:g} s (cluster.phase_deadline)",
                role=self.role,
                verb=verb,
            )
        return [future.result() for future in futures]


def _translate(error: BaseException | None, role: Role, rank: int, verb: str) -> BaseException:
    """A Ray error as one of ours; a rank's own error comes through as it is."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, FapoError):
            return cause
        return PolicyError(f"{type(cause).__name__}: {cause}", role=role, rank=rank, verb=verb)
    if isinstance(error, ray.exceptions.RayActorError):
        said = str(error).strip().splitlines()[-1:]
        return PolicyError(f"the rank's process died: {''.join(said)}", role=role, rank=rank, verb=verb)
    if isinstance(error, ray.exceptions.RayError):
        return PolicyError(f"Ray: {error}", role=role, rank=rank, verb=verb)
    return error if error is not None else PolicyError("no error", role=role, rank=rank, verb=verb)
