"""What is drawn over the steps: thin lines of single runs, a bold mean of each arm."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

from megatron_fapo.observe.glossary import Metric, metric
from megatron_fapo.observe.report.arms import Arm

WINDOW = 5
"""Steps of the running mean under the bold line."""

Points = list[tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One chart."""

    metric: str
    title: str
    log: bool = False
    """Draw the values on a logarithmic scale."""


FIRST = Panel(metric="flawed/oracle", title="Flawed right answers, by the oracle")
PANELS = (
    FIRST,
    Panel(metric="flawed/judge", title="Flawed right answers, by the judge"),
    Panel(metric="rollout/right_share", title="Right answers"),
    Panel(metric="eval/sound_share_oracle", title="Held out: right and sound, by the oracle"),
    Panel(metric="eval/right_share", title="Held out: right answers"),
    Panel(metric="reward/mean", title="Reward"),
    Panel(metric="group/three_class_share_oracle", title="Three-class groups, by the oracle"),
    Panel(metric="flawed/advantage", title="Advantage of flagged right answers"),
    Panel(metric="audit/j", title="The judge's TPR - FPR, by its audit"),
    Panel(metric="judge/f1", title="F1 of the judge's “flawed”"),
    Panel(metric="rollout/length_mean", title="Response length"),
    Panel(metric="train/grad_norm_mean", title="Gradient norm"),
    Panel(metric="mismatch/max", title="Train/inference mismatch, largest", log=True),
    Panel(metric="time/step_rate", title="Response tokens a second"),
)


def curves(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """The charts that have data, as charts.js draws them."""
    drawn = [_panel(panel, arms) for panel in PANELS]
    return [panel for panel in drawn if panel["arms"]]


def _panel(panel: Panel, arms: Sequence[Arm]) -> dict[str, Any]:
    declared = metric(panel.metric)
    present = [(arm, [run.series(panel.metric) for run in arm.runs]) for arm in arms]
    shown = [(arm, [series for series in lines if series]) for arm, lines in present if any(lines)]
    missing = [arm.title for arm, lines in present if not any(lines)]
    return {
        "metric": panel.metric,
        "title": panel.title,
        "about": _about(declared, missing),
        "share": declared.unit == "share",
        "log": panel.log,
        "arms": [
            {
                "name": arm.title,
                "colour": arm.colour,
                "seeds": [run.info.seed for run in arm.runs if run.series(panel.metric)],
                "lines": lines,
                "mean": smooth(mean_line(lines)),
            }
            for arm, lines in shown
        ],
    }


def _about(declared: Metric, missing: Sequence[str]) -> str:
    unit = f" In {declared.unit}." if declared.unit not in ("", "share", "count") else ""
    return declared.description.replace("`", "") + unit + (f" {', '.join(missing)}: not measured." if missing else "")


def mean_line(lines: Sequence[Points]) -> Points:
    """Mean over the runs at each step that any of them has."""
    by_step: dict[int, list[float]] = {}
    for line in lines:
        for step, value in line:
            by_step.setdefault(step, []).append(value)
    return [(step, fsum(values) / len(values)) for step, values in sorted(by_step.items())]


def smooth(line: Points, window: int = WINDOW) -> Points:
    """Centred running mean over `window` points, fewer at the ends; short lines stay as they are."""
    if len(line) < 3 * window:
        return line
    values = [value for _, value in line]
    half = window // 2
    around = [values[max(0, at - half) : at + half + 1] for at in range(len(values))]
    return [(step, fsum(near) / len(near)) for (step, _), near in zip(line, around, strict=True)]
