"""Choose the cascade's thresholds: the policy's rollouts, the judge's score and long verdict, and the truth.

    python tools/calibrate_judge.py configs/clock/fapo.yaml --prompts 200 --max-error 0.05

The truth is the task's oracle, or the long verdict where the task has none. Half of the prompts choose the thresholds,
the other half says what they do. The last line is JSON: the thresholds, and calls, tokens and F1 with and without.
"""

import argparse
import asyncio
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_fapo.cluster.serve_roles import make_evaluator, open_servers, open_task
from megatron_fapo.config import Config, read_config
from megatron_fapo.critique.paragraphs import split
from megatron_fapo.critique.prompt import judge_prompt
from megatron_fapo.judge.answerer import Served
from megatron_fapo.judge.calibration import Outcome, Scored, outcome, thresholds
from megatron_fapo.records import Group, Judged, Verdict
from megatron_fapo.tasks.tokenizer import ChatTokenizer

CONSOLE = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Measure, choose, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-error", type=float, default=0.05)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()
    config = read_config(arguments.config, [*arguments.overrides, "judge.cascade=null", "judge.audit=null"])
    cases = asyncio.run(measure(config, arguments.prompts))
    half = len(cases) // 2
    chosen = thresholds(cases[:half], arguments.max_error)
    rows = {"long verdicts only": outcome(cases[half:], None), "cascade": outcome(cases[half:], chosen)}
    show(rows, len(cases) - half)
    without, cascade = (asdict(row) for row in rows.values())
    numbers = {"thresholds": chosen.model_dump(), "without": without, "with": cascade}
    CONSOLE.print(json.dumps(numbers), markup=False)


async def measure(config: Config, prompts: int) -> list[Scored]:
    """Right rollouts of the policy, each with score, long verdict and truth."""
    with tempfile.TemporaryDirectory(prefix="fapo-calibrate-") as logs:
        async with open_servers(config, Path(logs)) as servers, open_task(config) as task:
            sampler = make_evaluator(config, task, servers)
            groups = await sampler.sample(0, [task.prompt(index) for index in range(prompts)])
            judge = Served(servers["judge"], ChatTokenizer.load(Path(config.server("judge").model)))
            right = [(group, judged) for group in groups for judged in group if judged.outcome.right]
            return list(await asyncio.gather(*(score(judge, group, judged) for group, judged in right)))


async def score(judge: Served, group: Group, judged: Judged) -> Scored:
    """One rollout."""
    text, prompt, verdict = judged.rollout.text, group.prompt, judged.verdict
    messages = judge_prompt(prompt.question, prompt.reference_answer, text)
    p, _ = await judge.flaw_probability(f"{judged.rollout.id}-score", messages, len(split(text)))
    flagged = verdict.flawed if isinstance(verdict, Verdict) else None
    truth = bool(flagged) if judged.oracle is None else judged.oracle != -1
    return Scored(p_flawed=p, flawed=truth, flagged=flagged, tokens=verdict.tokens)


def show(rows: dict[str, Outcome], solutions: int) -> None:
    """A table for people."""
    table = Table("", "long verdicts", "tokens", "precision", "recall", "F1", title=f"{solutions} right solutions")
    for name, row in rows.items():
        shares = (f"{value:.1%}" for value in (row.precision, row.recall, row.f1))
        table.add_row(name, str(row.long_verdicts), str(row.tokens), *shares)
    CONSOLE.print(table)


if __name__ == "__main__":
    main()
