"""A run in stretches of ten steps: `python tools/windows.py RUN...` prints right and flawed shares by the oracle."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_fapo.observe.runs import RunRecord, read_run

WIDTH = 10


def rows(run: RunRecord) -> tuple[list[float], list[float]]:
    """Means of the right share, and of the flawed share of right answers, over each ten steps."""
    metrics = [values for _, values in run.steps]
    starts = range(0, len(metrics), WIDTH)
    return tuple(
        [sum(values[name] for values in metrics[i : i + WIDTH]) / len(metrics[i : i + WIDTH]) for i in starts]
        for name in ("rollout/right_share", "flawed/oracle")
    )


def main() -> None:
    """Print one row a run."""
    runs = [read_run(Path(path)) for path in sys.argv[1:]]
    count = max(len(rows(run)[0]) for run in runs)
    table = Table("arm", "seed", *(f"{i * WIDTH}-{i * WIDTH + WIDTH - 1}" for i in range(count)), "right, last")
    for run in runs:
        right, flawed = rows(run)
        table.add_row(run.info.arm, str(run.info.seed), *(f"{share:.1%}" for share in flawed), f"{right[-1]:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
