"""The batch script that `fapo submit` writes; tests/slurm runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fapo.cluster.ray_session import QUIET

ROOT = Path(__file__).parents[2]
FAPO = str(Path(sys.executable).parent / "fapo")


def submit(*arguments: str, status: int = 0, environment: dict[str, str] | None = None) -> str:
    command = [FAPO, "submit", "configs/clock/fapo.yaml", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


def directives(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}


@pytest.fixture
def image() -> list[str]:
    return ["--nodes", "2", "policy.parallel.data=2", "--container", "registry/fapo image:1", "--dry-run"]


@pytest.mark.parametrize("extra", [[], ["--container", "image.sqsh", "--mount", "/data:/data"], ["--no-requeue"]])
def test_the_script_is_one_that_bash_can_read(tmp_path, extra):
    run = tmp_path / "a folder's run"
    script = submit("--run", str(run), "--setup", "module load slurm", "--dry-run", *extra)
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "\nmodule load slurm\n" in script
    assert not run.exists()


def test_the_users_options_become_directives():
    script = submit(
        *("--nodes", "4", "--gpus-per-node", "8", "policy.parallel.data=32", "--time", "1-00", "--partition", "h100"),
        *("--account", "lab", "--qos", "high", "--warn-before", "600", "--sbatch", "nice=100", "--dry-run"),
    )
    wanted = {"nodes=4", "gpus-per-node=8", "exclusive", "time=1-00", "partition=h100", "account=lab", "qos=high"}
    assert wanted | {"nice=100", "requeue", "signal=B:USR1@600"} <= directives(script)
    assert "--num-cpus=8" in script, "Ray gets a slot for each rank of a node"


def test_ray_is_told_what_our_own_ray_is_told():
    """Above all that ranks are no background work: at Ray's niceness of 15 they starve beside other processes."""
    script = submit("--dry-run")
    assert all(re.search(rf"^export .*\b{name}={value}\b", script, re.MULTILINE) for name, value in QUIET.items())


def test_overrides_and_paths_reach_the_run_as_they_were_typed(tmp_path):
    script = submit("--run", str(tmp_path / "it's"), "train.arm=$(id) 'x'", "--dry-run")
    line = next(line for line in script.splitlines() if "train.arm" in line)
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {line.strip().rstrip(chr(92))}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words == ["configs/clock/fapo.yaml", "train.arm=$(id) 'x'"]


def test_a_container_gets_its_image_its_mounts_and_its_own_programs(image):
    script = submit(*image, "--mount", "/data:/data")
    assert "'--container-image=registry/fapo image:1'" in script
    assert f"--container-mounts={ROOT}:{ROOT},/data:/data" in script
    assert "\n    fapo train" in script
    assert str(Path(sys.executable).parent) not in script


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "2"], "cluster.nodes = 2 does not divide the 1 ranks"),
        (["--gpus-per-node", "1", "policy.parallel.data=2"], "less than the 2 ranks"),
        (["--mount", "/data:/data"], "--mount needs --container"),
        (["--container", "image", "--mount", "/data"], "--mount /data: SOURCE:TARGET is needed"),
        (["train.stpes=3"], "did you mean 'steps'"),
        (["--time", "four hours"], "--time four hours: write it as Slurm does"),
    ],
)
def test_what_cannot_work_is_refused_before_it_waits_in_a_queue(arguments, message):
    assert message in submit(*arguments, status=1)


def test_without_slurm_it_says_so(tmp_path):
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    assert "sbatch is not on the PATH" in submit("--run", str(tmp_path / "run"), status=1, environment=environment)
