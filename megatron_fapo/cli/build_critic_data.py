"""`fapo build-critic-data`: the judge's training data, from rollouts of several policies."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_fapo.cli.bench_judge import JudgeAt
from megatron_fapo.config import Config, read_config
from megatron_fapo.errors import ConfigError, DataError, ServerError

if TYPE_CHECKING:
    from megatron_fapo.judge.critic_data import CriticData, Labels, Solution

EXAMPLE = (
    "Example: fapo build-critic-data --run runs/7b --policy models/other-7b --config configs/math.yaml "
    "--model models/Qwen3-32B --balance --out data/critic.jsonl"
)
PROMPTS_AT_ONCE = 64
"""Prompts that are sampled between two writes to disk."""


def command(
    out: Annotated[Path, typer.Option(help="Where the rows go; what was sampled and labelled stays beside it.")],
    run: Annotated[list[Path] | None, typer.Option(help="A run folder: its recorded rollouts. Repeatable.")] = None,
    steps: Annotated[str, typer.Option(metavar="FIRST:END", help="Of the runs, these steps alone.")] = ":",
    policy: Annotated[
        list[Path] | None, typer.Option(help="A model to sample from, on --config's prompts. Repeatable.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="For --policy: task, sampling and servers.")] = None,
    prompts: Annotated[int, typer.Option(help="For --policy: prompts of the training stream.")] = 256,
    samples: Annotated[int, typer.Option(help="For --policy: solutions a prompt.")] = 4,
    oracle: Annotated[bool, typer.Option("--oracle", help="Label by the task's oracle; nobody is asked.")] = False,
    model: Annotated[Path | None, typer.Option(help="Folder of the labeller; served, or at --url.")] = None,
    url: Annotated[str | None, typer.Option(help="A running server of --model.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="An OpenAI-compatible endpoint, up to /v1.")] = None,
    name: Annotated[str | None, typer.Option(help="The labeller's name at --endpoint.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="Key for --url or --endpoint.")] = None,
    labels: Annotated[int, typer.Option(help="Labels a solution, which must agree.")] = 3,
    limit: Annotated[int | None, typer.Option(help="Label at most so many solutions, drawn at random.")] = None,
    balance: Annotated[bool, typer.Option("--balance", help="As many clean rows as flawed ones.")] = False,
    rows: Annotated[
        Literal["critic", "processbench"], typer.Option(help="For task critique (JSON lines), or for bench-judge.")
    ] = "critic",
    seed: Annotated[int, typer.Option(help="Of draws, order and the labeller's sampling.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of `judge`, or `server.KEY`, for the labeller."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Last line of output: the counts as JSON.")] = False,
) -> None:
    """Right solutions of runs and models, labelled several times and kept where all labels agree.

    Started again with the same options it goes on with what is missing.
    """
    from megatron_fapo.judge import critic_data

    if not run and not policy:
        raise ConfigError("build-critic-data: name rollouts (--run), models (--policy), or both")
    if sum((oracle, model is not None, endpoint is not None)) != 1:
        raise ConfigError("build-critic-data: give exactly one of --oracle, --model, --endpoint")
    dropped: Counter[str] = Counter()
    found: list[Solution] = []
    for folder in run or ():
        recorded = critic_data.recorded(folder, _steps(steps))
        found += critic_data.solutions_of(recorded, folder.name, dropped)
    for folder in policy or ():
        if config is None:
            raise ConfigError("build-critic-data: --policy needs --config, which says what is asked and how")
        found += asyncio.run(
            _sampled(read_config(config), folder, prompts, samples, _beside(out, "solutions"), dropped)
        )
    found = critic_data.draw(found, limit, seed, dropped)
    if oracle:
        agreed: Labels = critic_data.oracle_labels(found)
    else:
        key = None if api_key_file is None else api_key_file.read_text().strip()
        judge = JudgeAt(model, url, endpoint, name, key)
        agreed = _ask(found, judge, labels, settings or [], _beside(out, "labels"), seed)
    data = critic_data.assemble(found, agreed, balance=balance, seed=seed, dropped=dropped)
    if not data.rows:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        raise DataError(f"{out} is not written, no solution is left: {why or 'no rollouts in the named steps'}")
    _write(out, data.critic() if rows == "critic" else data.bench(), lines=rows == "critic")
    _tell(data, out, as_json)
    missing = sum(solution.id not in agreed for solution in found)
    if missing:
        raise ServerError(f"{missing} solutions got no answer; run the command again to ask about them alone")


def _steps(text: str) -> range:
    first, colon, end = text.partition(":")
    try:
        return range(int(first or 0), int(end or 10**9)) if colon else range(int(first), int(first) + 1)
    except ValueError:
        raise ConfigError(f"--steps {text!r}: write it as FIRST:END, either may be empty, or as one step") from None


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.stem}.{what}.jsonl")


async def _sampled(
    config: Config, model: Path, prompts: int, samples: int, kept: Path, dropped: Counter[str]
) -> "list[Solution]":
    """Right answers of a model; each part of the prompts is written to `kept` and not sampled again."""
    import tempfile

    from megatron_fapo.cluster.serve_roles import Watcher, make_sampler, open_servers, open_task
    from megatron_fapo.judge.critic_data import Solution, solutions_in

    source = str(model)
    chosen = config.changed(
        rollout=config.rollout.changed(group_size=samples, dynamic_sampling=0).model_dump(),
        judge=config.judge.changed(enabled=False).model_dump(),
        servers={**config.servers.model_dump(), "policy": config.servers.policy.changed(model=str(model)).model_dump()},
    )
    how = {"model": source, "samples": samples, "seed": config.train.seed}
    done = [part for part in _lines(kept) if part["how"] == how]
    start = sum(part["prompts"] for part in done)
    with _bar(f"sampling {model.name}", prompts) as told, tempfile.TemporaryDirectory(prefix="fapo-critic-") as logs:
        told(min(start, prompts))
        if start < prompts:
            async with open_servers(chosen, Path(logs)) as servers, open_task(chosen) as task:
                sampler = make_sampler(chosen, task, servers, Watcher())
                for first in range(start, prompts, PROMPTS_AT_ONCE):
                    wanted = range(first, min(first + PROMPTS_AT_ONCE, prompts))
                    groups = await sampler.sample(0, [task.prompt(index) for index in wanted])
                    right, lost = solutions_in(groups, source)
                    done.append({"how": how, "prompts": len(wanted), "right": [*map(asdict, right)], "dropped": lost})
                    _append(kept, done[-1])
                    told(len(wanted))
    for part in done:
        dropped.update(part["dropped"])
    return [Solution(**solution) for part in done for solution in part["right"]]


def _ask(solutions: "list[Solution]", judge: JudgeAt, labels: int, given: list[str], kept: Path, seed: int) -> "Labels":
    from megatron_fapo.judge.critic_data import ask_labels, read_labels
    from megatron_fapo.judge.settings import JudgeSettings
    from megatron_fapo.settings import build

    server = [word.removeprefix("server.") for word in given if word.startswith("server.")]
    sampling = {"votes": labels, "temperature": 0.6 if labels > 1 else 0.0, "top_p": 0.95}
    settings = build(JudgeSettings, sampling, [word for word in given if not word.startswith("server.")])
    known = read_labels(kept, judge.label, labels)
    if all(solution.id in known for solution in solutions):
        return known

    async def work() -> "Labels":
        with _bar(f"labelling by {judge.label}", len(solutions)) as told:
            async with judge.open(server) as labeller:
                return await ask_labels(solutions, labeller, settings, name=judge.label, out=kept, seed=seed, told=told)

    return asyncio.run(work())


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda more: progress.advance(bar, more)


def _lines(path: Path) -> list[Any]:
    """The whole lines of a JSON-lines file; a line cut by the end of an earlier call goes."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    if found:
        path.write_text("".join(json.dumps(value) + "\n" for value in found))
    return found


def _append(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def _write(out: Path, rows: list[dict[str, Any]], *, lines: bool) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))
    part.replace(out)


def _tell(data: "CriticData", out: Path, as_json: bool) -> None:
    counts = {"rows": len(data.rows), "clean": data.clean, "flawed": len(data.rows) - data.clean}
    if as_json:
        typer.echo(json.dumps({**counts, "dropped": data.dropped}))
        return
    table = Table("solutions", "", title=str(out))
    table.columns[1].justify = "right"
    for what, count in counts.items():
        table.add_row(what, str(count), style="bold")
    table.add_section()
    for reason, count in sorted(data.dropped.items(), key=lambda item: -item[1]):
        table.add_row(f"dropped: {reason}", str(count))
    Console().print(table)
