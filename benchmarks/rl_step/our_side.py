"""The whole system as `fapo train` runs it: Ray, Megatron, server process, all sinks; one more sink is the gate."""

import asyncio
import logging
import sys
import tempfile
from pathlib import Path

from gate import Gate
from workload import CONFIG, ROOT

from megatron_fapo.cluster.cluster import open_cluster
from megatron_fapo.cluster.serve_roles import Watcher
from megatron_fapo.config import read_config
from megatron_fapo.observe.interface import StepRecord
from megatron_fapo.observe.sinks import open_sinks
from megatron_fapo.records import RunState
from megatron_fapo.run.folder import RunFolder
from megatron_fapo.train import train

PHASES = ("publish", "generate", "update")
"""Of the step as a whole the gate's own clock tells: the loop's would count the other sides' turns as well."""


class GateSink:
    """A sink that ends the measured step and waits for the next order; it stops the run when there is none."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.stop = asyncio.Event()

    def write(self, record: StepRecord) -> None:
        """Close the step with its tokens and phases, open the next."""
        seconds = {name: record.metrics.get(f"time/{name}", 0.0) for name in PHASES}
        tokens = sum(len(judged.rollout.token_ids) for group in record.groups for judged in group)
        self.gate.after_step(tokens=tokens, phases=seconds)
        if not self.gate.before_step():
            self.stop.set()

    def close(self) -> None:
        """Nothing is held."""


async def main(threads: int, overrides: list[str]) -> None:
    """Train until the input ends."""
    quiet = ["observe.console=off", "observe.report=false", "checkpoint.every=0", "train.steps=100000"]
    config = read_config(CONFIG, [f"policy.threads={threads}", *quiet, *overrides])
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(Path(temporary))
        folder.create()
        gate = GateSink(Gate())
        with open_sinks(config.observe, folder.path, config=config.model_dump(mode="json"), extra=[gate]) as sinks:
            watcher = Watcher(landed=sinks.progress, judged=sinks.judged)
            async with open_cluster(config, folder, watcher, gate.stop) as cluster:
                if gate.gate.before_step():
                    await train(config, cluster, RunState(step=0, cursor=0), sinks)


if __name__ == "__main__":
    import os

    os.chdir(ROOT)
    logging.disable(logging.WARNING)
    asyncio.run(main(int(sys.argv[1]), sys.argv[2:]))
