"""metrics.jsonl: one line a step, every float to its last digit."""

import json
from pathlib import Path

from megatron_fapo.errors import DataError
from megatron_fapo.observe.interface import StepRecord, files_of
from megatron_fapo.observe.metrics import Metrics

NAME = "metrics.jsonl"

StepMetrics = tuple[int, Metrics]
"""A step's number and its metrics."""


class JsonlSink:
    """Appends `{"step": 12, "reward/mean": 0.25, ...}`; floats are written so that reading gives the same bits."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self._path = folder / NAME
        with files_of(self._path):
            kept = [line for line in read_metrics(self._path) if line[0] < resume_step] if self._path.exists() else []
            part = self._path.with_name(f".{NAME}.part")
            part.write_text("".join(_line(step, metrics) for step, metrics in kept))
            part.replace(self._path)
            self._file = self._path.open("a")

    def write(self, record: StepRecord) -> None:
        """Append one line."""
        with files_of(self._path):
            self._file.write(_line(record.step, record.metrics))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(step: int, metrics: Metrics) -> str:
    return json.dumps({"step": step, **metrics}, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[StepMetrics]:
    """The steps in a metrics.jsonl, in order. A half last line, as a killed run leaves it, is passed over.

    Raises DataError naming file and line when the file is missing or damaged elsewhere.
    """
    with files_of(path):
        lines = path.read_bytes().decode(errors="replace").split("\n")
    found: list[StepMetrics] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            values = json.loads(line)
            step = values.pop("step")
            metrics = {str(name): float(value) for name, value in values.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}: line {number} is not a step's metrics ({error})") from None
        if found and step <= found[-1][0]:
            raise DataError(f"{path}: line {number} has step {step} after step {found[-1][0]}")
        found.append((int(step), metrics))
    return found
