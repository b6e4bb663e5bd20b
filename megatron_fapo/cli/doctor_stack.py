"""What `fapo doctor` says of software: Python, packages against the tested set, the GPU stack, SGLang's environment."""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from megatron_fapo.cli.finding import Finding

SGLANG = "0.5.23"
"""The version that the server tests run against (tests/support/sglang/requirements.txt)."""
TRANSFORMER_ENGINE = "2.9"
"""The oldest that megatron-core allows."""
DRIVER = 580
"""The oldest driver branch for CUDA 13."""
LEFTOVER = 2 * 2**30
"""Memory on a GPU that is taken before anything of ours runs."""
SECONDS = 120
"""For an environment to import torch."""

Installed = Mapping[str, Any]


def packages() -> Iterator[Finding]:
    """Python and every dependency against what this package asks for."""
    python = platform.python_version()
    supported = sys.version_info[:2] in ((3, 11), (3, 12))
    yield Finding.of("python", python, error="" if supported else "Python 3.11 or 3.12 is needed")
    for line in requires("megatron-fapo") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding.of(requirement.name, "missing", error=f"pip install '{requirement}'")
            continue
        fits = requirement.specifier.contains(found.partition("+")[0], prereleases=True)
        advice = "" if fits else f"tested with {requirement.specifier}"
        if requirement.name == "torch" and ".nv" in found:
            advice = ""  # NVIDIA's own build, which the image's base comes with
        yield Finding.of(requirement.name, found, warning=advice)


def ask(python: str) -> Installed | str:
    """What the environment of a Python has of the GPU stack, or why it cannot say."""
    script = find_spec("megatron_fapo.compat.installed")
    assert script is not None
    assert script.origin is not None
    try:
        done = subprocess.run(
            [python, "-P", script.origin], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else (done.stderr.strip() or "no answer")[-300:]


def training(installed: Installed | str) -> Iterator[Finding]:
    """GPUs, and what training wants beside them, as torch sees them."""
    if isinstance(installed, str):
        yield Finding.of("torch", "no answer", error=f"it cannot be asked: {installed}")
        return
    if broken := installed.get("torch_error"):
        yield Finding.of("torch", "cannot be imported", error=broken)
        return
    yield from _driver()
    gpus = installed["gpus"]
    if not gpus:
        yield Finding.of("gpu", f"none that torch {installed['torch']} sees: runs train on the CPU")
        return
    for index, gpu in enumerate(gpus):
        taken = gpu["total"] - gpu["free"]
        yield Finding.of(
            f"gpu {index}",
            f"{gpu['name']}, {gpu['free'] / 2**30:.0f} of {gpu['total'] / 2**30:.0f} GiB free",
            warning=f"{taken / 2**30:.0f} GiB are taken: end what an earlier job left (nvidia-smi names it)"
            if taken > LEFTOVER
            else "",
        )
    nccl = installed["nccl"]
    yield Finding.of("nccl", nccl or "missing", error="" if nccl else "torch was built without NCCL")
    yield from _engine_layers(installed)


def _driver() -> Iterator[Finding]:
    if which("nvidia-smi") is None:
        return
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        reason = (done.stdout.strip() or done.stderr.strip())[:200]
        yield Finding.of("gpu driver", "no answer", error=f"nvidia-smi says: {reason}")
        return
    driver = done.stdout.split()[0]
    old = int(driver.partition(".")[0]) < DRIVER
    yield Finding.of("gpu driver", driver, warning=f"CUDA 13 wants branch {DRIVER} or newer: update it" if old else "")


def _engine_layers(installed: Installed) -> Iterator[Finding]:
    engine, apex = installed["packages"]["transformer-engine"], installed["packages"]["apex"]
    if engine is None:
        advice = "layers of plain torch, no FP8: pip install 'transformer-engine[pytorch,core_cu13]', or NGC's image"
    else:
        old = Version(engine.partition("+")[0]) < Version(TRANSFORMER_ENGINE)
        advice = f"megatron-core wants {TRANSFORMER_ENGINE} or newer" if old else ""
    yield Finding.of("transformer engine", engine or "missing", warning=advice)
    if installed["apex_kernels"]:
        yield Finding.of("apex", apex or "built in")
    elif apex is not None:
        yield Finding.of(
            "apex",
            f"{apex}, without its kernels",
            warning="the package index's apex is not NVIDIA's: pip uninstall apex",
        )
    elif engine is None:
        yield Finding.of("apex", "missing", warning="fused Adam and norms come with it or with Transformer Engine")


def serving(python: str, wanted: bool, trainer: Installed | str) -> Iterator[Finding]:
    """SGLang's environment; where it is not `wanted`, its absence is no fault."""
    path = which(python)
    if path is None:
        advice = f"no {python}: `make sglang-cpu` makes one for the CPU, the image has one (docs/docker.md)"
        yield Finding.of("sglang", "no environment", error=advice if wanted else "")
        return
    installed = ask(path)
    if isinstance(installed, str) or "torch_error" in installed:
        reason = installed if isinstance(installed, str) else installed["torch_error"]
        yield Finding.of("sglang", f"{python} fails", error=reason)
        return
    found = installed["packages"]["sglang"]
    if found is None:
        yield Finding.of("sglang", f"not in {python}", error=f"{python} -m pip install sglang=={SGLANG}")
        return
    yield Finding.of(
        "sglang",
        f"{found} with torch {installed['torch']} and transformers {installed['packages']['transformers']}",
        warning="" if found == SGLANG else f"tested with {SGLANG}",
    )
    if isinstance(trainer, str) or not trainer["gpus"]:
        return
    if megatron := installed["packages"]["megatron-core"]:
        yield Finding.of(
            "megatron-core beside sglang",
            megatron,
            warning="it switches torch_memory_saver to a hook that cannot pause CUDA graphs: keep it out of there, or "
            "add --disable-cuda-graph to servers.ROLE.sglang.arguments where placement is colocated",
        )
    if installed["nccl"] != trainer["nccl"]:
        yield Finding.of(
            "nccl of sglang",
            installed["nccl"] or "missing",
            warning=f"training has {trainer['nccl']}: weights that travel by NCCL want the same on both sides",
        )


def environment_of(python: str | None) -> str:
    """The Python of SGLang's environment: the one that is named, or where the image or the checkout has it."""
    if python is not None:
        return python
    return "sglang-python" if which("sglang-python") else str(Path(".venvs/sglang/bin/python"))
