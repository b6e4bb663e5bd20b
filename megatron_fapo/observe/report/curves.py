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


TOPICS: dict[str, tuple[Panel, ...]] = {
    "Answers": (
        Panel(metric="flawed/oracle", title="Flawed right answers, by the oracle"),
        Panel(metric="flawed/judge", title="Flawed right answers, by the judge"),
        Panel(metric="rollout/right_share", title="Right answers"),
        Panel(metric="eval/right_share", title="Held out: right answers"),
        Panel(metric="eval/sound_share_oracle", title="Held out: right and sound, by the oracle"),
        Panel(metric="eval/sound_share_judge", title="Held out: right and sound, by the judge"),
        Panel(metric="reward/mean", title="Reward"),
        Panel(metric="flawed/advantage", title="Advantage of flagged right answers"),
    ),
    "Reward classes": (
        Panel(metric="group/three_class_share_oracle", title="Three-class groups, by the oracle"),
        Panel(metric="group/one_class_share_judge", title="Groups of one class, by the judge"),
        Panel(metric="group/dropped", title="Groups left out"),
    ),
    "Judge": (
        Panel(metric="audit/j", title="J: the judge's TPR - FPR, by its audit"),
        Panel(metric="judge/f1", title="F1 of the judge's “flawed”"),
        Panel(metric="judge/asked", title="Solutions asked about"),
        Panel(metric="judge/failed", title="Verdicts that failed"),
    ),
    "Lengths": (
        Panel(metric="rollout/length_mean", title="Response length"),
        Panel(metric="rollout/length_max", title="Longest response"),
        Panel(metric="rollout/truncated_share", title="Responses cut off"),
    ),
    "Optimisation": (
        Panel(metric="train/grad_norm_mean", title="Gradient norm"),
        Panel(metric="train/entropy", title="Entropy"),
        Panel(metric="train/kl", title="KL of an update"),
        Panel(metric="train/clipped_share", title="Tokens clipped"),
    ),
    "Mismatch and staleness": (
        Panel(metric="mismatch/mean", title="Train/inference mismatch, mean", log=True),
        Panel(metric="mismatch/max", title="Train/inference mismatch, largest", log=True),
        Panel(metric="rollout/lag_max", title="Staleness: age of the oldest weights"),
        Panel(metric="train/truncated_share", title="Importance weights cut at their cap"),
    ),
    "Speed": (
        Panel(metric="time/step_rate", title="Response tokens a second"),
        Panel(metric="time/generate_rate", title="Response tokens a second of generation"),
        Panel(metric="time/update_rate", title="Tokens a second of update"),
        Panel(metric="time/mfu", title="MFU of the update"),
        Panel(metric="time/step", title="Seconds a step"),
        Panel(metric="train/imbalance", title="Imbalance of the data-parallel ranks"),
        Panel(metric="time/switch", title="Seconds of changes of phase"),
        Panel(metric="servers/restarts", title="Servers started again"),
        Panel(metric="servers/retries", title="Samples asked elsewhere"),
    ),
}
"""{heading: its charts}"""

CLASSES = (("alpha", "clean", "clean right"), ("gamma", "flawed", "flawed right"), ("beta", "wrong", "wrong"))
"""(metric's name, CSS class, in words) of the three classes of a rollout, from the axis up."""


def curves(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """The charts that have data, as charts.js draws them; what never moved is in `constants`."""
    drawn = []
    for topic, panels in TOPICS.items():
        found = [_panel(panel, arms) for panel in panels]
        stacks = [_classes(arm) for arm in arms] if topic == "Reward classes" else []
        shown = [stack for stack in stacks if stack] + [p for p in found if p["arms"] and not _constant(p)]
        drawn += [{**panel, "topic": topic} for panel in shown]
    return drawn


def constants(arms: Sequence[Arm]) -> str:
    """What was measured and never moved, in a line; empty where everything did."""
    panels = [_panel(panel, arms) for topic in TOPICS.values() for panel in topic]
    still = [panel for panel in panels if panel["arms"] and _constant(panel)]
    return "; ".join(f"{panel['title']}: {panel['arms'][0]['lines'][0][0][1]:g}" for panel in still)


def _constant(panel: dict[str, Any]) -> bool:
    values = {value for arm in panel["arms"] for line in arm["lines"] for _, value in line}
    return len(values) == 1 and panel["metric"] not in ("flawed/oracle", "flawed/judge", "rollout/right_share")


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


def _classes(arm: Arm) -> dict[str, Any] | None:
    """What the rollouts of an arm are: three areas that fill the whole, by the oracle or else the judge."""
    for source, words in (("oracle", "the task's oracle"), ("judge", "the judge")):
        lines = {name: [run.series(f"group/{name}_{source}") for run in arm.runs] for name, _, _ in CLASSES}
        if all(any(series) for series in lines.values()):
            return {
                "metric": f"classes/{arm.name}",
                "title": f"{arm.title}: what its rollouts are",
                "about": f"Clean right, flawed right and wrong, by {words}; mean over the seeds.",
                "share": True,
                "stack": [
                    {"name": title, "colour": colour, "mean": smooth(mean_line([s for s in lines[name] if s]))}
                    for name, colour, title in CLASSES
                ],
            }
    return None


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
