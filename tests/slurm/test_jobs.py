"""`fapo submit` on a real Slurm of two nodes: submitted, out of time, queued again, resumed, preempted, finished."""

import re
import time
from pathlib import Path

import pytest

from tests.cluster.whole_runs import FAPO, ROOT, lines

RUN = [
    "configs/clock/fapo.yaml",
    "policy.parallel.data=2",
    "servers.policy.count=2",
    "train.deterministic=true",
    "train.steps=5",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "batch.updates=2",
    "policy.threads=1",
    "checkpoint.every=2",
    "evaluation.every=0",
    "observe.report=false",
    "servers.policy.max_running=32",
    "servers.judge.max_running=32",
]

SIZE = ["--nodes", "2", "--cpus-per-task", "4", "--time", "30"]


def outcome(run: Path) -> list[dict]:
    """The metrics without what the clock and the placement have a say in."""
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines(run)]


def nodes_of_policy_servers(run: Path) -> set[str]:
    said = "".join(path.read_text() for path in run.glob("logs/policy-*.log"))
    return set(re.findall(r"serving .* on ([0-9.]+):\d+", said))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_job_that_is_interrupted_twice_gives_the_metrics_of_one_that_is_not(pair, tmp_path):
    """Nor does it matter that its servers take turns with the ranks on both nodes, and get weights in a group."""
    calm, busy = tmp_path / "calm", tmp_path / "busy"
    job = Job(pair, calm, "split")
    job.until(lambda: job.state() == "", "the job ends")
    assert "the run ended with status 0" in job.log(), job.log()
    assert len(lines(calm)) == 5

    job = Job(pair, busy, "colocated")
    job.until(lambda: len(lines(busy)) >= 1, "a first step")
    pair.run("scancel", "--batch", "--signal=USR1", job.id)  # what Slurm does when time is nearly up
    job.until(lambda: "queued again" in job.log(), "the job queues itself again")
    saved = len(lines(busy))
    job.start_now()
    job.until(lambda: len(lines(busy)) > saved, "the first step after it")
    pair.run(
        "scontrol", "requeue", job.id
    )  # what Slurm does when it preempts: all of it dies, the newest checkpoint stays
    job.until(lambda: job.state() == "PENDING", "the job is out")
    job.start_now()
    job.until(lambda: job.state() == "", "the job ends")
    assert "[restart 2] the run ended with status 0" in job.log(), job.log()
    assert outcome(busy) == outcome(calm)
    assert nodes_of_policy_servers(calm) == {"127.0.0.1"}
    assert nodes_of_policy_servers(busy) == {"10.77.0.1", "10.77.0.2"}
    assert [p.name for p in sorted(busy.glob("logs/slurm-*"))] == [f"slurm-{job.id}-{n}" for n in range(3)]
    ranks = "".join(p.read_text() for p in busy.glob(f"logs/slurm-{job.id}-2/*/worker-*"))
    assert "policy-rank-0" in ranks
    assert "policy-rank-1" in ranks


class Job:
    """A submitted run."""

    def __init__(self, pair, run: Path, placement: str) -> None:
        self.pair, self.run = pair, run
        placed = f"cluster.placement={placement}"
        command = [FAPO, "submit", *RUN, placed, *SIZE, "--run", str(run)]
        said = pair.run(*command, cwd=ROOT, environment={"OMP_NUM_THREADS": "1"})
        self.id = said.split()[1].rstrip(":")

    def log(self) -> str:
        path = self.run / f"slurm-{self.id}.log"
        return path.read_text() if path.exists() else ""

    def state(self) -> str:
        """Of the job; empty when it is no longer queued."""
        return self.pair.run("squeue", "-h", "-t", "PD,R,CG", "-j", self.id, "-o", "%T").strip()

    def until(self, condition, what: str) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            gone = not self.state() and not condition()
            assert not gone, f"the job is gone; waited for: {what}\n{self.log()}\n{self.pair.said()}"
            assert time.monotonic() < deadline, f"waited for: {what}\n{self.log()}\n{self.pair.said()}"
            time.sleep(0.3)

    def start_now(self) -> None:
        """Slurm holds a job that was queued again for two minutes; skip most of that."""
        self.until(lambda: self.state() == "PENDING", "the job waits")
        time.sleep(3)  # within the same second the nodes would take it for the job that has just ended
        self.pair.run("scontrol", "update", f"JobId={self.id}", "StartTime=now")
