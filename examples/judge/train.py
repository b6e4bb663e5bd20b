"""The clock's judge trained by the loop, and its F1 before and after on rollouts of a policy it has never seen.

    python examples/judge/train.py                                   runs/judge, minutes on two cores
    python examples/judge/train.py --start configs/clock/warm-start/judge --out runs/shipped-judge
    python examples/judge/train.py train.steps=20                     overrides are for the judge's training

1. Two policies are trained, of other seeds (configs/clock/fapo.yaml); all their rollouts are recorded.
2. `fapo build-critic-data` makes training rows of the first one's and a bench of the second one's, both labelled by the
   world's oracle, as many clean rows as flawed ones for training.
3. A judge that was warm-started for 800 steps only, since the 1500 of the shipped one leave little to learn.
4. `fapo train configs/judge/clock.yaml`: task critique, reward Eq. 7.
5. `fapo bench-judge` before and after: greedy verdicts, and sampled ones at the temperature of the training.

Started again it skips what is there. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_fapo.run.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
CLOCK = ROOT / "configs" / "clock" / "fapo.yaml"
TRAIN_SEED, BENCH_SEED = 1, 2
BENCH_FROM = 20
"""The bench begins at this step: before it the policy still makes its teacher's mistakes."""
WARM_START_STEPS = 800
TEMPERATURE = 1.2
"""At which configs/judge/clock.yaml trains."""


def main() -> None:
    """Data, training, bench before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "judge")
    parser.add_argument("--start", type=Path, help="folder of the judge to start from [default: a weak one is made]")
    parser.add_argument("overrides", nargs="*", help="section.key=value for the judge's training")
    arguments = parser.parse_args()
    out = arguments.out
    rows, bench = out / "critic.jsonl", out / "bench.json"
    seen, unseen = (policy(out, seed) for seed in (TRAIN_SEED, BENCH_SEED))
    if not bench.is_file():
        fapo("build-critic-data", "--run", seen, "--oracle", "--balance", "--out", rows)
        fapo(
            "build-critic-data", "--run", unseen, "--steps", f"{BENCH_FROM}:", "--oracle",
            "--rows", "processbench", "--out", bench,
        )  # fmt: skip
    start = arguments.start or weak_judge(out / "weak")
    run = RunFolder(out / "trained")
    if not (run.model / "config.json").is_file():
        resume = ["--resume"] if run.started() else []
        model = [f"policy.model={start}", f"servers.policy.model={start}"]
        fapo(
            "train", ROOT / "configs" / "judge" / "clock.yaml", f"task.train={rows}", *model, *arguments.overrides,
            "--run", run.path, *resume,
        )  # fmt: skip
    found = {}
    for temperature in (0.0, TEMPERATURE):
        for when, model in (("before", start), ("after", run.model)):
            name = f"{when}, temperature {temperature:g}"
            found[name] = score(model, bench, out / f"{when}-{temperature:g}.jsonl", temperature)
    show(found)


def policy(out: Path, seed: int) -> Path:
    """A policy's run, trained where it is missing."""
    run = RunFolder(out / f"fapo-s{seed}")
    if not (run.model / "config.json").is_file():
        fapo("train", CLOCK, f"train.seed={seed}", "--run", run.path, *(["--resume"] if run.started() else []))
    return run.path


def weak_judge(folder: Path) -> Path:
    """A judge that has learnt half of what the shipped one has."""
    made = folder / "judge"
    if not (made / "config.json").is_file():
        tool = [sys.executable, str(ROOT / "tools" / "warm_start.py"), "--only", "judge", "--out", str(folder)]
        call([*tool, f"judge.steps={WARM_START_STEPS}"])
    return made


def score(model: Path, bench: Path, predictions: Path, temperature: float) -> dict[str, Any]:
    """What `fapo bench-judge` says."""
    settings = ("server.context_length=256", "max_new_tokens=96", f"temperature={temperature}")
    options = [*(word for setting in settings for word in ("--set", setting)), "--json"]
    command = ["bench-judge", "--data", bench, "--model", model, "--out", predictions, *options]
    return dict(json.loads(fapo(*command, capture=True).splitlines()[-1]))


def fapo(*arguments: object, capture: bool = False) -> str:
    """Run the command; its failure is ours."""
    return call([str(Path(sys.executable).parent / "fapo"), *map(str, arguments)], capture)


def call(command: list[str], capture: bool = False) -> str:
    """Run a command in the repository's root; returns its output where that is captured."""
    done = subprocess.run(command, cwd=ROOT, check=False, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def show(scores: dict[str, dict[str, Any]]) -> None:
    """A table for people and a line for machines."""
    table = Table("judge", "precision", "recall", "F1", "exact index of flawed", "clean as clean", "unreadable")
    for when, found in scores.items():
        flaw, (subset,) = found["flawed_positive"], found["subsets"].values()
        process = subset["processbench"]
        shares = (flaw["precision"], flaw["recall"], flaw["f1"], process["error_accuracy"], process["clean_accuracy"])
        table.add_row(when, *(f"{share:.1%}" for share in shares), str(found["unreadable"]))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(json.dumps({when: found["flawed_positive"] for when, found in scores.items()}), markup=False)


if __name__ == "__main__":
    main()
