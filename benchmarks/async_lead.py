"""How much faster a step is when generation runs ahead: `train.max_lead` 0 against 1 on the clock run.

One cluster, whose loop is run for a few steps at a time, with and without the lead in turn; the medians are over the
steps in the middle of each window, where the lead is neither being built up nor used up. Beside them what no
lead can beat on this machine: the processor time of a step, divided by the cores, and with devices enough for both
phases side by side, the step without the shorter of them.

    python benchmarks/async_lead.py --quick --json
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from megatron_fapo.cluster.cluster import open_cluster
from megatron_fapo.cluster.serve_roles import Watcher
from megatron_fapo.config import Config, read_config
from megatron_fapo.observe.interface import StepRecord
from megatron_fapo.observe.sinks import open_sinks
from megatron_fapo.records import RunState
from megatron_fapo.run.folder import RunFolder
from megatron_fapo.train import train

ROOT = Path(__file__).parents[1]
COMMON = [
    "observe.console=off",
    "observe.report=false",
    "checkpoint.every=0",
    "policy.rescore=when_stale",
    "policy.threads=1",
]
LEAD = {0: ["train.max_lead=0"], 1: ["train.max_lead=1", "algorithm.loss.importance={}"]}


@dataclass
class Steps:
    """A sink that keeps each step's metrics, and the processor time that all processes have used by its end."""

    found: list[dict[str, float]] = field(default_factory=list)

    def write(self, record: StepRecord) -> None:
        """Keep a step."""
        self.found.append({**record.metrics, "cpu": processor_seconds()})

    def close(self) -> None:
        """Nothing is held."""


def processor_seconds() -> float:
    """Of this process and all below it."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    total = 0.0
    for process in processes:
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system
    return total


def config_of(lead: int, steps: int, extra: Sequence[str]) -> Config:
    """The clock run with this lead, up to this step."""
    path = ROOT / "configs/clock/fapo.yaml"
    return read_config(path, [*COMMON, *LEAD[lead], f"train.steps={steps}", *extra])


async def measure(pairs: int, window: int, extra: Sequence[str]) -> dict[int, list[dict[str, float]]]:
    """{lead: the steps in the middle of its windows}, the windows of both in turn."""
    middle: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as temporary:
        folder, steps = RunFolder(Path(temporary)), Steps()
        folder.create()
        config = config_of(0, 1, extra)
        with open_sinks(config.observe, folder.path, config=config.model_dump(mode="json"), extra=[steps]) as sinks:
            async with open_cluster(config, folder, Watcher(landed=sinks.progress), asyncio.Event()) as cluster:
                state = await train(config, cluster, RunState(step=0, cursor=0), sinks)
                for _ in range(pairs):
                    for lead in (0, 1):
                        steps.found.clear()
                        state = await train(config_of(lead, state.step + window, extra), cluster, state, sinks)
                        pairwise = zip(steps.found, steps.found[1:], strict=False)
                        used = [{**now, "cpu": now["cpu"] - before["cpu"]} for before, now in pairwise]
                        middle[lead] += used[:-1]
    return middle


def summary(middle: dict[int, list[dict[str, float]]]) -> dict[str, float]:
    """Medians, and what they are to be held against."""
    without, ahead = (
        {name: median(step[name] for step in steps) for name in ("time/step", "time/generate", "time/update", "cpu")}
        for steps in (middle[0], middle[1])
    )
    shorter = min(without["time/generate"], without["time/update"])
    return {
        "step_seconds_lead_0": without["time/step"],
        "step_seconds_lead_1": ahead["time/step"],
        "speedup": without["time/step"] / ahead["time/step"],
        "speedup_if_phases_overlapped_whole": without["time/step"] / (without["time/step"] - shorter),
        "speedup_if_no_core_ever_idled": without["time/step"] / (without["cpu"] / (os.cpu_count() or 1)),
        "idle_share_lead_0": 1 - without["cpu"] / (without["time/step"] * (os.cpu_count() or 1)),
        "idle_share_lead_1": 1 - ahead["cpu"] / (ahead["time/step"] * (os.cpu_count() or 1)),
        "lag_mean_lead_1": median(step["rollout/lag_mean"] for step in middle[1]),
        "lag_max_lead_1": max(step["rollout/lag_max"] for step in middle[1]),
        "steps": len(middle[0]),
    }


def main() -> None:
    """Measure and print; with --json the last line is an object of the same numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller steps: a minute and a half")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", help="settings of the run, section.key=value")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    os.chdir(ROOT)
    extra = ["rollout.prompts_per_step=16", "batch.updates=2"] if given.quick else []
    found = summary(asyncio.run(measure(3 if given.quick else 6, 5 if given.quick else 6, [*extra, *given.overrides])))
    for name, value in found.items():
        sys.stdout.write(f"{name:36} {value:.3f}\n")
    if given.json:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
