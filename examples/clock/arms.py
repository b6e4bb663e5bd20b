"""What the variants of the algorithm do on the clock world: all arms of configs/clock/arms beside FAPO and GRPO.

    python examples/clock/arms.py --seeds 1 2 3 --out runs/arms
    python examples/clock/arms.py --arms right-only bad-judge --out runs/try train.steps=20

A run takes a few minutes. Started again it skips what is complete. Writes OUT/report.html, then two tables, of the runs
and of the arms (mean ± standard deviation over seeds): flawed share and right answers over the last ten steps by the
oracle, the step from which most flagged rollouts have a negative advantage (the shift), the step from which less than
5 % of the right answers are flawed, and verified pass@1 and pass@8 on held-out prompts.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
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
SHIFT, LOW = "shift at step", "flawed < 5 % at step"
COLUMNS = ("flawed", "right", SHIFT, LOW, "verified pass@1", "verified pass@8")
LAST = 10
ROLLING = 3
"""Steps in a row that must be past the shift, or below 5 %."""


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "arms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run")
    arguments = parser.parse_args()
    runs, arms = [], {}
    for arm in arguments.arms:
        for seed in arguments.seeds:
            run = RunFolder(arguments.out / f"{arm}-s{seed}")
            if not (run.model / "config.json").is_file():
                resume = ["--resume"] if run.started() else []
                fapo("train", ARMS[arm], *arguments.overrides, f"train.seed={seed}", "--run", run.path, *resume)
            runs.append(run.path)
            arms.setdefault(arm, {})[seed] = numbers(read_run(run.path), held_out(run))
    fapo("report", *runs, "--out", arguments.out / "report.html")
    each, means = Table("arm", "seed", *COLUMNS), Table("arm", "seeds", *COLUMNS)
    for arm, found in arms.items():
        for seed, values in found.items():
            each.add_row(arm, str(seed), *(cell(name, [value]) for name, value in zip(COLUMNS, values, strict=True)))
        columns = zip(COLUMNS, zip(*found.values(), strict=True), strict=True)
        means.add_row(arm, str(len(found)), *(cell(name, values) for name, values in columns))
    Console().print(each, means)


def numbers(run: RunRecord, verified: dict[str, float]) -> tuple[float | None, ...]:
    """A run's value of each column; None where that step never comes."""
    last = [metrics for _, metrics in run.steps][-LAST:]
    shares = [statistics.mean(metrics[name] for metrics in last) for name in ("flawed/oracle", "rollout/right_share")]
    past = first_of_rows(run, "flawed/negative_share", lambda share: share > 0.5)
    low = first_of_rows(run, "flawed/oracle", lambda share: share < 0.05)
    return (*shares, past, low, verified["1"], verified["8"])


def cell(column: str, values: Sequence[float | None]) -> str:
    """The mean, and of more than one value the standard deviation; how many have none."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    form = "{:.0f}" if column in (SHIFT, LOW) else "{:.1%}"
    spread = f" ± {form.format(statistics.stdev(found))}" if len(found) > 1 else ""
    missing = f" ({len(values) - len(found)} never)" if len(found) < len(values) else ""
    return form.format(statistics.mean(found)) + spread + missing


def first_of_rows(run: RunRecord, name: str, holds: Callable[[float], bool]) -> int | None:
    """The first of `ROLLING` steps in a row in which a metric is so."""
    past = [(step, holds(values.get(name, math.nan))) for step, values in run.steps]
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


if __name__ == "__main__":
    main()
