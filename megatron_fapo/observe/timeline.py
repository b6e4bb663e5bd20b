"""timeline.jsonl: when each phase of each step began and ended, for the report's Gantt and for trace viewers."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fapo.errors import DataError
from megatron_fapo.observe.interface import StepRecord, files_of
from megatron_fapo.trace import Span

NAME = "timeline.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """A step's spans, in seconds since 1970."""

    step: int
    spans: tuple[Span, ...]
    """Among them one called "step"; "judge" ones do not overlap: each is a stretch with a verdict being waited for."""


class TimelineSink:
    """Appends `{"step": 12, "start": ..., "spans": [["generate", 0.1, 8.2], ...]}`, seconds from the step's start."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self._path = folder / NAME
        with files_of(self._path):
            kept = [times for times in read_timeline(folder) if times.step < resume_step]
            part = self._path.with_name(f".{NAME}.part")
            part.write_text("".join(_line(times.step, times.spans) for times in kept))
            part.replace(self._path)
            self._file = self._path.open("a")

    def write(self, record: StepRecord) -> None:
        """Append one line; none for a step without spans (an evaluation alone)."""
        if record.spans:
            with files_of(self._path):
                self._file.write(_line(record.step, record.spans))
                self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_timeline(folder: Path) -> list[StepTimes]:
    """The steps in a run folder's timeline.jsonl, in order; none where there is no such file.

    A half last line, as a killed run leaves it, is passed over. Raises DataError naming the line that is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return []
    with files_of(path):
        lines = path.read_bytes().decode(errors="replace").split("\n")
    found = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            value = json.loads(line)
            start = float(value["start"])
            spans = tuple(Span(name=name, start=start + a, end=start + b) for name, a, b in value["spans"])
            found.append(StepTimes(step=int(value["step"]), spans=spans))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: line {number} is not a step's times ({error})") from None
    return found


def merged(spans: Iterable[Span], name: str) -> list[Span]:
    """The stretches in which at least one of the spans was open, as spans of this name."""
    found: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start):
        if found and span.start <= found[-1].end:
            found[-1] = Span(name=name, start=found[-1].start, end=max(found[-1].end, span.end))
        else:
            found.append(Span(name=name, start=span.start, end=span.end))
    return found


def _line(step: int, spans: Sequence[Span]) -> str:
    start = min(span.start for span in spans)
    rows = [[span.name, round(span.start - start, 6), round(span.end - start, 6)] for span in spans]
    return json.dumps({"step": step, "start": round(start, 6), "spans": rows}) + "\n"
