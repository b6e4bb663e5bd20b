"""ProcessBench and FlawedPositiveBench: rows, predictions, scores.

ProcessBench (arXiv:2412.06559): per subset the harmonic mean of the exact-index accuracy on erroneous solutions and
the accuracy of "-1" on clean ones; the headline is the mean of the subsets. FlawedPositiveBench (FAPO,
arXiv:2510.22543): its rows with a right answer; precision, recall and F1 of "flawed", an index other than -1.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_fapo.critique.boxed import last_boxed
from megatron_fapo.critique.paragraphs import SEPARATOR
from megatron_fapo.errors import DataError

HUB_SUBSETS = ("gsm8k", "math", "olympiadbench", "omnimath")

Predictions = Mapping[str, int | None]
"""{row id: first wrong paragraph, -1 for clean, None for a verdict that could not be read}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A solution with the place of its first error."""

    id: str
    subset: str
    generator: str
    problem: str
    steps: tuple[str, ...]
    answer_right: bool
    label: int
    """0-based paragraph of the first error, -1 when there is none."""
    reference: str | None
    """The right answer: of the row, or read from a solution to the same problem that has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessScore:
    """ProcessBench on some rows; None where there are no such rows."""

    error_rows: int
    clean_rows: int
    error_accuracy: float | None
    clean_accuracy: float | None
    score: float | None
    """Harmonic mean of the two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlawScore:
    """FlawedPositiveBench on some rows."""

    rows: int
    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int
    precision: float
    """0 when nothing is flagged."""
    recall: float
    """0 when nothing is flawed."""
    f1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All scores of a judge; shares are of 1."""

    processbench: float | None
    """Mean of the subsets' scores."""
    flawed_positive: FlawScore
    subsets: dict[str, tuple[ProcessScore, FlawScore]]
    generators: dict[str, tuple[ProcessScore, FlawScore]]
    rows: int
    unreadable: int
    """Predictions that are None: wrong in ProcessBench, no flag in FlawedPositiveBench."""

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        parts = {
            name: {key: {"processbench": asdict(p), "flawed_positive": asdict(f)} for key, (p, f) in table.items()}
            for name, table in (("subsets", self.subsets), ("generators", self.generators))
        }
        return {
            "processbench": self.processbench,
            "flawed_positive": asdict(self.flawed_positive),
            **parts,
            "rows": self.rows,
            "unreadable": self.unreadable,
        }


def score(rows: Sequence[Row], predictions: Predictions) -> Report:
    """The scores of predictions, joined by id. Raises DataError for a row without a prediction."""
    if not rows:
        raise DataError("the bench has no rows")
    missing = [row.id for row in rows if row.id not in predictions]
    if missing:
        raise DataError(f"{len(missing)} of {len(rows)} rows have no prediction, the first is {missing[0]!r}")
    subsets = _by(rows, predictions, lambda row: row.subset)
    scores = [process.score for process, _ in subsets.values() if process.score is not None]
    return Report(
        processbench=sum(scores) / len(scores) if scores else None,
        flawed_positive=flaw_score(rows, predictions),
        subsets=subsets,
        generators=_by(rows, predictions, lambda row: row.generator),
        rows=len(rows),
        unreadable=sum(predictions[row.id] is None for row in rows),
    )


def process_score(rows: Sequence[Row], predictions: Predictions) -> ProcessScore:
    """ProcessBench on these rows."""
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for row in rows:
        hits[row.label == -1].append(predictions[row.id] == row.label)
    error, clean = (sum(found) / len(found) if found else None for found in (hits[False], hits[True]))
    return ProcessScore(
        error_rows=len(hits[False]),
        clean_rows=len(hits[True]),
        error_accuracy=error,
        clean_accuracy=clean,
        score=None if error is None or clean is None else harmonic_mean(error, clean),
    )


def flaw_score(rows: Sequence[Row], predictions: Predictions) -> FlawScore:
    """FlawedPositiveBench on those of these rows whose answer is right."""
    pairs = [(row.label != -1, predictions[row.id] not in (None, -1)) for row in rows if row.answer_right]
    tp, fp = pairs.count((True, True)), pairs.count((False, True))
    fn, tn = pairs.count((True, False)), pairs.count((False, False))
    return FlawScore(
        rows=len(pairs),
        true_positive=tp,
        false_positive=fp,
        false_negative=fn,
        true_negative=tn,
        precision=tp / (tp + fp) if tp + fp else 0.0,
        recall=tp / (tp + fn) if tp + fn else 0.0,
        f1=2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0,
    )


