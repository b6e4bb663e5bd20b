"""`fapo eval`: how often a model is right, and how often for the right reasons, on held-out prompts or benchmarks."""

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megatron_fapo.cli.arguments import ConfigPath, Overrides
from megatron_fapo.config import Config, read_config
from megatron_fapo.errors import ConfigError
from megatron_fapo.serving.settings import SharedSettings

if TYPE_CHECKING:
    from megatron_fapo.cluster.serve_roles import Watcher
    from megatron_fapo.records import Evaluation, Interval, Prompt

EXAMPLE = "Example: fapo eval configs/clock/fapo.yaml --model runs/fapo-s1/model evaluation.samples=16"

HELD_OUT = "held-out"
"""Name of the evaluation on the task's own held-out prompts."""


def command(
    config: ConfigPath,
    overrides: Overrides = None,
    model: Annotated[Path | None, typer.Option(help="Folder of the model. [default: servers.policy.model]")] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=SOURCE]",
            help="A benchmark instead of the held-out prompts: aime24, aime25, math500, gpqa-diamond; SOURCE is a "
            ".json, .jsonl or .parquet file, or a data set on the hub. May be given several times.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first prompts of each.", min=1)] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for every sample and result.json; started again, it goes on where it was."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON each instead of a table.")] = False,
) -> None:
    """avg@k, maj@k, pass@k, and verified pass@k (right and sound by judge, and by oracle if any), with intervals."""
    chosen = [] if model is None else [f"servers.policy.model={model}"]
    settings = read_config(config, [*(overrides or ()), *chosen])
    names = [name.partition("=")[0] for name in on or ()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--on {twice[0]} is given twice")
    for role, server in settings.started_servers():
        if not (Path(server.model) / "config.json").is_file():
            given = "--model" if role == "policy" and model is not None else f"servers.{role}.model ="
            raise ConfigError(f"{given} {server.model}: no Hugging Face model there (config.json is missing)")
    results = asyncio.run(_evaluate(settings, list(on or ()), limit, out))
    if out is not None:
        (out / "result.json").write_text(json.dumps({k: asdict(v) for k, v in results.items()}, indent=2) + "\n")
    for name, result in results.items():
        if as_json:
            typer.echo(json.dumps({"on": name, **asdict(result)}))
        else:
            Console().print(_table(name, result))
    if out is not None and not as_json:
        typer.echo(f"{out}: every sample, and result.json")


async def _evaluate(config: Config, on: list[str], limit: int | None, out: Path | None) -> "dict[str, Evaluation]":
    import tempfile

    from megatron_fapo.cluster.serve_roles import open_servers, open_task

    results = {}
    with tempfile.TemporaryDirectory(prefix="fapo-eval-") as logs:
        async with open_servers(config, Path(logs)) as servers:
            for wanted in on or [HELD_OUT]:
                name, _, source = wanted.partition("=")
                async with open_task(config, (name, source or None) if on else None) as task:
                    prompts = task.held_out(limit or (sys.maxsize if on else config.evaluation.prompts))
                    results[name] = await _one(config, name, task, servers, prompts, out)
    return results


async def _one(config: Config, name: str, task: Any, servers: Any, prompts: "list[Prompt]", out: Path | None) -> Any:
    from megatron_fapo.cluster.serve_roles import make_evaluator
    from megatron_fapo.evaluate.held_out import evaluate, evaluate_kept
    from megatron_fapo.evaluate.kept import Kept

    with ExitStack() as stack:
        kept = None
        if out is not None:
            kept = Kept(out / f"{name}.jsonl", identity(config, name, prompts), config.judge.enabled)
            stack.callback(kept.close)
        missing = [prompt for prompt in prompts if kept is None or prompt.id not in kept]
        watcher = stack.enter_context(_progress(name, len(prompts), len(missing), config.evaluation.samples))
        sampler = make_evaluator(config, task, servers, watcher)
        return await (evaluate(sampler, prompts) if kept is None else evaluate_kept(sampler, prompts, kept))


def identity(config: Config, name: str, prompts: "list[Prompt]") -> dict[str, Any]:
    """Everything that the samples of an evaluation depend on, the weights by their files' sizes and times."""
    import hashlib

    asked = "\n".join(f"{prompt.question}\t{prompt.reference_answer}" for prompt in prompts)
    values = config.model_dump(mode="json", include={"judge"})
    evaluation = config.evaluation.model_dump(mode="json", include={"samples", "temperature", "top_p"})
    models = {"policy": config.servers.policy.model}
    judge = config.servers.judge
    if config.judge.enabled and judge is not None:
        models["judge"] = models["policy"] if isinstance(judge, SharedSettings) else judge.model
    return {
        "on": name,
        "prompts": hashlib.blake2b(asked.encode(), digest_size=8).hexdigest(),
        "seed": config.train.seed,
        "max_new_tokens": config.rollout.max_new_tokens,
        **evaluation,
        **values,
        **{role: {"model": str(path), "weights": _stamp(Path(path))} for role, path in models.items()},
    }


def _stamp(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.safetensors"))
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]


@contextmanager
def _progress(name: str, prompts: int, missing: int, samples: int) -> "Iterator[Watcher]":
    """A bar on stderr, where that is a terminal, that counts samples."""
    from megatron_fapo.cluster.serve_roles import Watcher

    console = Console(stderr=True)
    if missing < prompts:
        console.print(f"{name}: {prompts - missing} of {prompts} prompts lie there already", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("samples"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=prompts * samples, completed=(prompts - missing) * samples)
        yield Watcher(landed=lambda rollouts: bar.advance(task, rollouts))


def _table(name: str, result: "Evaluation") -> Table:
    table = Table(title=f"{name}: {result.prompts} prompts, {result.samples} samples each; shares in %, 95 % intervals")
    kinds = {"right": "right_share", "sound (judge)": "sound_share_judge", "sound (oracle)": "sound_share_oracle"}
    shown = {title: metric for title, metric in kinds.items() if metric in result.intervals}
    for heading in ("", *shown):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    rows = {f"avg@{result.samples}": list(shown.values())}
    for k in result.maj_at:
        if k > 2:  # one or two votes have no majority
            rows[f"maj@{k}"] = [f"maj_at/{k}"]
    many = {"right": "pass_at", "sound (judge)": "verified_pass_at_judge", "sound (oracle)": "verified_pass_at_oracle"}
    for k in result.pass_at:
        rows[f"pass@{k}"] = [f"{many[title]}/{k}" for title in shown]
    for row, metrics in rows.items():
        table.add_row(row, *(_percent(result.intervals[metric]) for metric in metrics))
    notes = ["sound: right, and nothing wrong found in the process"] if len(shown) > 1 else []
    if result.unjudged_share:
        notes.append(
            f"{result.unjudged_share:.1%} of the right answers have no usable verdict; they count as not sound"
        )
    table.caption = "\n".join(notes)
    return table


def _percent(interval: "Interval") -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
