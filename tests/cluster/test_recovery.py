"""A run that loses ranks ends as one that lost none: killed and frozen in each phase, the servers kept."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path

import psutil
import pytest

from megatron_fapo.cluster.cluster import Cluster, open_cluster
from megatron_fapo.cluster.ranks import Doing
from megatron_fapo.cluster.serve_roles import Watcher
from megatron_fapo.config import Config, read_config
from megatron_fapo.errors import RankLost
from megatron_fapo.manifest import file_sum
from megatron_fapo.observe.jsonl import read_metrics
from megatron_fapo.observe.metrics import without_time
from megatron_fapo.observe.sinks import open_sinks
from megatron_fapo.records import RunState
from megatron_fapo.run.folder import RunFolder
from megatron_fapo.train import train_to_the_end

TINY = [
    "train.deterministic=true",
    "train.steps=5",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "batch.updates=2",
    "policy.threads=1",
    "policy.parallel.data=2",
    "checkpoint.every=1",
    "checkpoint.asynchronous=false",
    "observe.report=false",
    "observe.console=off",
    "cluster.rank_deadline=10",
]

Fault = tuple[Doing, int, signal.Signals]
"""In which phase of which step a rank gets which signal."""

AFTER: dict[Doing, Doing] = {"publish": "generate", "generate": "train", "train": "save", "save": "publish"}
FAULTS: list[Fault] = [
    (phase, step, number) for step, phase in enumerate(AFTER, start=1) for number in (signal.SIGKILL, signal.SIGSTOP)
]


def ranks_of(cluster: Cluster) -> list[psutil.Process]:
    """The ranks' processes, as they were started."""
    found = [p for p in psutil.Process().children(recursive=True) if "ray::RankActor" in " ".join(p.cmdline())]
    assert len(found) == len(cluster.policy.ranks)
    return sorted(found, key=lambda p: p.pid)


def servers() -> set[int]:
    """Process ids of the generation servers."""
    ours = psutil.Process().children(recursive=True)
    return {p.pid for p in ours if "megatron_fapo.serving.engine.main" in " ".join(p.cmdline())}


async def no_harm(cluster: Cluster, said: list[str]) -> None:
    """Nobody disturbs the run."""


async def in_phases(faults: list[Fault], cluster: Cluster, said: list[str]) -> None:
    """Send each fault's signal in its phase, the next one once the ranks live again."""
    for phase, step, number in faults:
        while not (cluster.policy.ranks.phase == phase and cluster.policy.ranks.step == step):
            await asyncio.sleep(0.001)
        ranks = cluster.policy.ranks
        ranks_of(cluster)[len(said) % 2].send_signal(number)
        try:
            await ranks.lost()
        except RankLost as loss:
            said.append(str(loss))
        while cluster.policy.ranks is ranks:
            await asyncio.sleep(0.01)


Harm = Callable[[Cluster, list[str]], Coroutine[None, None, None]]
"""Does harm to a cluster, and notes what is said of each rank that is lost."""


async def run(config: Config, path: Path, harm: Harm) -> list[str]:
    """A whole run to which harm is done, which keeps its servers; what was said of each loss."""
    folder = RunFolder(path)
    folder.create()
    said: list[str] = []
    with open_sinks(config.observe, path, config=config.model_dump(mode="json")) as sinks:
        async with open_cluster(config, folder, Watcher(), asyncio.Event()) as cluster:
            before = servers()
            harming = asyncio.create_task(harm(cluster, said))
            try:
                await train_to_the_end(config, cluster, RunState(step=0, cursor=0), sinks)
            finally:
                harming.cancel()
            await asyncio.wait([harming])
            if not harming.cancelled():
                harming.result()
            assert servers() == before
            assert len(before) == 2
    return said


def same(disturbed: Path, whole: Path, losses: int) -> bool:
    """Whether a run that lost ranks so often has the metrics and final weights of one that lost none."""
    found, expected = (dict(read_metrics(path / "metrics.jsonl")) for path in (disturbed, whole))
    assert found[max(found)]["recover/count"] == losses
    bare = {
        step: {name: value for name, value in without_time(line).items() if not name.startswith("recover/")}
        for step, line in found.items()
    }
    sums = [file_sum(path / "model" / "model.safetensors") for path in (disturbed, whole)]
    return bare == {step: without_time(line) for step, line in expected.items()} and sums[0] == sums[1]


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_a_run_whose_ranks_die_and_freeze_in_each_phase_ends_as_one_that_nobody_disturbed(tmp_path: Path) -> None:
    config = read_config(Path("configs/clock/fapo.yaml"), TINY)
    assert await run(config, tmp_path / "whole", no_harm) == []
    said = await run(config, tmp_path / "disturbed", partial(in_phases, FAULTS))
    for (phase, step, number), text in zip(FAULTS, said, strict=True):
        how = "process died" if number == signal.SIGKILL else "is frozen"
        assert how in text, text
        assert f"step {step}" in text, text
        assert any(f"phase {one}" in text for one in (phase, AFTER[phase])), text  # it may end before the next question
        assert "role policy, rank " in text, text
    assert same(tmp_path / "disturbed", tmp_path / "whole", len(FAULTS))


@pytest.mark.long
async def test_ranks_that_are_lost_again_and_again_end_the_run_by_name(tmp_path: Path) -> None:
    config = read_config(Path("configs/clock/fapo.yaml"), [*TINY, "checkpoint.every=0", "cluster.recoveries=1"])
    faults: list[Fault] = [("train", step, signal.SIGKILL) for step in (0, 1)]
    with pytest.raises(RankLost, match=r"process died: .*role policy, rank ., .*phase train, step 1"):
        await run(config, tmp_path / "run", partial(in_phases, faults))