def harmonic_mean(one: float, other: float) -> float:
    """2ab/(a + b), 0 where either is."""
    return 2 * one * other / (one + other) if one and other else 0.0


def _by(
    rows: Sequence[Row], predictions: Predictions, key: Callable[[Row], str]
) -> dict[str, tuple[ProcessScore, FlawScore]]:
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(key(row), []).append(row)
    return {
        name: (process_score(part, predictions), flaw_score(part, predictions)) for name, part in sorted(parts.items())
    }


def read_rows(sources: Sequence[str]) -> list[Row]:
    """Rows of JSON files (an array of ProcessBench rows each), folders of such files, or a data set on the hub.

    Raises DataError naming the file and row that cannot be used.
    """
    given: list[tuple[str, str, Any]] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = sorted(path.glob("*.json"))
            if not files:
                raise DataError(f"{path}: no .json file in this folder")
            given += [entry for file in files for entry in _file(file)]
        elif path.suffix == ".json" or path.exists():
            given += _file(path)
        else:
            given += [entry for subset in HUB_SUBSETS for entry in _hub(source, subset)]
    rows = [_row(place, subset, value) for place, subset, value in given]
    ids = [row.id for row in rows]
    if len(set(ids)) < len(ids):
        raise DataError(f"row id {next(name for name in ids if ids.count(name) > 1)!r} occurs more than once")
    return _with_references(rows)


def _file(path: Path) -> list[tuple[str, str, Any]]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, list):
        raise DataError(f"{path}: must be a JSON array of rows, found {type(values).__name__}")
    return [(f"{path}, row {number}", path.stem, value) for number, value in enumerate(values)]


def _hub(source: str, subset: str) -> list[tuple[str, str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(source, split=subset)
    except (OSError, ValueError) as error:
        raise DataError(f"{source!r} is no file, and no data set that can be loaded: {error}") from None
    return [(f"{source}, {subset}, row {number}", subset, row) for number, row in enumerate(rows)]


def _row(place: str, subset: str, value: Any) -> Row:
    match value:
        case {
            "id": str() as name,
            "problem": str() as problem,
            "steps": [str(), *_] as steps,
            "final_answer_correct": bool() as right,
            "label": int() as label,
        } if not isinstance(label, bool) and -1 <= label < len(steps):
            prefix, _, number = name.rpartition("-")
            reference = value.get("reference_answer")
            return Row(
                id=name,
                subset=prefix if prefix and number.isdigit() else subset,
                generator=str(value.get("generator", "")),
                problem=problem,
                steps=tuple(steps),
                answer_right=right,
                label=label,
                reference=reference if isinstance(reference, str) else None,
            )
        case _:
            raise DataError(
                f"{place}: not a ProcessBench row (id, problem, steps, final_answer_correct, label in "
                f"[-1, number of steps)): {value!s:.120}"
            )


def _with_references(rows: Sequence[Row]) -> list[Row]:
    """Where a row names no right answer: the box of a solution to the same problem that has it."""
    known = {row.problem: row.reference for row in rows if row.reference is not None}
    for row in rows:
        if row.answer_right and row.problem not in known:
            boxed = last_boxed(SEPARATOR.join(row.steps))
            if boxed is not None:
                known[row.problem] = boxed
    return [row if row.reference is not None else replace(row, reference=known.get(row.problem)) for row in rows]


def read_predictions(path: Path) -> dict[str, int | None]:
    """Predictions of a JSON-lines file with `id` and `prediction` (an index, -1, or null). Raises DataError."""
    found: dict[str, int | None] = {}
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from None
        match value:
            case {"id": str() as name, "prediction": int() | None as prediction} if not isinstance(prediction, bool):
                if name in found:
                    raise DataError(f"{path}, line {number}: {name!r} is predicted twice")
                if prediction is not None and prediction < -1:
                    raise DataError(f"{path}, line {number}: prediction {prediction} of {name!r} is below -1")
                found[name] = prediction
            case _:
                raise DataError(
                    f"{path}, line {number}: must hold id (text) and prediction (an integer or null): {line:.120}"
                )
    return found
