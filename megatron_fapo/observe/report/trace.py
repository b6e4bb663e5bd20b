"""A run's timeline as a Chrome trace, which ui.perfetto.dev and chrome://tracing open."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_fapo.errors import DataError
from megatron_fapo.observe.interface import files_of
from megatron_fapo.observe.report.arms import labels
from megatron_fapo.observe.runs import RunRecord
from megatron_fapo.observe.timeline import read_timeline

TRACKS = ("step", "publish", "evaluate", "generate", "judge", "judge_exposed", "update")
"""A row each, in this order."""
COUNTERS = ("flawed/judge", "flawed/oracle", "rollout/right_share", "time/step_rate", "mismatch/max")
"""Metrics drawn as graphs over the rows."""


def write_trace(runs: Sequence[RunRecord], out: Path) -> None:
    """Write the runs as one trace: a process a run, a thread a phase. Raises DataError where no run has a timeline."""
    events = [
        event for number, pair in enumerate(zip(labels(runs), runs, strict=True)) for event in _run(number, *pair)
    ]
    if not any(event["ph"] == "X" for event in events):
        raise DataError("nothing to trace: no run has a timeline.jsonl")
    with files_of(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _run(number: int, label: str, run: RunRecord) -> Iterator[dict[str, Any]]:
    """Times in microseconds since 1970, as the format wants them."""
    yield {"ph": "M", "pid": number, "name": "process_name", "args": {"name": label}}
    for thread, name in enumerate(TRACKS):
        yield {"ph": "M", "pid": number, "tid": thread, "name": "thread_name", "args": {"name": name}}
        yield {"ph": "M", "pid": number, "tid": thread, "name": "thread_sort_index", "args": {"sort_index": thread}}
    metrics = dict(run.lines)
    for times in read_timeline(run.path):
        for span in times.spans:
            name = f"step {times.step}" if span.name == "step" else span.name
            place = {"pid": number, "tid": TRACKS.index(span.name) if span.name in TRACKS else len(TRACKS)}
            microseconds = {"ts": round(span.start * 1e6), "dur": round(span.seconds * 1e6)}
            args = {"step": times.step, **(metrics.get(times.step, {}) if span.name == "step" else {})}
            yield {"ph": "X", "name": name, "cat": "phase", **place, **microseconds, "args": args}
        ended = round(max(span.end for span in times.spans) * 1e6)
        for name in COUNTERS:
            if name in metrics.get(times.step, {}):
                value = {name.rpartition("/")[2]: metrics[times.step][name]}
                yield {"ph": "C", "name": name, "pid": number, "ts": ended, "args": value}
