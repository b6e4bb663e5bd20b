"""What the variants of the algorithm do on the clock world: all arms of configs/clock/arms beside FAPO and GRPO.

    python examples/clock/arms.py --seeds 1 2 3 --out runs/arms
    python examples/clock/arms.py --arms right-only bad-judge --out runs/try train.steps=20

A run takes a few minutes. Started again it skips what is complete. Writes OUT/report.html, then a table: flawed share
and right answers over the last ten steps by the oracle, the step from which most flagged rollouts have a negative
advantage (the shift), and verified pass@1 and pass@8 on held-out prompts.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from quickstart import ROOT, fapo
from rich.console import Console
from rich.table import Table

from megatron_fapo.observe.runs import RunRecord, read_run
from megatron_fapo.run.folder import RunFolder

CLOCK = ROOT / "configs" / "clock"
ARMS = {
    path.stem: path for path in [CLOCK / "grpo.yaml", CLOCK / "fapo.yaml", *sorted((CLOCK / "arms").glob("*.yaml"))]
}
LAST = 10
ROLLING = 3
"""Steps that are averaged before a step counts as past the shift."""


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "arms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run")
    arguments = parser.parse_args()
    table = Table("arm", "seed", "flawed", "right", "shift at step", "verified pass@1", "verified pass@8")
    runs = []
    for arm in arguments.arms:
        for seed in arguments.seeds:
            run = RunFolder(arguments.out / f"{arm}-s{seed}")
            if not (run.model / "config.json").is_file():
                resume = ["--resume"] if run.started() else []
                fapo("train", ARMS[arm], *arguments.overrides, f"train.seed={seed}", "--run", run.path, *resume)
            runs.append(run.path)
            table.add_row(arm, str(seed), *row(read_run(run.path), held_out(run)))
    fapo("report", *runs, "--out", arguments.out / "report.html")
    Console().print(table)


def row(run: RunRecord, verified: dict[str, float]) -> list[str]:
    """The cells of a run."""
    last = [metrics for _, metrics in run.steps][-LAST:]
    shares = [mean([metrics[name] for metrics in last]) for name in ("flawed/oracle", "rollout/right_share")]
    step = shift(run)
    cells = [f"{share:.1%}" for share in shares]
    return [*cells, "–" if step is None else str(step), f"{verified['1']:.1%}", f"{verified['8']:.1%}"]


def shift(run: RunRecord) -> int | None:
    """The first of `ROLLING` steps in a row in which most flagged rollouts have a negative advantage."""
    past = [(step, values.get("flawed/negative_share", math.nan) > 0.5) for step, values in run.steps]
    rows = (past[i : i + ROLLING] for i in range(len(past) - ROLLING + 1))
    return next((row[0][0] for row in rows if all(over for _, over in row)), None)


def held_out(run: RunFolder) -> dict[str, float]:
    """Verified pass@k of the trained model by the oracle; kept beside the run."""
    kept = run.path / "held-out.json"
    if not kept.is_file():
        command = [Path(sys.executable).parent / "fapo", "eval", CLOCK / "grpo.yaml", "--model", run.model, "--json"]
        done = subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True, text=True)
        kept.write_text(done.stdout.splitlines()[-1])
    return dict(json.loads(kept.read_text())["verified_pass_at_oracle"])


def mean(values: list[float]) -> float:
    """Of some numbers."""
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
