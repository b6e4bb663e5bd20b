"""Rows of data sets on disk and on the Hugging Face hub, and the endless shuffled stream made of them.

A bad row is named by file and line (or row, where a file has no lines).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Generic, TypeVar

from megatron_fapo.errors import ConfigError, DataError
from megatron_fapo.records import Message

Row = Mapping[str, Any]
Parsed = TypeVar("Parsed")


Bad = Callable[[str, str], None]
"""Told the place of what is not a row, and why."""


def _refuse(place: str, why: str) -> None:
    raise DataError(f"{place}: {why}")


def read(source: str, config: str = "all", split: str = "train", bad: Bad = _refuse) -> Iterator[tuple[str, Row]]:
    """(place, row) of a .jsonl, .json or .parquet file, or of a data set on the hub (or in a folder).

    A .json file holds a list of rows, or a row a line. What is not a row goes to `bad`, which by default refuses it.

    Raises DataError when there is nothing to read or a line is not a row.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".parquet"):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        if path.suffix == ".parquet":
            return _parquet(path)
        read_json = _json_list if path.suffix == ".json" and _is_list(path) else _json_lines
        return read_json(path, bad)
    return _data_set(source, config, split)


def _is_list(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        return file.read(1000).lstrip().startswith("[")


def _json_list(path: Path, bad: Bad) -> Iterator[tuple[str, Row]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    for number, row in enumerate(found, start=1):
        if isinstance(row, dict):
            yield f"{path}, row {number}", row
        else:
            bad(f"{path}, row {number}", f"must be a JSON object, found {type(row).__name__}")


def _json_lines(path: Path, bad: Bad) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                bad(place, f"not JSON: {error}")
                continue
            if isinstance(row, dict):
                yield place, row
            else:
                bad(place, f"must be a JSON object, found {type(row).__name__}")


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file: {error}") from None
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


def _data_set(source: str, config: str, split: str) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        rows = datasets.load_dataset(source, config, split=split)
    except (OSError, ValueError) as error:
        # DatasetNotFoundError and the hub's HTTP and connection errors are OSErrors, an unknown config a ValueError.
        raise DataError(f"data set {source!r}, config {config!r}: cannot be loaded: {error}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{source} ({config}), row {number}", row


def parse_all(rows: Iterator[tuple[str, Row]], parse: Callable[[Row], Parsed]) -> list[Parsed]:
    """Every row through `parse`; its ValueError becomes a DataError that says where the row is."""
    parsed = []
    for place, row in rows:
        try:
            parsed.append(parse(row))
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
    return parsed


def text_of(row: Row, *names: str) -> str:
    """The first of these columns, named in any case, that holds a text or an integer; empty where none does."""
    columns = {str(name).lower(): value for name, value in row.items() if value is not None}
    for name in names:
        value = columns.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return ""


def messages_of(row: Row) -> tuple[Message, ...]:
    """Field `prompt` as a chat. Raises ValueError when it is none."""
    turns = row.get("prompt")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        columns = ", ".join(map(str, row)) or "no columns"
        raise ValueError(f"prompt must be a list of messages, found {turns!r:.100}; the row has {columns:.200}")
    messages = []
    for turn in turns:
        match turn:
            case {"role": "system" | "user" | "assistant" as role, "content": str() as content}:
                messages.append(Message(role=role, content=content))
            case _:
                raise ValueError(f"prompt must hold messages with role and content, found {turn!r:.100}")
    return tuple(messages)


def ground_truth_of(row: Row) -> str | int:
    """Field `reward_model.ground_truth`. Raises ValueError when it is missing or of another type."""
    match row.get("reward_model"):
        case {"ground_truth": str() | int() as truth} if not isinstance(truth, bool):
            return truth
        case other:
            raise ValueError(f"reward_model.ground_truth must be text or an integer, found {other!r:.100}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus(Generic[Parsed]):
    """Training rows and held-out rows of a task."""

    train: tuple[Parsed, ...]
    held_out: tuple[Parsed, ...]

    @classmethod
    def of(cls, train: Sequence[Parsed], held_out: Sequence[Parsed] | None, held_out_rows: int) -> "Corpus[Parsed]":
        """Without held-out rows of their own, the last `held_out_rows` training rows are taken off."""
        if held_out is None:
            if len(train) <= held_out_rows:
                raise ConfigError(
                    f"task.held_out_rows={held_out_rows}: there are only {len(train)} training rows; "
                    "take fewer off, or name held-out rows in task.held_out"
                )
            train, held_out = train[:-held_out_rows], train[-held_out_rows:]
        if not train or not held_out:
            raise DataError(f"{len(train)} training rows and {len(held_out)} held-out rows: neither may be empty")
        return cls(train=tuple(train), held_out=tuple(held_out))

    def draw(self, index: int, seed: int) -> Parsed:
        """Training row `index` of the endless stream: the rows in a new order each time round."""
        if index < 0:
            raise ValueError(f"index {index} is negative")
        epoch, position = divmod(index, len(self.train))
        return self.train[_order(len(self.train), seed, epoch)[position]]

    def find(self, prompt_id: str, seed: int) -> Parsed:
        """The row of a prompt by its id: `p12` is training prompt 12, `h3` held-out prompt 3."""
        stream, index = prompt_id[0], int(prompt_id[1:])
        return self.draw(index, seed) if stream == "p" else self.held_out[index]


@lru_cache(maxsize=4)
def _order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(rows))
    Random(f"rows/{seed}/{epoch}").shuffle(order)
    return tuple(order)
