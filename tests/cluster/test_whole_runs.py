"""The whole system as a user starts it: `fapo train` with Ray, Megatron, a policy server and a judge server."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from megatron_fapo.cli.train import STOPPED
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
    "checkpoint.every=3",
    "evaluation.every=2",
    "evaluation.prompts=8",
    "evaluation.samples=2",
    "evaluation.top_p=0.7",
    "observe.report=false",
    "servers.policy.max_running=32",
    "servers.judge.max_running=32",
]


def start(run: Path, *extra: str) -> subprocess.Popen:
    command = [FAPO, "train", "configs/clock/fapo.yaml", *SMALL, "--run", str(run), *extra]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen, status: int = 0, seconds: float = 240) -> str:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == status, output
    return output


def lines(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def timeless(run: Path) -> list[dict]:
    """The metrics without those that the clock measures, and those that count faults."""
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "servers/"))} for line in lines(run)]


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


METHODS = {
    "a corrected bad judge": [
        "judge.errors={missed: 0.3, invented: 0.1}",
        "judge.audit={reference: oracle, share: 1.0, enough: 2, window: 2}",
        "algorithm.reward.correct_rates=true",
        "algorithm.advantage.all_right=shrunk",
    ],
    "another loss, tokens and estimator": [
        "algorithm.loss={objective: {name: gspo}, aggregation: sequence_mean, kl: {coefficient: 0.01}, "
        "entropy_bonus: 0.001, importance: {level: sequence}, mask_truncated: true}",
        "algorithm.advantage={estimator: rloo, flaw: first_wrong_step}",
        "policy.reference=true",
        "policy.rescore=always",
        "rollout.dynamic_sampling=1",
    ],
    "right only, short verdicts": [
        "algorithm.advantage={estimator: reinforce_pp_baseline, flaw: right_only}",
        "algorithm.loss={objective: {name: cispo}, aggregation: constant, constant_length: 64}",
        "algorithm.reward.penalty=soft",
        "judge.probability=token",
        "judge.cascade={clean_below: 0.01}",
        "judge.step_deadline=120",
    ],
}


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_another_method_trains_and_resumes_as_if_never_stopped(tmp_path, method):
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    finish(start(run, *METHODS[method], "checkpoint.every=2"))
    shutil.copytree(run, resumed, symlinks=True)
    shutil.rmtree(resumed / "checkpoints" / "step-000004")
    finish(start(resumed, *METHODS[method], "checkpoint.every=2", "--resume"))
    assert timeless(resumed) == timeless(run)
    assert all(line["train/grad_norm_max"] > 0 for line in lines(run)[:-1])


def rollouts(run: Path) -> list[list[tuple[str, list[int]]]]:
    """Of each step, the rollouts' ids, without the group's place, and the versions that drew them."""
    files = sorted((run / "rollouts").glob("*.parquet"))
    rows = [pq.read_table(file, columns=["rollout_id", "versions"]).to_pylist() for file in files]
    return [[(row["rollout_id"], row["versions"]) for row in step] for step in rows]


AHEAD = ["train.deterministic=false", "train.max_lead=1", "policy.rescore=when_stale", "algorithm.loss.importance={}"]


@pytest.mark.long
def test_a_run_ahead_of_training_bounds_the_lag_and_resumes_without_losing_or_doubling_a_prompt(tmp_path):
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    finish(start(run, *AHEAD, "checkpoint.every=2"))
    shutil.copytree(run, resumed, symlinks=True)
    shutil.rmtree(resumed / "checkpoints" / "step-000004")
    finish(start(resumed, *AHEAD, "checkpoint.every=2", "--resume"))
    for one in (run, resumed):
        for step, drawn in enumerate(rollouts(one)):
            prompts = range(8 * step, 8 * step + 8)
            assert sorted(name for name, _ in drawn) == sorted(f"s{step}-p{p}-r{r}" for p in prompts for r in range(4))
            assert {version for _, versions in drawn for version in versions} <= {max(step - 1, 0), step}
        steps = lines(one)[:-1]
        assert [line["group/too_old"] for line in steps] == [0] * 4
        assert all(line["train/grad_norm_max"] > 0 for line in steps)
    assert [line["rollout/lag_max"] for line in lines(run)[:-1]] == [0, 1, 1, 1]
    assert [line["train/rescored"] for line in lines(run)[:-1]] == [0, 1, 1, 1]
    assert [line["rollout/lag_max"] for line in lines(resumed)[:-1]] == [0, 1, 0, 1]  # step 2 is drawn again


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


@pytest.mark.long
@pytest.mark.parametrize(("victim", "message"), [("policy-0.log", "server ended"), ("judge-0.log", "verdicts")])
def test_a_process_that_dies_ends_the_run_by_name(tmp_path, victim, message):
    run = tmp_path / "broken"
    stays = [f"servers.{role}.restarts=0" for role in ("policy", "judge")]
    process = start(run, "train.steps=1000", "checkpoint.every=0", *stays)
    wait_for_steps(run, 1, process)
    os.kill(descendant(process.pid, victim), signal.SIGKILL)
    assert message in finish(process, status=1)


@pytest.mark.long
def test_servers_killed_in_the_middle_of_a_step_come_back_and_no_digit_changes(whole, tmp_path):
    """The only policy server, while it generates, and the judge's: both start again, the first with the weights."""
    run = tmp_path / "disturbed"
    process = start(run)
    wait_for_steps(run, 1, process)
    judge = descendant(process.pid, "judge-0.log")
    (address,) = re.findall(r"serving \S+ on (\S+)", (run / "logs" / "policy-0.log").read_text())
    while not (policy := server_info(address))["running"]:
        assert process.poll() is None, process.communicate()[0]
    os.kill(policy["pid"], signal.SIGKILL)
    os.kill(judge, signal.SIGKILL)
    output = finish(process)
    assert len(re.findall(r"holds version \d again, checksum \w+", output)) == 1
    assert timeless(run) == timeless(whole)
    steps = lines(run)[:-1]
    assert sum(line["servers/restarts"] for line in steps) == 2
    assert sum(line["servers/retries"] for line in steps) > 0
    for line in steps:
        assert line["rollout/lag_max"] == 0


