"""A Megatron model whose ranks are Ray actors, as one object with asynchronous verbs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fapo.algorithm.settings import LossSettings
from megatron_fapo.batch.layout import Layout
from megatron_fapo.cluster.placement import reserve
from megatron_fapo.cluster.rank_actor import ALIVE, RankActor
from megatron_fapo.cluster.ranks import Ranks
from megatron_fapo.config import ClusterSettings
from megatron_fapo.held import HeldLayout
from megatron_fapo.policy.settings import PolicySettings
from megatron_fapo.records import Bucket, Role, StepBatch, StepReport
from megatron_fapo.trace import Kind


class MegatronModel:
    """A model (role) on its ranks. Every verb runs on all of them, and raises what `Ranks` says of a failure.

    After a failure all ranks are gone; `respawn` starts others, which hold the weights of `settings.model` again.
    """

    def __init__(
        self, role: Role, settings: PolicySettings, cluster: ClusterSettings, seed: int, logs: Path | None = None
    ) -> None:
        self.role = role
        self._settings, self._cluster, self._seed, self._logs = settings, cluster, seed, logs
        self.ranks = Ranks(role, (), cluster.setup_deadline)
        self.layout = Layout()

    @classmethod
    async def start(
        cls, role: Role, settings: PolicySettings, cluster: ClusterSettings, seed: int, logs: Path | None = None
    ) -> "MegatronModel":
        """Spawn the ranks and load the model; what NCCL was doing when it gave up is written into `logs`."""
        model = cls(role, settings, cluster, seed, logs)
        await model.respawn()
        return model

    async def respawn(self) -> None:
        """End the ranks, if any are left, and start others."""
        self.stop()
        world, cluster = self._settings.parallel.world, self._cluster
        placement = await reserve(world, cluster.training_nodes, cluster.setup_deadline)
        remote = _remote_rank(self._settings, self._logs)
        actors = [remote.options(**placement.options(rank)).remote(self.role, rank) for rank in range(world)]
        step = self.ranks.step
        self.ranks = Ranks(self.role, actors, cluster.setup_deadline, placement=placement)
        host, port = await self.ranks.one(0, "address", placement.address)
        setups = [(rank, world, host, port, self._settings, self._seed) for rank in range(world)]
        self.layout = (await self.ranks.each("setup", setups))[0]
        self.ranks.step = step
        self.ranks.watch(cluster.phase_deadline, cluster.rank_deadline)

    @property
    def nodes(self) -> list[str]:
        """Ray's ids of the nodes that the ranks are on."""
        return self.ranks.nodes

    async def update(self, batch: StepBatch, loss: LossSettings) -> StepReport:
        """All optimizer steps of one step."""
        import ray

        reports = await self.ranks.all("update", ray.put(batch), loss)
        return next(report for report in reports if isinstance(report, StepReport))

    async def open_export(self, layouts: Sequence[HeldLayout]) -> None:
        """Start an export at the first tensor, to servers that hold weights in these layouts."""
        await self.ranks.all("open_export", layouts)

    async def next_bucket(self, segment: str, nbytes: int) -> Bucket | None:
        """Write the next tensors into a shared-memory file; None when all were sent."""
        buckets = await self.ranks.all("next_bucket", segment, nbytes)
        return next((bucket for bucket in buckets if isinstance(bucket, Bucket)), None)

    async def expected(self, layout: HeldLayout) -> dict[str, str]:
        """What a server of this layout must hold after the export."""
        return dict(await self.ranks.one(0, "expected", layout))

    async def open_group(self, name: str, host: str, backend: str, seconds: float) -> tuple[str, int]:
        """Prepare a process group of rank 0 and servers; the address at which they meet."""
        host, port = await self.ranks.one(0, "open_group", name, host, backend, seconds)
        return host, port

    async def join_group(self, world: int) -> str:
        """Wait until all members have met; why they did not, else ""."""
        return str(await self.ranks.one(0, "join_group", world))

    async def send_bucket(self, bucket: Bucket) -> str:
        """Broadcast a bucket to the group; why that failed, else ""."""
        return str(await self.ranks.one(0, "send_bucket", bucket))

    async def close_group(self) -> None:
        """Leave the group."""
        await self.ranks.one(0, "close_group")

    async def begin_save(self, folder: Path) -> None:
        """Copy weights, optimizer, schedule and random states, and let the ranks write them in the background."""
        await self.ranks.all("begin_save", str(folder))

    async def save_written(self) -> bool:
        """Whether all ranks have written their files."""
        return all(await self.ranks.all("save_written"))

    async def end_save(self) -> None:
        """Complete the checkpoint that was begun."""
        await self.ranks.all("end_save")

    async def load(self, folder: Path) -> None:
        """Read a checkpoint, of any layout. Raises CheckpointDamaged naming the file."""
        await self.ranks.all("load", str(folder))

    async def save_hf(self, folder: Path) -> None:
        """Write the weights as a Hugging Face folder."""
        await self.ranks.all("save_hf", str(folder))

    async def offload(self, kinds: Sequence[Kind]) -> None:
        """Free the device memory of these kinds."""
        await self.ranks.all("offload", kinds)

    async def onload(self, kinds: Sequence[Kind]) -> None:
        """Fill what was offloaded again."""
        await self.ranks.all("onload", kinds)

    async def resident(self) -> list[dict[Kind, int]]:
        """Bytes of each kind that each rank holds of its device's memory."""
        return await self.ranks.all("resident")

    async def device_free(self) -> list[int | None]:
        """Free bytes of each rank's device; None on a CPU."""
        return await self.ranks.all("device_free")

    def stop(self) -> None:
        """End all ranks."""
        self.ranks.stop()


def _remote_rank(settings: PolicySettings, logs: Path | None) -> Any:
    """The actor class, with its threads: one for the verbs, one that says that the process is alive."""
    import ray

    threads = str(settings.threads)
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TORCHDYNAMO_DISABLE": "1"}
    if logs is not None:  # its flight recorder adds the rank; read on CUDA alone
        environment["TORCH_FR_DUMP_TEMP_FILE"] = str(logs / "nccl-rank-")
    options = {"max_restarts": 0, "max_task_retries": 0, "concurrency_groups": {ALIVE: 1}}
    return ray.remote(**options, runtime_env={"env_vars": environment})(RankActor)
