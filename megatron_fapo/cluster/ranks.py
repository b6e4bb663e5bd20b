"""A Megatron model whose ranks are Ray actors, as one object with asynchronous verbs.

Ray is imported where it is used, because `ray_session` sets its environment first.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_fapo.algorithm.settings import LossSettings
from megatron_fapo.batch.layout import Layout
from megatron_fapo.cluster.placement import Placement, reserve
from megatron_fapo.cluster.rank_actor import RankActor
from megatron_fapo.config import ClusterSettings
from megatron_fapo.errors import FapoError, PolicyError
from megatron_fapo.held import HeldLayout
from megatron_fapo.policy.settings import PolicySettings
from megatron_fapo.records import Bucket, Role, StepBatch, StepReport
from megatron_fapo.trace import Kind

COLOURS = re.compile(r"\x1b\[\d+m")
"""Ray paints its tracebacks."""

GRACE = 2.0
"""Seconds in which further failures are awaited after the first: a rank that dies takes its peers along."""


class MegatronModel:
    """All ranks of one model (role). Every verb runs on all of them; a failure of one stops all.

    A rank's error arrives as it was raised there, with the rank's traceback as a note; a rank that dies or stays
    silent past the deadline becomes a PolicyError that names rank and verb. Of several failures the likely cause is
    raised: a death, else an error of ours, else a foreign one. After any failure the ranks are gone.
    """

    def __init__(self, role: Role, actors: Sequence[Any], deadline: float, placement: Placement | None = None) -> None:
        self.role = role
        self._actors = list(actors)
        self._deadline = deadline
        self._failure: BaseException | None = None
        self._placement = placement
        self.layout = Layout()

    @classmethod
    async def start(cls, role: Role, settings: PolicySettings, cluster: ClusterSettings, seed: int) -> "MegatronModel":
        """Spawn the ranks and load the model."""
        world = settings.parallel.world
        placement = await reserve(world, cluster.training_nodes, cluster.setup_deadline)
        remote = _remote_rank(settings)
        actors = [remote.options(**placement.options(rank)).remote(role, rank) for rank in range(world)]
        model = cls(role, actors, cluster.setup_deadline, placement)
        host, port = await model._one(0, "address", placement.address)
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

    @property
    def nodes(self) -> list[str]:
        """Ray's ids of the nodes that the ranks are on."""
        return [] if self._placement is None else self._placement.nodes()

    async def update(self, batch: StepBatch, loss: LossSettings) -> StepReport:
        """All optimizer steps of one step."""
        import ray

        reports = await self._all("update", ray.put(batch), loss)
        return next(report for report in reports if isinstance(report, StepReport))

    async def open_export(self, layouts: Sequence[HeldLayout]) -> None:
        """Start an export at the first tensor, to servers that hold weights in these layouts."""
        await self._all("open_export", layouts)

    async def next_bucket(self, segment: str, nbytes: int) -> Bucket | None:
        """Write the next tensors into a shared-memory file; None when all were sent."""
        buckets = await self._all("next_bucket", segment, nbytes)
        return next((bucket for bucket in buckets if isinstance(bucket, Bucket)), None)

    async def expected(self, layout: HeldLayout) -> dict[str, str]:
        """What a server of this layout must hold after the export."""
        return dict(await self._one(0, "expected", layout))

    async def begin_save(self, folder: Path) -> None:
        """Copy weights, optimizer, schedule and random states, and let the ranks write them in the background."""
        await self._all("begin_save", str(folder))

    async def save_written(self) -> bool:
        """Whether all ranks have written their files."""
        return all(await self._all("save_written"))

    async def end_save(self) -> None:
        """Complete the checkpoint that was begun."""
        await self._all("end_save")

    async def load(self, folder: Path) -> None:
        """Read a checkpoint, of any layout. Raises CheckpointDamaged naming the file."""
        await self._all("load", str(folder))

    async def save_hf(self, folder: Path) -> None:
        """Write the weights as a Hugging Face folder."""
        await self._all("save_hf", str(folder))

    async def offload(self, kinds: Sequence[Kind]) -> None:
        """Free the device memory of these kinds."""
        await self._all("offload", kinds)

    async def onload(self, kinds: Sequence[Kind]) -> None:
        """Fill what was offloaded again."""
        await self._all("onload", kinds)

    async def resident(self) -> list[dict[Kind, int]]:
        """Bytes of each kind that each rank holds of its device's memory."""
        return await self._all("resident")

    async def device_free(self) -> list[int | None]:
        """Free bytes of each rank's device; None on a CPU."""
        return await self._all("device_free")

    def stop(self) -> None:
        """End all ranks."""
        import ray

        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []
        if self._placement is not None:
            self._placement.release()
            self._placement = None

    async def _one(self, rank: int, verb: str, *arguments: Any) -> Any:
        return (await self._gather(verb, [self._actors[rank].call.remote(verb, *arguments)]))[0]

    async def _all(self, verb: str, *arguments: Any) -> list[Any]:
        if self._failure is not None:  # a verb that ran beside another one ended the ranks: it says why
            raise self._failure
        return await self._gather(verb, [actor.call.remote(verb, *arguments) for actor in self._actors])

    async def _gather(self, verb: str, references: Sequence[Any]) -> list[Any]:
        futures = [asyncio.wrap_future(reference.future()) for reference in references]
        for future in futures:  # one that still runs when the ranks are ended fails later, and nobody asks why
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
        done, silent = await asyncio.wait(futures, timeout=self._deadline, return_when=asyncio.FIRST_EXCEPTION)
        if any(future.exception() is not None for future in done):
            errors = await _failures(futures)
            self.stop()
            self._failure = _cause(errors, self.role, verb)
            raise self._failure
        if silent:
            names = ", ".join(str(rank) for rank, future in enumerate(futures) if future in silent)
            self.stop()
            self._failure = PolicyError(
                f"no answer from rank {names} within {self._deadline:g} s (cluster.phase_deadline)",
                role=self.role,
                verb=verb,
            )
            raise self._failure
        return [future.result() for future in futures]


