"""Seconds of one RL step: the whole system against TRL's GRPOTrainer, and both against a bare loop.

    python benchmarks/against_trl.py [--quick] [--json] [--threads 2]

Every side trains on our `clock` task from the same warm start: 32 prompts × 8 rollouts a step, at most 64 new tokens,
4 updates of 64 rollouts, GRPO (no judge). Ours is the whole system: Ray, Megatron rank, server process, HTTP, weights
published with a checksum each step, parquet and metrics on disk. The sides run in turns, a few steps each, so that
what else the machine does falls on all of them; the ratio is the median over pairs of turns.

TRL runs in an environment of its own, .venvs/trl, made on first use.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rl_step.gate import MARK
from rl_step.workload import ROOT

TRL = ROOT / ".venvs" / "trl"
TRL_NEEDS = ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "datasets", "xxhash", "pydantic", "pyyaml")
WARM_UP = 3
DEFAULTS, NOTHING_LEFT_OUT = "megatron_fapo", "megatron_fapo, nothing left out"
OURS = {
    DEFAULTS: [],
    NOTHING_LEFT_OUT: ["batch.skip_zero_advantage=false"],
    "megatron_fapo, rescoring always": ["policy.rescore=always", "batch.skip_zero_advantage=false"],
}
BARE, PEER = "bare loop (floor)", "TRL"


class Side:
    """One side's process, taking steps when told to."""

    def __init__(self, name: str, command: list[str], threads: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.name = name
        self._log = tempfile.NamedTemporaryFile("w+", prefix="fapo-bench-", suffix=".log", delete=False)  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )

    def ready(self) -> None:
        """Wait until the side can take steps."""
        self._answer()

    def steps(self, count: int) -> dict[str, list]:
        """Take `count` steps; their seconds and notes."""
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End the process; its log stays only where it ended badly."""
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        if self._process.returncode == 0:
            Path(self._log.name).unlink()

    def _answer(self) -> dict[str, list]:
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        sys.exit(f"{self.name} ended with status {self._process.wait()}; its log: {self._log.name}")


@contextmanager
def side(name: str, command: list[str], threads: int) -> Iterator[Side]:
    """A running side."""
    running = Side(name, command, threads)
    try:
        running.ready()
        yield running
    finally:
        running.stop()


def trl_python() -> Path:
    """The interpreter of TRL's environment, made when it is missing."""
    python = TRL / "bin" / "python"
    if not (TRL / ".installed").exists():
        Console(stderr=True).print(f"making {TRL} for TRL (once, a minute or two)")
        venv.create(TRL, with_pip=True, clear=True)
        for part in (TRL_NEEDS[:1], TRL_NEEDS):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *part], check=True)
        (TRL / ".installed").touch()
    return python


def measure(threads: int, turns: int, steps: int) -> dict[str, list[list[dict]]]:
    """{side: [turn: [step: seconds and notes]]}, the sides taking turns."""
    here = Path(__file__).parent / "rl_step"
    commands = {PEER: [str(trl_python()), str(here / "trl_side.py"), str(threads)]}
    commands[BARE] = [sys.executable, str(here / "bare_side.py"), str(threads)]
    for name, overrides in OURS.items():
        commands[name] = [sys.executable, str(here / "our_side.py"), str(threads), *overrides]
    with ExitStack() as stack:
        sides = [stack.enter_context(side(name, command, threads)) for name, command in commands.items()]
        for one in sides:
            one.steps(WARM_UP)
        results: dict[str, list[list[dict]]] = {name: [] for name in commands}
        for turn in range(turns):
            for one in sides if turn % 2 == 0 else reversed(sides):
                answer = one.steps(steps)
                rows = zip(answer["seconds"], answer["notes"], strict=True)
                results[one.name].append([{"seconds": seconds, **notes} for seconds, notes in rows])
    return results


def summarise(results: dict[str, list[list[dict]]]) -> dict:
    """Medians by side, and ratios to TRL as medians over pairs of turns.

    `ratio` is that of our defaults, which leave rows without advantage out of the update; their gradient is zero.
    """
    seconds = {
        name: [statistics.median(step["seconds"] for step in turn) for turn in turns] for name, turns in results.items()
    }
    rows = {}
    for name, turns in results.items():
        pairs = [peer / own for peer, own in zip(seconds[PEER], seconds[name], strict=True)]
        every = [step for turn in turns for step in turn]
        rows[name] = {
            "seconds": statistics.median(seconds[name]),
            "tokens": statistics.mean(step["tokens"] for step in every),
            "ratio": statistics.median(pairs),
            "ratio_low": min(pairs),
            "ratio_high": max(pairs),
        }
    ours = [step for turn in results[DEFAULTS] for step in turn]
    phases = {name: statistics.median(step["phases"][name] for step in ours) for name in ours[0]["phases"]}
    phases["step"] = statistics.median(step["seconds"] for step in ours)
    ratios = {"ratio": rows[DEFAULTS]["ratio"], "ratio_nothing_left_out": rows[NOTHING_LEFT_OUT]["ratio"]}
    return {**ratios, "phases": phases, "rows": rows}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns: a minute or two beside the start")
    parser.add_argument("--json", action="store_true", help="a last line of JSON")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    turns, steps = (5, 4) if arguments.quick else (9, 8)
    summary = summarise(measure(arguments.threads, turns, steps))
    table = Table("side", "s a step", "tokens a step", "TRL over it", "lowest", "highest")
    for name, row in summary["rows"].items():
        numbers = (f"{row[key]:.2f}" for key in ("ratio", "ratio_low", "ratio_high"))
        table.add_row(name, f"{row['seconds']:.3f}", f"{row['tokens']:.0f}", *numbers)
    console = Console()
    console.print(table)
    console.print({name: round(value, 3) for name, value in summary["phases"].items()})
    if arguments.json:
        sys.stdout.write(json.dumps({**summary, "threads": arguments.threads, "turns": turns, "steps": steps}) + "\n")


if __name__ == "__main__":
    main()
