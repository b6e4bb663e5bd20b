"""`fapo train` as a user starts it, small: how a test starts, watches and reads a run."""

import hashlib
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

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
