"""The whole system as a user starts it: `fapo train` with Ray, Megatron, a policy server and a judge server."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_fapo.weights import shared_memory_folder

ROOT = Path(__file__).parents[2]
FAPO = str(Path(sys.executable).parent / "fapo")
SMALL = [
    "train.deterministic=true",
    "train.steps=4",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "batch.updates=2",
    "policy.threads=1",
    "checkpoint.every=1",
    "evaluation.every=2",
    "evaluation.prompts=8",
    "evaluation.samples=2",
    "observe.report=false",
    "servers.policy.max_running=32",
    "servers.judge.max_running=32",
]


def start(run: Path, *extra: str) -> subprocess.Popen:
    command = [FAPO, "train", "configs/clock/fapo.yaml", *SMALL, "--run", str(run), *extra]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


def lines(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def timeless(run: Path) -> list[dict]:
    """The metrics without those that the clock measures."""
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines(run)]


def segments(run: Path) -> list[Path]:
    """What the run has left in shared memory."""
    name = hashlib.blake2b(bytes(run.resolve()), digest_size=8).hexdigest()
    return list(shared_memory_folder().glob(f"fapo-{name}-*"))


def wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
    while len(lines(run)) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody disturbs."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(run))
    assert not segments(run)
    return run


def test_a_run_trains_judges_publishes_and_records(whole):
    *steps, last = lines(whole)
    assert [line["step"] for line in steps] == [0, 1, 2, 3]
    assert [line["step"] for line in [*steps, last] if "eval/right_share" in line] == [0, 2, 4]
    for line in steps:
        assert line["mismatch/max"] < 1e-4
        assert line["judge/asked"] > 0
        assert line["train/grad_norm_max"] > 0
    assert len(list((whole / "rollouts").glob("*.parquet"))) == 4
    assert (whole / "model/model.safetensors").stat().st_size > 1e6
    assert oct((whole / "ray-token").stat().st_mode & 0o777) == "0o600"


def test_a_started_run_is_not_overwritten(whole):
    output = finish(start(whole), status=1)
    assert "holds a run already" in output


@pytest.mark.long
@pytest.mark.parametrize("killed_after", [0, 2])
def test_a_killed_and_resumed_run_gives_the_same_metrics(whole, tmp_path, killed_after):
    run = tmp_path / "killed"
    process = start(run)
    if killed_after:
        wait_for_steps(run, killed_after, process)
    else:
        while not (run / "run.json").exists():
            time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finish(start(run, "--resume"))
    assert timeless(run) == timeless(whole)
    assert not segments(run)


@pytest.mark.long
@pytest.mark.parametrize("axis", ["tensor", "pipeline", "data"])
def test_two_ranks_start_from_the_same_rollouts_and_agree_with_the_engine(whole, tmp_path, axis):
    run = tmp_path / axis
    finish(start(run, f"policy.parallel.{axis}=2", "train.steps=2", "evaluation.every=0"))
    first, second = lines(run)
    assert max(first["mismatch/max"], second["mismatch/max"]) < 1e-4
    alone = lines(whole)[0]
    for name in ("rollout/right_share", "judge/tokens", "reward/mean"):
        assert first[name] == alone[name]
    for name in ("train/loss", "train/grad_norm_mean"):
        assert first[name] == pytest.approx(alone[name], rel=1e-4)


@pytest.mark.long
def test_sigterm_saves_a_checkpoint_and_ends_cleanly(whole, tmp_path):
    run = tmp_path / "stopped"
    process = start(run, "checkpoint.every=0")
    wait_for_steps(run, 1, process)
    process.send_signal(signal.SIGTERM)
    finish(process)
    done = len(lines(run))
    assert 1 <= done < 4
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    finish(start(run, "checkpoint.every=0", "--resume"))
    assert timeless(run) == timeless(whole)


@pytest.mark.long
@pytest.mark.parametrize(("victim", "message"), [("policy.rank", "rank 0"), ("engine.main", "server")])
def test_a_process_that_dies_ends_the_run_by_name(tmp_path, victim, message):
    run = tmp_path / "broken"
    process = start(run, "train.steps=1000", "checkpoint.every=0")
    wait_for_steps(run, 1, process)
    os.kill(_descendant(process.pid, victim), signal.SIGKILL)
    assert message in finish(process, status=1)


def _descendant(parent: int, kind: str) -> int:
    """A process below `parent`: a training rank (its Ray actor) or a server."""
    table = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()[1:]]
    parents = {int(pid): int(ppid) for pid, ppid, _ in rows}
    for pid, _, arguments in rows:
        above = int(pid)
        while above in parents and above != parent:
            above = parents[above]
        wanted = "ray::RankActor" in arguments if kind == "policy.rank" else kind in arguments
        if above == parent and wanted and int(pid) != parent:
            return int(pid)
    raise AssertionError(f"no {kind} below {parent}")
