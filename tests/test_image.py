"""The container image: locks that agree with what is asked for, and the CPU image built for real and run."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_fapo.cli.doctor_stack import SGLANG
from tests.conftest import lacking

ROOT = Path(__file__).parents[1]
PYTHONS = {"trainer": "3.12", "cpu": "3.11"}
SECRET = "a-token-that-no-layer-may-hold"


def locked(name: str) -> dict[str, str]:
    """Versions of a lock by package; every one has hashes."""
    text = (ROOT / "docker" / f"{name}.lock").read_text()
    entries = [entry.split() for entry in text.replace("\\\n", " ").splitlines() if entry and not entry.startswith("#")]
    assert all(any(word.startswith("--hash=sha256:") for word in entry) for entry in entries)
    return {canonicalize_name(name): version for name, version in (entry[0].split("==") for entry in entries)}


@pytest.mark.parametrize(("name", "python"), PYTHONS.items())
def test_locks_hold_what_the_project_asks_for(name, python):
    import tomllib

    versions = locked(name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        wanted = requirement.marker is None or requirement.marker.evaluate({"python_version": python})
        if wanted and requirement.name != "torch":
            found = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(found), f"{requirement} but {found}: run `make locks`"
    assert not [package for package in versions if package == "torch" or package.startswith("nvidia-")]


def test_sglang_is_locked_as_published_with_its_own_torch():
    versions = locked("sglang")
    assert versions["sglang"] == SGLANG
    assert {"torch", "transformers", "sglang-kernel", "flashinfer-python"} <= versions.keys()


def test_the_build_sees_nothing_but_what_the_image_holds():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert "*" in ignored
    copied = [
        word
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
        for word in line.split()[1:-1]
    ]
    assert sorted(copied) == sorted(let_in)


@pytest.fixture(scope="module")
def buildah(tmp_path_factory, require_tool) -> Iterator[Callable[..., str]]:
    """`buildah(words...)` with images and containers in a folder of its own."""
    program = require_tool("buildah")
    if os.geteuid() != 0:
        lacking("building an image with a chroot needs root")
    folder = tmp_path_factory.mktemp("images")

    def call(*words: object, **options) -> str:
        command = [program, "--root", folder / "root", "--runroot", folder / "run", *words]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout.strip()

    yield call
    call("rm", "--all")
    call("rmi", "--all", "--force")


@pytest.fixture(scope="module")
def pip_options(tmp_path_factory) -> list[str]:
    """What lets pip in the build find packages as pip does here: its wheels, certificates and cache, and a secret."""
    folder, wheels, certificates = tmp_path_factory.mktemp("pip"), os.environ.get("PIP_FIND_LINKS"), "/etc/ssl/certs"
    lines = ["[global]", f"# {SECRET}", f"cert = {certificates}/ca-certificates.crt"]
    volumes = [f"{certificates}:{certificates}:ro"]
    if wheels and Path(wheels).is_dir():
        lines.append(f"find-links = {wheels}")
        volumes.append(f"{wheels}:{wheels}:ro")
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    cache = Path.home() / ".cache" / "pip"
    cache.mkdir(parents=True, exist_ok=True)
    volumes.append(f"{cache}:/root/.cache/pip")
    return [f"--secret=id=pip,src={folder / 'pip.conf'}", *(f"--volume={volume}" for volume in volumes)]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_cpu_image_builds_and_runs_as_anybody(buildah, pip_options, require_tool, tmp_path):
    if "+cpu" not in torch.__version__:
        lacking("torch is a build with CUDA here, and the image would get the same: gigabytes")
    root = tmp_path / "debian.tar"
    packages = "--include=python3-venv,ca-certificates"
    subprocess.run([require_tool("mmdebstrap"), "--quiet", "--variant=minbase", packages, "bookworm", root], check=True)
    (tmp_path / "Base").write_text("FROM scratch\nADD debian.tar /\n")
    isolated = ("--isolation", "chroot")
    buildah("build", *isolated, "-t", "debian", "-f", tmp_path / "Base", tmp_path)
    root.unlink()
    given = {"BASE": "localhost/debian", "LOCK": "docker/cpu.lock", "TORCH": "torch==2.13.0", "SGLANG_LOCK": ""}
    arguments = [f"--build-arg={name}={value}" for name, value in given.items()]
    buildah("build", *isolated, "--network=host", "-t", "fapo", *arguments, *pip_options, ROOT)
    container = buildah("from", "fapo")

    mounted = Path(buildah("mount", container))
    assert not [path for path in ("etc/pip.conf", "root/.cache/pip") if (mounted / path).is_file()]
    searched = subprocess.run(
        ["grep", "-rlsI", SECRET, mounted / "opt" / "fapo", mounted / "etc", mounted / "work"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert searched.stdout == ""
    assert SECRET not in buildah("inspect", "fapo")

    runs = tmp_path / "runs"
    runs.mkdir()
    shutil.chown(runs, 4321, 4321)
    tmp_path.chmod(0o755)

    def run(*words: str) -> str:
        return buildah("run", *isolated, "--user=4321:4321", f"--volume={runs}:/fapo/runs", container, "--", *words)

    assert run("id", "-u") == "4321"
    findings = {finding["what"]: finding for finding in json.loads(run("fapo", "doctor", "--json").splitlines()[-1])}
    assert findings["torch"]["state"] == findings["megatron-core"]["state"] == findings["transformers"]["state"] == "ok"
    short = ("train.steps=1", "rollout.prompts_per_step=8", "batch.updates=1", "observe.console=plain")
    run("fapo", "train", "configs/clock/fapo.yaml", "--run", "runs/first", *short)
    assert len((runs / "first" / "metrics.jsonl").read_text().splitlines()) >= 1
    assert (runs / "first" / "model" / "model.safetensors").stat().st_uid == 4321
