"""`fapo bench-judge`: how good a judge is on ProcessBench and FlawedPositiveBench."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_fapo.errors import ConfigError, ServerError

if TYPE_CHECKING:
    from megatron_fapo.judge.answerer import Answerer
    from megatron_fapo.judge.bench import FlawScore, Report, Row

EXAMPLE = "Example: fapo bench-judge --data data/processbench --model models/judge --out judge.jsonl"


def command(
    data: Annotated[list[str], typer.Option(help="JSON file or folder of ProcessBench rows, or a hub data set.")],
    predictions: Annotated[
        Path | None, typer.Option(help="Score this JSON-lines file (id, prediction); nothing is asked.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of the judge; served for the bench, or at --url.")] = None,
    url: Annotated[str | None, typer.Option(help="A running server of --model.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="An OpenAI-compatible endpoint, up to /v1.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name at --endpoint.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="Key for --url or --endpoint.")] = None,
    prompt: Annotated[
        Literal["fapo", "original"], typer.Option(help="With reference answer, or ProcessBench's own without.")
    ] = "fapo",
    right_only: Annotated[bool, typer.Option("--right-only", help="Ask about right answers alone.")] = False,
    out: Annotated[Path, typer.Option(help="Where predictions go; started again, it goes on.")] = Path("judge.jsonl"),
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of `judge`, or `server.KEY`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Last line of output: all scores as JSON.")] = False,
) -> None:
    """Precision, recall and F1 of "flawed" on right answers, and ProcessBench's score per subset and generator."""
    from megatron_fapo.judge.bench import read_predictions, read_rows, score

    ways = {"--predictions": predictions, "--model": model, "--endpoint": endpoint}
    if sum(way is not None for way in ways.values()) != 1:
        raise ConfigError(f"bench-judge: give exactly one of {', '.join(ways)}")
    rows = [row for row in read_rows(data) if row.answer_right or not right_only]
    if predictions is None:
        predictions = out
        key = None if api_key_file is None else api_key_file.read_text().strip()
        _ask(rows, JudgeAt(model, url, endpoint, name, key), prompt, out, settings or [])
    report = score(rows, read_predictions(predictions))
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        _show(report, f"prompt: {prompt}" if ways["--predictions"] is None else "given predictions")


class JudgeAt:
    """How a judge is reached: a folder that is served for the command, a running server, or an endpoint."""

    def __init__(
        self, model: Path | None, url: str | None, endpoint: str | None, name: str | None, key: str | None
    ) -> None:
        if endpoint is not None and name is None:
            raise ConfigError("--endpoint needs --name, the model's name there")
        self.model, self.url, self.endpoint, self.name, self.key = model, url, endpoint, name, key

    @property
    def label(self) -> str:
        """Its name in the file of predictions."""
        return self.name or str(self.model)

    @asynccontextmanager
    async def open(self, server: list[str]) -> "AsyncIterator[Answerer]":
        """The judge, ready to answer."""
        import tempfile

        from megatron_fapo.judge.answerer import OpenAI, Served
        from megatron_fapo.serving.client import ServerClient
        from megatron_fapo.serving.group import ServerGroup
        from megatron_fapo.serving.launcher import launch
        from megatron_fapo.serving.settings import ServerSettings
        from megatron_fapo.settings import build
        from megatron_fapo.tasks.tokenizer import ChatTokenizer

        async with AsyncExitStack() as stack:
            if self.endpoint is not None:
                yield await stack.enter_async_context(OpenAI(self.endpoint, self.name or "", self.key))
                return
            assert self.model is not None
            tokenizer = ChatTokenizer.load(self.model)
            if self.url is not None:
                client = await stack.enter_async_context(ServerClient(self.url, self.key))
                yield Served(ServerGroup([client]), tokenizer)
                return
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fapo-bench-")))
            chosen = build(ServerSettings, {"model": str(self.model)}, server)
            yield Served(await stack.enter_async_context(launch(chosen, "judge", logs)), tokenizer)


def _ask(rows: "list[Row]", judge: JudgeAt, form: Literal["fapo", "original"], out: Path, given: list[str]) -> None:
    from megatron_fapo.judge.bench_run import check_references, predict
    from megatron_fapo.judge.settings import JudgeSettings
    from megatron_fapo.settings import build

    check_references(rows, form)
    server = [word.removeprefix("server.") for word in given if word.startswith("server.")]
    settings: JudgeSettings = build(JudgeSettings, {}, [word for word in given if not word.startswith("server.")])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    async def work() -> int:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task(judge.label, total=len(rows))
            async with judge.open(server) as answerer:
                return await predict(
                    rows,
                    answerer,
                    settings,
                    judge=judge.label,
                    form=form,
                    out=out,
                    told=lambda more: progress.advance(bar, more),
                )

    failed = asyncio.run(work())
    if failed:
        raise ServerError(f"{failed} of {len(rows)} rows got no answer; run the command again to ask for them alone")


def _show(report: "Report", how: str) -> None:
    title = f"{report.rows} rows, {how}"
    process = Table("ProcessBench", "rows", "error", "clean", "score", title=title)
    flaw = Table("FlawedPositiveBench", "precision", "recall", "F1", "tp", "fp", "fn", "tn")
    for table in (process, flaw):
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
    for parts in (report.subsets, report.generators):
        for label, (one, other) in parts.items():
            shares = (one.error_accuracy, one.clean_accuracy, one.score)
            process.add_row(label, str(one.error_rows + one.clean_rows), *map(_percent, shares))
            if other.rows:
                flaw.add_row(label, *_flaw_cells(other))
        process.add_section()
        flaw.add_section()
    process.add_row("mean of subsets", str(report.rows), "", "", _percent(report.processbench), style="bold")
    flaw.add_row("all", *_flaw_cells(report.flawed_positive), style="bold")
    if report.unreadable:
        flaw.caption = f"{report.unreadable} verdicts could not be read: wrong in ProcessBench, no flag here"
    Console().print(process, flaw)


def _flaw_cells(flaw: "FlawScore") -> list[str]:
    counts = (flaw.true_positive, flaw.false_positive, flaw.false_negative, flaw.true_negative)
    return [*map(_percent, (flaw.precision, flaw.recall, flaw.f1)), *map(str, counts)]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
