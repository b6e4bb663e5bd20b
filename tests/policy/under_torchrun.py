"""A data-parallel rank under torchrun: three updates. Rank 0 prints its device and its updates as a line of JSON."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_fapo.policy.rank import PolicyRank
from tests.policy.lives import LOSS, policy_settings, step_batch


def main(model: Path) -> None:
    """torchrun's own store is where the ranks meet."""
    number, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rank = PolicyRank()
    meet = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    layout = rank.setup(number, world, *meet, policy_settings(model, data=world), 5)
    updates = [dataclasses.asdict(rank.update(step_batch(step, layout), LOSS).updates[0]) for step in range(3)]
    rank.shutdown()
    if number == 0:
        sys.stdout.write(json.dumps({"device": rank.device.name, "updates": updates}) + "\n")


def run(model: Path, ranks: int, **environment: str) -> dict[str, Any]:
    """What rank 0 of so many says."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    loopback = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    done = subprocess.run(
        [*torchrun, *loopback, "-m", "tests.policy.under_torchrun", str(model)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


if __name__ == "__main__":
    main(Path(sys.argv[1]))