@pytest.mark.long
def test_servers_are_added_and_removed_while_a_run_goes_on_and_no_digit_changes(whole, tmp_path):
    """One policy server, then two, then one; a number that the run has no room for is refused."""
    run = tmp_path / "resized"
    process = start(run, "servers.policy.max_count=2", "train.steps=100", "checkpoint.every=0", "evaluation.every=0")
    wait_for_steps(run, 1, process)
    assert "keeps ports and GPUs for 2 (servers.policy.max_count" in servers(run, 3, status=1)
    servers(run, 2)
    while not (found := re.findall(r"serving \S+ on (\S+)", read(run / "logs" / "policy-1.log"))):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    while not (second := server_info(found[0]))["served"]:
        assert process.poll() is None, process.communicate()[0]
    assert int(second["weight_version"]) > 0
    servers(run, 1)
    while psutil.pid_exists(second["pid"]):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    wait_for_steps(run, max(5, len(lines(run)) + 2), process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, status=STOPPED)
    assert re.findall(r"policy: (\d) servers from step", output) == ["2", "1"]
    alone = [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in timeless(whole)]
    assert timeless(run)[:4] == alone[:4]
    assert sum(line["servers/restarts"] + line["servers/retries"] for line in lines(run)) == 0


def servers(run: Path, policy: int, status: int = 0) -> str:
    """`fapo servers`; what it says."""
    command = [FAPO, "servers", str(run), "--policy", str(policy)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stderr
    return " ".join((result.stdout + result.stderr).split())


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.long
def test_a_judge_outside_of_the_run_gives_the_verdicts_of_one_inside(whole, tmp_path):
    """An OpenAI-compatible endpoint, here the embedded engine with the judge's model, asks for a key."""
    (tmp_path / "key").write_text("open sesame")
    judge = "configs/clock/warm-start/judge"
    options = ["context_length=256", "max_running=32", "deterministic=true", f"api_key_file={tmp_path / 'key'}"]
    with (tmp_path / "judge.log").open("w") as log:
        command = [FAPO, "serve", judge, "--port", "0", *(word for option in options for word in ("--set", option))]
        serving = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not (found := re.findall(r"is served at (\S+)", (tmp_path / "judge.log").read_text())):
            assert serving.poll() is None
            time.sleep(0.05)
        outside = f"servers.judge={{endpoint: '{found[0]}/v1', model: {judge}, api_key_env: JUDGE_KEY}}"
        os.environ["JUDGE_KEY"] = "open sesame"
        run = tmp_path / "run"
        finish(start(run, outside, "train.steps=2", "evaluation.every=0"))
    finally:
        serving.terminate()
        serving.wait()
        os.environ.pop("JUDGE_KEY", None)
    assert not list((run / "logs").glob("judge-*"))
    alone = [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in timeless(whole)]
    assert timeless(run) == alone[:2]


def server_info(address: str) -> dict:
    with urllib.request.urlopen(f"http://{address}/get_server_info", timeout=30) as answer:
        return json.load(answer)


def descendant(parent: int, mark: str) -> int:
    """The process below `parent` whose command line, or log file on standard output, has the mark."""
    for process in psutil.Process(parent).children(recursive=True):
        log = Path(f"/proc/{process.pid}/fd/1")
        if any(mark in text for text in (" ".join(process.cmdline()), str(log.resolve()))):
            return process.pid
    raise AssertionError(f"no {mark} below {parent}")
