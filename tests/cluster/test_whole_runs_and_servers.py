"""Whole runs whose servers die, come and go, or are somebody else's."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_fapo.cli.train import STOPPED
from tests.cluster.whole_runs import FAPO, ROOT, descendant, finish, lines, server_info, start, timeless, wait_for_steps


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
    """One policy server, then two, then one; a number that the run has no room for is refused. When it has stopped it
    is asked for two, and goes on with them."""
    run = tmp_path / "resized"
    given = ["servers.policy.max_count=2", "checkpoint.every=0", "evaluation.every=0"]
    process = start(run, "train.steps=100", *given)
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
    servers(run, 2)
    before = len(re.findall("serving ", read(run / "logs" / "policy-1.log")))
    output = finish(start(run, f"train.steps={len(lines(run)) + 1}", *given, "--resume"))
    assert "policy: beginning with 2 servers, as was asked for" in output
    assert len(re.findall("serving ", read(run / "logs" / "policy-1.log"))) == before + 1


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
