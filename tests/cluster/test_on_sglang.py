"""A whole run with real SGLang on the CPU: policy and judge behind routers, and a server that is killed on the way."""

import os
import signal
import subprocess

import pytest

from tests.cluster.whole_runs import FAPO, ROOT, descendant, finish, lines, wait_for_steps
from tests.conftest import lacking
from tests.serving.conformance import SGLANG


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_on_sglang_trains_and_survives_the_death_of_its_policy_server(tmp_path):
    if not SGLANG.exists():
        lacking("SGLang's environment is missing: make sglang-cpu")
    run = tmp_path / "run"
    small = ["train.steps=2", "rollout.prompts_per_step=8", "rollout.group_size=4", "batch.updates=2"]
    small += ["policy.threads=1", "evaluation.every=0", "checkpoint.every=0", "observe.report=false"]
    command = [FAPO, "train", "configs/clock/sglang.yaml", *small, "--run", str(run)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_for_steps(run, 1, process)
    os.kill(descendant(process.pid, "policy-0.log"), signal.SIGKILL)
    output = finish(process, seconds=600)
    assert "server ended with status -9" in output
    steps = lines(run)
    assert [step["step"] for step in steps] == [0, 1]
    assert [step["servers/restarts"] for step in steps] == [0, 1]
    for step in steps:
        assert step["rollout/lag_max"] == 0  # each token was drawn with the weights of its step
        assert step["mismatch/max"] < 1e-4
        assert step["train/grad_norm_max"] > 0
        assert step["judge/failed"] == 0
        assert step["judge/precision"] > 0.8  # by the oracle
        assert step["judge/recall"] > 0.8
    assert all((run / "logs" / f"{role}-router.log").exists() for role in ("policy", "judge"))
