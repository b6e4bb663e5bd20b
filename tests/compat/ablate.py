"""Leave one patch out at a time and see what Megatron does without it. Prints {patch: what happened} as JSON.

Each attempt runs in a forked child of a process that has imported everything and started nothing.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

from megatron_fapo.batch.layout import Layout
from megatron_fapo.batch.pack import SupervisedExample, make_supervised_batch
from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.compat import megatron_cpu
from megatron_fapo.compat.device import CPU
from megatron_fapo.policy import checkpoint
from megatron_fapo.policy.rank import PolicyRank
from megatron_fapo.policy.settings import OptimizerSettings, PolicySettings
from megatron_fapo.records import ints

import dataclasses  # isort: skip


def life(rank: PolicyRank, model: str, folder: str) -> None:
    """Build, update, save; build again, load, update."""
    example = SupervisedExample(id="e", prompt_ids=ints([1, 2]), response_ids=ints([3, 4, 5]))
    batch = make_supervised_batch([example], Layout(), BatchSettings())
    settings = PolicySettings(model=Path(model), optimizer=OptimizerSettings(learning_rate=1e-2, warmup_steps=0))
    rank.setup(0, 1, *rank.address(), settings, 0)
    rank.supervised_update(batch)
    rank.save(folder)
    rank.shutdown()
    rank.setup(0, 1, *rank.address(), settings, 0)
    rank.load(folder)
    rank.supervised_update(batch)
    part = getattr(rank.model.optimizer, "chained_optimizers", [rank.model.optimizer])[0]
    steps = {float(state["step"]) for state in part.optimizer.state.values()}
    if steps != {2.0}:
        raise ArithmeticError(f"Adam counts {sorted(steps)} steps after 2")


def attempt(left_out: str, model: str) -> str:
    """What happens without one patch: "works", or the error."""
    rank = PolicyRank()
    if left_out == "P3":
        rank.device = dataclasses.replace(CPU, active=contextlib.nullcontext)
    if left_out == "P10 prepare":
        checkpoint.initialize_adam = lambda optimizer: None
    rank.device = dataclasses.replace(rank.device, install=lambda: megatron_cpu.install({left_out}))
    with tempfile.TemporaryDirectory() as folder:
        try:
            life(rank, model, folder)
        except Exception as error:  # noqa: BLE001 - any failure is the finding
            return f"{type(error).__name__}: {error}"
    return "works"


def main() -> None:
    """Run all attempts."""
    found = {}
    for left_out in sys.argv[2:]:
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, attempt(left_out, sys.argv[1]).encode()[:4000])
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            found[left_out] = answer.read()
        os.wait()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
