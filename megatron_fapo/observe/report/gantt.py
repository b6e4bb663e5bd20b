"""The phases of single steps on a time axis, as gantt.js draws them."""

from collections.abc import Sequence
from typing import Any

from megatron_fapo.observe.report.arms import labels
from megatron_fapo.observe.runs import RunRecord
from megatron_fapo.observe.timeline import StepTimes, read_timeline

STEPS = 60
"""Last steps kept of a run."""


def gantt(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The last steps of each run that has a timeline. Raises DataError."""
    found = ((label, read_timeline(run.path)[-STEPS:]) for label, run in zip(labels(runs), runs, strict=True))
    return [{"label": label, "steps": [_step(times) for times in steps]} for label, steps in found if steps]


def _step(times: StepTimes) -> dict[str, Any]:
    start = min(span.start for span in times.spans)
    return {
        "step": times.step,
        "start": round(start, 3),
        "seconds": round(max(span.end for span in times.spans) - start, 4),
        "spans": [
            [span.name, round(span.start - start, 4), round(span.end - start, 4)]
            for span in times.spans
            if span.name != "step"
        ],
    }
