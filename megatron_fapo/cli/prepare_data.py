"""`fapo prepare-data`: rows of any source into clean training rows."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_fapo.errors import ConfigError, DataError
from megatron_fapo.tasks import rows
from megatron_fapo.tasks.benchmarks import BENCHMARKS
from megatron_fapo.tasks.prepare import Drop, Overlap, Prepared, prepare
from megatron_fapo.tasks.tokenizer import ChatTokenizer

EXAMPLE = (
    "Example: fapo prepare-data problems.jsonl --model models/Qwen2.5-32B --against aime24 --out data/train.parquet"
)
NAMED = 20
"""Bad rows that an error names."""
SEPARATOR = "\n\nAnswer:"


def command(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="A .jsonl, .json or .parquet file, a data set of the hub, or NAME of NAME.idx."
        ),
    ],
    model: Annotated[Path, typer.Option(help="Folder with the tokenizer and chat template of the model to train.")],
    out: Annotated[Path, typer.Option(help="File to write, .parquet or .jsonl.")],
    task: Annotated[Literal["math", "critique"], typer.Option(help="What the rows are for.")] = "math",
    config: Annotated[str, typer.Option(help="Configuration of a hub data set.")] = "all",
    column: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="Read a column under another name.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help=f"Benchmark to stay apart from: {', '.join(BENCHMARKS)}, or a file. Repeatable."),
    ] = None,
    words: Annotated[int, typer.Option(min=3, help="Shared words in a row that count as overlap.")] = 13,
    near: Annotated[float, typer.Option(min=0.5, max=1.0, help="Likeness from which rows are duplicates.")] = 0.8,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer prompts are left out.")] = 2048,
    source_model: Annotated[
        Path | None, typer.Option(help="Tokenizer of a Megatron data set. [default: --model]")
    ] = None,
    separator: Annotated[
        str, typer.Option(help="Text between problem and answer in a Megatron document of one sequence.")
    ] = SEPARATOR,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be read.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Last line of output: the counts as JSON.")] = False,
) -> None:
    """Read rows, name the bad ones, drop duplicates and what benchmarks ask, and write training rows.

    What was dropped, and why, is in OUT.dropped.jsonl.
    """
    if out.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"--out {out}: name a .parquet or .jsonl file")
    tokenizer = ChatTokenizer.load(model)
    benchmarks = Overlap(words)
    for name in against or ():
        _add(benchmarks, name)
    unreadable: list[Drop] = []

    def bad(place: str, why: str) -> None:
        unreadable.append(Drop(place=place, kind="bad", why=why))

    found: list[tuple[str, rows.Row]] = []
    for source in sources:
        if Path(f"{source}.idx").is_file():
            decoder = tokenizer if source_model is None else ChatTokenizer.load(source_model)
            found += _indexed(Path(source), decoder, separator)
        else:
            found += rows.read(source, config, bad=bad)
    with _progress() as bar:
        shown = bar.add_task("rows", total=len(found))
        result = prepare(
            _renamed(found, column or ()),
            task,
            tokenizer,
            near=near,
            benchmarks=benchmarks,
            max_tokens=max_prompt_tokens,
            done=lambda: bar.advance(shown),
        )
    result.drops = unreadable + result.drops
    _refuse_bad(result, skip_bad)
    if not result.items:
        raise DataError(f"no row is left of {len(found)}: {dict(Counter(drop.kind for drop in result.drops))}")
    _write(result, out)
    _report(result, out, as_json)


def _add(benchmarks: Overlap, name: str) -> None:
    known = BENCHMARKS.get(name)
    found = rows.read(known.source, known.config, known.split) if known else rows.read(name)
    for place, row in found:
        try:
            benchmarks.add(place, row)
        except ValueError as error:
            raise DataError(f"--against {name}: {place}: no question: {error}") from None


def _renamed(found: Iterable[tuple[str, rows.Row]], columns: Sequence[str]) -> Iterator[tuple[str, rows.Row]]:
    """Rows whose columns have the names that the tasks read. Raises ConfigError for what is no OURS=THEIRS."""
    names = dict(column.split("=", 1) for column in columns if "=" in column)
    if len(names) != len(columns):
        raise ConfigError("--column: write it as OURS=THEIRS, as in problem=question_text")
    for place, row in found:
        yield place, {**row, **{ours: row[theirs] for ours, theirs in names.items() if theirs in row}}


def _indexed(prefix: Path, tokenizer: ChatTokenizer, separator: str) -> Iterator[tuple[str, rows.Row]]:
    """Documents of a Megatron data set: two sequences, or one that `separator` cuts, are problem and answer."""
    from megatron_fapo.compat.indexed import documents

    for number, sequences in enumerate(documents(prefix), start=1):
        texts = [tokenizer.decode(sequence).strip() for sequence in sequences]
        if len(texts) == 1:
            texts = texts[0].split(separator, 1)
        place = f"{prefix}.idx, document {number}"
        if len(texts) != 2:
            yield place, {"document": texts[0] if texts else ""}
            continue
        problem, answer = (text.strip() for text in texts)
        yield place, {"problem": problem, "solution" if "\\boxed{" in answer else "answer": answer}


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def _refuse_bad(result: Prepared, skip_bad: bool) -> None:
    """Name the rows that are none. Raises DataError unless they are to be left out."""
    bad = [f"{drop.place}: {drop.why}" for drop in result.drops if drop.kind == "bad"]
    if bad and not skip_bad:
        more = f"\nand {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        listed = "\n".join(bad[:NAMED])
        mend = "--skip-bad leaves them out, --column OURS=THEIRS reads a column of another name"
        raise DataError(f"{len(bad)} rows cannot be used; {mend}:\n{listed}{more}")


def _write(result: Prepared, out: Path) -> None:
    """The rows, and what was dropped; the file appears when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    written = [item.row for item in result.items]
    if out.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(written), partial)
    else:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
    lines = (json.dumps(asdict(drop), ensure_ascii=False) for drop in result.drops)
    _dropped(out).write_text("".join(f"{line}\n" for line in lines))
    partial.replace(out)


def _dropped(out: Path) -> Path:
    return out.with_name(f"{out.name}.dropped.jsonl")


def _report(result: Prepared, out: Path, as_json: bool) -> None:
    counts, lengths = result.counts(), result.lengths()
    if as_json:
        typer.echo(json.dumps({"out": str(out), **counts, "prompt_tokens": lengths}))
        return
    table = Table("", "rows", "the first")
    table.add_row("kept", str(counts.pop("kept")), "")
    for kind, count in counts.items():
        first = next(drop for drop in result.drops if drop.kind == kind)
        table.add_row(kind, str(count), f"{first.place}: {first.why}")
    Console().print(table)
    shown = ", ".join(f"{name} {value:g}" for name, value in lengths.items())
    typer.echo(f"{out}: prompts of {shown} tokens; what was dropped: {_dropped(out)}")
