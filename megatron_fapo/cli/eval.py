"""`fapo eval`: how often a model is right, and how often for the right reasons, on held-out prompts."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_fapo.cli.arguments import ConfigPath, Overrides
from megatron_fapo.config import Config, read_config

if TYPE_CHECKING:
    from megatron_fapo.records import Evaluation

EXAMPLE = "Example: fapo eval configs/clock/fapo.yaml --model runs/fapo-s1/model evaluation.samples=16"


def command(
    config: ConfigPath,
    overrides: Overrides = None,
    model: Annotated[Path | None, typer.Option(help="Folder of the model. [default: servers.policy.model]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of a table.")] = False,
) -> None:
    """Held-out right share (avg@k), pass@k, and verified pass@k (right and sound by judge, and by oracle if any)."""
    chosen = [] if model is None else [f"servers.policy.model={model}"]
    result = asyncio.run(_evaluate(read_config(config, [*(overrides or ()), *chosen])))
    if as_json:
        typer.echo(json.dumps(asdict(result)))
    else:
        Console().print(_table(result))


async def _evaluate(config: Config) -> "Evaluation":
    import tempfile

    from megatron_fapo.cluster.serve_roles import make_evaluator, open_servers, open_task
    from megatron_fapo.evaluate import evaluate

    with tempfile.TemporaryDirectory(prefix="fapo-eval-") as logs:
        async with open_servers(config, Path(logs)) as servers, open_task(config) as task:
            return await evaluate(make_evaluator(config, task, servers), task.held_out(config.evaluation.prompts))


def _table(result: "Evaluation") -> Table:
    table = Table(title=f"{result.prompts} held-out prompts, {result.samples} samples each")
    for heading in ("", "right", "right and sound (judge)", "right and sound (oracle)"):
        table.add_column(heading, justify="left" if not heading else "right")
    shares = (result.right_share, result.sound_share_judge, result.sound_share_oracle)
    table.add_row(f"avg@{result.samples}", *map(_percent, shares))
    for k in result.pass_at:
        judge, oracle = result.verified_pass_at_judge, result.verified_pass_at_oracle
        row = (result.pass_at[k], judge[k] if judge else None, oracle[k] if oracle else None)
        table.add_row(f"pass@{k}", *map(_percent, row))
    if result.unjudged_share:
        table.caption = (
            f"{result.unjudged_share:.1%} of the right answers have no usable verdict; they count as not sound"
        )
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
