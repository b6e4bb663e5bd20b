"""The doctor on machines that are ill on purpose: real limits, full disks, busy ports, left-over processes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fapo.cli import doctor_machine, doctor_stack
from tests.cli.test_commands import fapo
from tests.conftest import lacking

LOOK = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from megatron_fapo.cli.doctor_machine import machine
json.dump([asdict(finding) for finding in machine(Path("{run}"), {bucket}, {gpus})], sys.stdout)
"""


def look(setup: str, run: Path, bucket: int = 2**20, gpus: int = 0) -> dict[str, dict[str, str]]:
    """The machine's findings by name, in a shell after `setup`, whose mounts are its own."""
    script = LOOK.format(run=run, bucket=bucket, gpus=gpus)
    command = f'{setup}\nexec "$0" -c "$1"'
    isolated = ["unshare", "--mount"] if "mount" in setup else []
    done = subprocess.run(
        [*isolated, "bash", "-euc", command, sys.executable, script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {finding["what"]: finding for finding in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def mounts() -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        lacking("mounting a file system of one's own is not allowed here")


def test_this_environment_is_fit_for_the_clock_and_a_busy_port_is_named():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        output = fapo("doctor", "configs/clock/fapo.yaml", "--port", port, "--json", status=1)
    findings = {finding["what"]: finding for finding in json.loads(output.splitlines()[-1])}
    packages = ("python", "torch", "megatron-core", "ray", "transformers", "math-verify")
    for what in (*packages, "configuration", "temporary files", "open files"):
        assert findings[what]["state"] == "ok", findings[what]
    assert findings[f"port {port}"]["state"] == "error"
    assert findings[f"port {port}"]["advice"]
    assert [what for what, finding in findings.items() if finding["state"] == "error"] == [f"port {port}"]


def test_limits_that_are_too_low(tmp_path):
    found = look("ulimit -n 256; ulimit -u 500", tmp_path, gpus=8)
    assert found["open files"] == {
        "what": "open files",
        "state": "warning",
        "found": "256",
        "advice": "ulimit -n 65535 or more; the hard limit is 256, which an administrator raises",
    }
    assert found["processes"]["found"] == "500"
    assert found["processes"]["state"] == "warning"
    assert "locked memory" in found
    soft = look("ulimit -S -n 300", tmp_path)["open files"]
    assert (soft["state"], soft["advice"]) == ("warning", "ulimit -n 1024 or more")
    assert "locked memory" not in look("true", tmp_path)


def test_shared_memory_and_disks_that_are_full(tmp_path, mounts):
    small = f"mount -t tmpfs -o size=4m none {tmp_path}; mount -t tmpfs -o size=1m none /dev/shm"
    setup = f"{small}; mkdir {tmp_path}/tmp; export TMPDIR={tmp_path}/tmp"
    found = look(setup, tmp_path / "runs" / "new", bucket=2**20)
    for what, words in (
        ("shared memory", "publish.bucket_megabytes smaller"),
        ("disk of runs", "--run names another"),
        ("temporary files", "set TMPDIR"),
    ):
        assert found[what]["state"] == "warning", found[what]
        assert words in found[what]["advice"]
        assert "0.0 GB free" in found[what]["found"]
    roomy = look("mount -t tmpfs -o size=4m none /dev/shm", tmp_path, bucket=2**20)
    assert roomy["shared memory"]["state"] == "ok"
    locked = look(f"mount -t tmpfs -o ro none {tmp_path}", tmp_path)["disk of runs"]
    assert (locked["state"], "not writable" in locked["found"]) == ("error", True)


def test_a_ray_that_was_left_is_named(tmp_path):
    program = shutil.copy(shutil.which("sleep") or "", tmp_path / "raylet")
    left = subprocess.Popen([program, "60"])
    try:
        found = doctor_machine._ray()
    finally:
        left.kill()
        left.wait()
    assert f"raylet {left.pid}" in found.found
    assert "ray stop" in found.advice


def test_a_port_that_the_system_may_give_away():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = doctor_machine.port(port)
    assert found.state == "warning"
    assert "to anybody" in found.advice


def test_an_environment_without_sglang_and_one_that_does_not_start(tmp_path):
    (bare,) = doctor_stack.serving(sys.executable, wanted=True, trainer="")
    assert bare.state == "error"
    assert bare.advice.endswith(f"pip install sglang=={doctor_stack.SGLANG}")
    (absent,) = doctor_stack.serving(str(tmp_path / "python"), wanted=True, trainer="")
    assert (absent.state, absent.found) == ("error", "no environment")
    assert next(doctor_stack.serving(str(tmp_path / "python"), wanted=False, trainer="")).state == "ok"
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 3\n")
    broken.chmod(0o755)
    (fails,) = doctor_stack.serving(str(broken), wanted=True, trainer="")
    assert (fails.state, fails.advice) == ("error", "no such library")


def gpu_machine(**changes):
    """What `compat.installed` says on a machine with two GPUs, for the rules that no CPU machine meets."""
    gpu = {"name": "H100", "free": 78 * 2**30, "total": 80 * 2**30, "capability": [9, 0]}
    packages = dict.fromkeys(("transformer-engine", "apex"), None)
    base = {"torch": "2.12.0", "cuda": "13.2", "nccl": "2.30.7", "gpus": [gpu, gpu], "apex_kernels": True}
    return {**base, "packages": {**packages, **changes.pop("packages", {})}, **changes}


@pytest.mark.parametrize(
    ("installed", "what", "state", "words"),
    [
        (gpu_machine(), "transformer engine", "warning", "no FP8"),
        (gpu_machine(packages={"transformer-engine": "2.16.0+abc"}), "transformer engine", "ok", ""),
        (gpu_machine(packages={"transformer-engine": "2.8"}), "transformer engine", "warning", "2.9 or newer"),
        (gpu_machine(packages={"apex": "0.9"}, apex_kernels=False), "apex", "warning", "is not NVIDIA's"),
        (gpu_machine(nccl=None), "nccl", "error", "without NCCL"),
        (
            gpu_machine(gpus=[{"name": "H100", "free": 2**30, "total": 80 * 2**30, "capability": [9, 0]}]),
            "gpu 0",
            "warning",
            "79 GiB are taken",
        ),
        (gpu_machine(torch_error="ImportError: libcudart"), "torch", "error", "libcudart"),
    ],
)
def test_rules_of_gpu_machines(installed, what, state, words, monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)  # no nvidia-smi
    found = {finding.what: finding for finding in doctor_stack.training(installed)}[what]
    assert found.state == state
    assert words in found.advice


@pytest.mark.parametrize(("megatron", "said"), [("0.18.2", ["warning"]), (None, [])])
def test_megatron_beside_sglang_is_warned_of_where_memory_may_be_paused(tmp_path, megatron, said):
    packages = {"sglang": doctor_stack.SGLANG, "transformers": "5.19.0", "megatron-core": megatron}
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps(gpu_machine(packages=packages))}'\n")
    python.chmod(0o755)
    found = doctor_stack.serving(str(python), wanted=True, trainer=gpu_machine())
    assert [finding.state for finding in found if finding.what == "megatron-core beside sglang"] == said


def test_the_sglang_that_is_tested_is_the_one_that_is_installed():
    pins = (Path(__file__).parents[1] / "support" / "sglang" / "requirements.txt").read_text().splitlines()
    assert f"sglang=={doctor_stack.SGLANG}" in pins
