"""FAPO against plain GRPO on the clock world, from warm start to report.

    python examples/clock/quickstart.py                       one seed an arm, runs/quickstart/
    python examples/clock/quickstart.py --seeds 1 2 3 --out runs/results

Trains each arm with the configuration beside it in configs/clock, then writes OUT/report.html and OUT/summary.json.
Started again it skips runs that are complete and goes on with one that was interrupted.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from megatron_fapo.run.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
ARMS = ("fapo", "grpo")


def main() -> None:
    """Run what is missing, then write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run")
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        for arm in ARMS:
            run = RunFolder(arguments.out / f"{arm}-s{seed}")
            if not (run.model / "config.json").is_file():
                resume = ["--resume"] if run.started() else []
                config = ROOT / "configs" / "clock" / f"{arm}.yaml"
                fapo("train", config, *arguments.overrides, f"train.seed={seed}", "--run", run.path, *resume)
            runs.append(run.path)
    report = arguments.out / "report.html"
    fapo("report", *runs, "--out", report, "--summary", arguments.out / "summary.json")


def fapo(*arguments: object) -> None:
    """Run the command; its failure is ours."""
    command = [str(Path(sys.executable).parent / "fapo"), *map(str, arguments)]
    outcome = subprocess.run(command, cwd=ROOT, check=False)
    if outcome.returncode:
        sys.exit(outcome.returncode)


if __name__ == "__main__":
    main()