def _remote_rank(settings: PolicySettings) -> Any:
    """The actor class, with its threads."""
    import ray

    threads = str(settings.threads)
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TORCHDYNAMO_DISABLE": "1"}
    return ray.remote(max_restarts=0, max_task_retries=0, runtime_env={"env_vars": environment})(RankActor)


async def _failures(futures: Sequence[asyncio.Future[Any]]) -> dict[int, BaseException]:
    """{rank: its error}, of all ranks that fail within the grace time; no wait once a rank is known to have died."""
    import ray

    end = asyncio.get_running_loop().time() + GRACE
    while True:
        found = {rank: f.exception() for rank, f in enumerate(futures) if f.done() and f.exception() is not None}
        errors = {rank: error for rank, error in found.items() if error is not None}
        running = [future for future in futures if not future.done()]
        left = end - asyncio.get_running_loop().time()
        if not running or left <= 0 or any(isinstance(e, ray.exceptions.RayActorError) for e in errors.values()):
            return errors
        await asyncio.wait(running, timeout=left, return_when=asyncio.FIRST_COMPLETED)


def _cause(errors: Mapping[int, BaseException], role: Role, verb: str) -> BaseException:
    """The likely cause of several failures, as one of our errors."""
    import ray

    def order(rank: int) -> int:
        if isinstance(errors[rank], ray.exceptions.RayActorError):
            return 0
        return 1 if isinstance(getattr(errors[rank], "cause", None), FapoError) else 2

    rank = min(errors, key=order)
    return _translate(errors[rank], role, rank, verb)


def _translate(error: BaseException, role: Role, rank: int, verb: str) -> BaseException:
    """A Ray error as one of ours; a rank's own error comes through as it is, with its traceback as a note."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        cause: BaseException = error.cause
        if not isinstance(cause, FapoError):
            text = " ".join(str(cause).split())
            cause = PolicyError(f"{type(cause).__name__}: {text}", role=role, rank=rank, verb=verb)
        cause.add_note(COLOURS.sub("", str(error)))
        return cause
    if isinstance(error, ray.exceptions.RayActorError):
        said = str(error).strip().splitlines()[-1:]
        return PolicyError(f"the rank's process died: {''.join(said)}", role=role, rank=rank, verb=verb)
    if isinstance(error, ray.exceptions.RayError):
        return PolicyError(f"Ray: {error}", role=role, rank=rank, verb=verb)
    return error
