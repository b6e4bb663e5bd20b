"""Training ranks and servers that share their memory in turn: the same run, and nothing held by two at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_fapo.cluster.phases import Phases
from megatron_fapo.config import read_config
from megatron_fapo.errors import ConfigError, MemoryHeld, WeightsError
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.group import ServerGroup
from megatron_fapo.serving.launcher import launch_one
from megatron_fapo.serving.memory import ServerMemory
from megatron_fapo.serving.settings import ServerSettings
from megatron_fapo.trace import Kind
from tests.cluster.whole_runs import ROOT, finish, lines, start, timeless
from tests.serving.worlds import make_model

FEW = ["train.steps=3", "evaluation.every=0", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("phases") / "shared"
    finish(start(run, "cluster.placement=colocated", *FEW))
    return run


@pytest.mark.long
def test_a_colocated_run_gives_the_same_metrics(shared: Path, tmp_path: Path) -> None:
    apart = tmp_path / "apart"
    finish(start(apart, *FEW))
    kept = [{k: v for k, v in line.items() if not k.startswith("memory/")} for line in timeless(shared)]
    assert kept == timeless(apart)
    assert not any(name.startswith(("memory/", "time/switch")) for line in lines(apart) for name in line)


@pytest.mark.long
def test_each_phase_has_its_owners_alone(shared: Path) -> None:
    for line in lines(shared)[:3]:
        held = {name.removeprefix("memory/") for name in line if name.startswith("memory/")}
        assert held >= {"train/ranks_parameters", "train/ranks_gradients", "train/ranks_optimizer"} or line["step"] == 0
        assert held >= {"publish/ranks_parameters", "publish/policy_weights"}
        assert held >= {"generate/policy_weights", "generate/judge_weights"}
        # Megatron pads its flat buffers.
        assert line["memory/publish/policy_weights"] == pytest.approx(line["memory/publish/ranks_parameters"], rel=1e-3)
        assert line["time/switch"] > 0


@dataclass
class Hoarder:
    """One rank that keeps, or loses, what it is told to keep or lose."""

    keeps: str = ""
    loses: str = ""
    free: int | None = None
    sizes: dict[Kind, int] = field(default_factory=lambda: {"parameters": 10, "gradients": 20, "optimizer": 40})
    away: set[str] = field(default_factory=set)

    async def offload(self, kinds: Sequence[Kind]) -> None:
        self.away |= set(kinds) - {self.keeps}

    async def onload(self, kinds: Sequence[Kind]) -> None:
        self.away -= set(kinds) - {self.loses}

    async def resident(self) -> list[dict[Kind, int]]:
        return [{kind: 0 if kind in self.away else size for kind, size in self.sizes.items()}]

    async def device_free(self) -> list[int | None]:
        return [self.free]


async def round_of(ranks: Hoarder) -> Phases:
    phases = Phases(ranks)
    await phases.make_room()
    await phases.attach({})
    for phase in ("publish", "generate", "train", "publish"):
        await phases.enter(phase)
    return phases


async def test_bytes_are_counted_at_each_change() -> None:
    switches = (await round_of(Hoarder(free=70))).switches()
    assert [(s.phase, s.freed, s.taken) for s in switches] == [
        ("publish", 0, 10),
        ("generate", 10, 0),
        ("train", 0, 70),
        ("publish", 60, 0),
    ]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (Hoarder(keeps="gradients"), "still held: ranks_gradients"),
        (Hoarder(loses="gradients"), "is not there: ranks_gradients"),
        (Hoarder(free=60), "rank 0 has 0.00 GiB free"),
    ],
)
async def test_memory_with_the_wrong_owner_ends_the_run_by_name(ranks: Hoarder, message: str) -> None:
    with pytest.raises(MemoryHeld, match=message):
        await round_of(ranks)


@pytest.mark.parametrize("backup", [True, False])
async def test_a_judge_has_its_weights_after_its_sleep_or_the_run_ends(tmp_path: Path, backup: bool) -> None:
    settings = ServerSettings(model=str(make_model(tmp_path / "model")), weights_cpu_backup=backup)
    server = await launch_one(settings, tmp_path / "log", 0)
    try:
        async with ServerClient(server.url) as client:
            memory = ServerMemory(client)
            phases = Phases(Hoarder())
            await phases.make_room()
            await phases.attach({"judge": ServerGroup([client])})
            await phases.enter("train")
            assert await memory.held() == {"weights": 0, "kv_cache": 0}
            if backup:
                await phases.enter("generate")
                assert (await memory.held() or {})["weights"] > 0
            else:
                with pytest.raises(WeightsError, match="judge server 0 came back from its sleep with other weights"):
                    await phases.enter("generate")
    finally:
        await server.stop()


def test_an_engine_that_cannot_sleep_is_refused() -> None:
    servers = ("servers.judge.engine=sglang", "servers.judge.sglang.on_cpu=true")
    with pytest.raises(ConfigError, match="SGLang on a CPU cannot"):
        read_config(ROOT / "configs/clock/fapo.yaml", ["cluster.placement=colocated", *servers])
