"""The whole system as a user starts it: `fapo train` with Ray, Megatron, a policy server and a judge server.

Runs that are stopped, killed or damaged, and go on.
"""

import os
import signal
import subprocess
import time

import pytest

from megatron_fapo.cli.train import STOPPED
from tests.cluster.whole_runs import finish, lines, segments, start, timeless, wait_for_steps


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
    assert "after 4 steps of reinforcement learning" in (whole / "model/README.md").read_text()
    assert len((whole / "timeline.jsonl").read_text().splitlines()) == 4
    assert oct((whole / "ray-token").stat().st_mode & 0o777) == "0o600"


def test_a_started_run_is_not_overwritten(whole):
    assert "holds a run already" in finish(start(whole), status=1)


def test_a_run_is_not_resumed_with_another_configuration(whole):
    output = finish(start(whole, "--resume", "train.seed=2", "algorithm.reward.flaw_penalty=0.5"), status=1)
    assert "algorithm.reward.flaw_penalty was 1.0, is 0.5; train.seed was 1, is 2" in output


def kill_after(process: subprocess.Popen, condition) -> None:
    """SIGKILL as soon as the condition holds."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.long
def test_a_run_killed_again_and_again_gives_the_same_metrics(whole, tmp_path):
    """At its start, before its first checkpoint, after it, and in the middle of another."""
    run = tmp_path / "killed"
    kill_after(start(run), (run / "run.json").exists)
    kill_after(start(run, "--resume"), lambda: len(lines(run)) == 2)
    kill_after(start(run, "checkpoint.every=1", "--resume"), lambda: len(lines(run)) == 2)
    half = ".step-000003"
    kill_after(start(run, "checkpoint.every=1", "--resume"), (run / "checkpoints" / half).exists)
    latest = (run / "checkpoints" / "latest").resolve()
    assert (latest / "manifest.json").exists()
    assert latest.name < half.removeprefix(".")
    finish(start(run, "checkpoint.every=1", "--resume"))
    assert not list((run / "checkpoints").glob(".step-*"))
    assert len(list((run / "rollouts").glob("*.parquet"))) == 4
    assert timeless(run) == timeless(whole)
    assert not segments(run)


@pytest.mark.long
def test_a_run_with_a_damaged_checkpoint_names_it_and_goes_on_from_the_one_before(whole, tmp_path):
    run = tmp_path / "damaged"
    finish(start(run, "checkpoint.every=1", "checkpoint.keep=3"))
    newest, before = (run / "checkpoints" / f"step-{step:06d}" for step in (4, 3))
    (newest / "common.pt").unlink()
    weights = next(before.glob("*.distcp"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    output = finish(start(run, "checkpoint.every=1", "--resume"))
    assert "step-000004/common.pt: missing" in output
    assert f"step-000003/{weights.name}: damaged, its checksum differs" in output
    assert timeless(run) == timeless(whole)


@pytest.mark.long
def test_a_stopped_run_saves_a_checkpoint_and_ends_cleanly(whole, tmp_path):
    run = tmp_path / "stopped"
    process = start(run, "checkpoint.every=0")
    wait_for_steps(run, 1, process)
    process.send_signal(signal.SIGTERM)
    finish(process, status=STOPPED)
    done = len(lines(run))
    assert 1 <= done < 3
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", f"step-{done:06d}"]
    process = start(run, "checkpoint.every=0", "--resume")
    wait_for_steps(run, done + 1, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C: every process of the group is told
    finish(process, status=STOPPED)
    finish(start(run, "checkpoint.every=0", "--resume"))
    assert timeless(run) == timeless(whole)


@pytest.mark.long
def test_a_run_stopped_while_it_starts_ends_cleanly(tmp_path):
    run = tmp_path / "early"
    process = start(run)
    while not (run / "logs" / "policy-0.log").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    finish(process, status=STOPPED)
    assert not lines(run)
