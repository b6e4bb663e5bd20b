"""What the page says at a glance: the finding in one line, a tile for each arm, a row for each run, phase times."""

from collections.abc import Sequence
from math import fsum

import yaml

from megatron_fapo.observe.console import duration
from megatron_fapo.observe.report.arms import Arm, labels
from megatron_fapo.observe.report.findings import state
from megatron_fapo.observe.report.page import element, number, percent, text
from megatron_fapo.observe.runs import LAST, RunRecord
from megatron_fapo.settings import flatten

SEGMENTS = (
    ("time/publish", "publish"),
    ("time/generate", "generate"),
    ("time/judge_exposed", "judge, not hidden"),
    ("time/update", "update"),
    ("time/evaluate", "evaluate"),
    ("time/other", "other"),
)
"""(metric, name) of the stretches that make up a step; generation is shown without the judge's tail."""


def seconds_text(seconds: float | None) -> str:
    """Seconds with two decimals."""
    return number(seconds, ".2f")


COLUMNS = (
    ("rollout/right_share", "right", percent),
    ("flawed/oracle", "flawed of right (oracle)", percent),
    ("flawed/judge", "flawed of right (judge)", percent),
    ("flawed/unjudged_share", "right, unjudged", percent),
    ("group/three_class_share_oracle", "three-class groups", percent),
    ("judge/f1", "judge F1", number),
    ("audit/j", "judge's J", number),
    ("rollout/length_mean", "tokens a response", lambda value: number(value, ".0f")),
    ("mismatch/max", "mismatch", number),
    ("rollout/lag_max", "stale by", lambda value: number(value, ".0f")),
    ("time/step_rate", "tokens/s", lambda value: number(value, ",.0f")),
    ("time/mfu", "MFU", percent),
    ("time/step", "s a step", seconds_text),
)
"""(metric, heading, format) of the table of runs."""


def measured_by(arms: Sequence[Arm]) -> tuple[str, str]:
    """(metric, in words) by which all arms can be compared: the oracle where all have one, else the judge."""
    return next(
        (
            (metric, words)
            for metric, words in (("flawed/oracle", "the task's oracle"), ("flawed/judge", "the judge"))
            if all(arm.values(metric) for arm in arms)
        ),
        ("", ""),
    )


def headline(arms: Sequence[Arm]) -> str:
    """The finding: a comparison where there are FAPO and GRPO, else each arm's share."""
    metric, _ = measured_by(arms)
    if not metric:
        right = [f"{arm.title} {percent(arm.mean('rollout/right_share'))}" for arm in arms]
        return f"Right answers: {', '.join(right)}"
    shares = {arm.name: arm.mean(metric) or 0.0 for arm in arms}
    if set(shares) == {"fapo", "grpo"} and shares["grpo"] > 0:
        change = shares["fapo"] / shares["grpo"] - 1
        return f"FAPO: {percent(abs(change), 0)} {'fewer' if change < 0 else 'more'} flawed right answers than GRPO"
    if len(arms) > 3:
        least, most = (choose(arms, key=lambda arm: shares[arm.name]) for choose in (min, max))
        ends = [f"{percent(shares[arm.name])} ({arm.title})" for arm in (least, most)]
        return f"Flawed right answers of {len(arms)} arms: {ends[0]} to {ends[1]}"
    return f"Flawed right answers: {', '.join(f'{arm.title} {percent(shares[arm.name])}' for arm in arms)}"


def tiles(arms: Sequence[Arm]) -> str:
    """A tile for each arm: flawed share large, right share below, bars on a common scale."""
    metric, words = measured_by(arms)
    largest = max((value for arm in arms for value in arm.values(metric)), default=0.0) if metric else 0.0
    shown = []
    for arm in arms:
        seeds = f"{len(arm.runs)} seed{'s' if len(arm.runs) > 1 else ''}"
        parts = [element("h3", text(arm.title), element("small", text(seeds)))]
        if metric:
            parts += [
                element("p", text(percent(arm.mean(metric))), class_="big"),
                element("p", f"of right answers flawed, by {text(words)}{_range(arm.values(metric))}", class_="soft"),
                _bars(arm.values(metric), largest),
            ]
        right = arm.mean("rollout/right_share")
        parts.append(element("p", element("b", text(percent(right))), " right answers", class_="right"))
        if (j := arm.mean("audit/j")) is not None:
            low, high = arm.mean("audit/j_low"), arm.mean("audit/j_high")
            known = f" the judge's J ({number(low, '.2f')} to {number(high, '.2f')})"
            parts.append(element("p", element("b", text(number(j, ".2f"))), text(known), class_="right"))
        shown.append(element("article", *parts, class_=f"tile {arm.colour}"))
    return element("div", *shown, class_="tiles")


def _range(values: Sequence[float]) -> str:
    return f" ({percent(min(values))} to {percent(max(values))})" if len(values) > 1 else ""


def _bars(values: Sequence[float], largest: float) -> str:
    """A bar for each seed; decoration, since the numbers stand beside it."""
    widths = [100 * value / largest if largest else 0.0 for value in values]
    bars = [element("i", style=f"width:{width:.1f}%") for width in widths]
    return element("div", *bars, class_="bars", aria_hidden="true")


def table(arms: Sequence[Arm]) -> str:
    """Each run's averages over its last ten steps, and each arm's mean."""
    columns = [column for column in COLUMNS if any(any(arm.values(column[0])) for arm in arms)]
    head = ["arm", "seed", "state", *(heading for _, heading, _ in columns), "whole run"]
    rows = [element("tr", *(element("th", text(name), scope="col") for name in head))]
    for arm in arms:
        for run in arm.runs:
            cells = [text(run.info.seed), text(state(run))]
            cells += [text(form(run.last(metric))) for metric, _, form in columns]
            cells.append(text(duration(run.seconds)))
            rows.append(_row(arm, arm.title, cells, ""))
        if len(arm.runs) > 1:
            cells = ["mean", "", *(text(form(arm.mean(metric))) for metric, _, form in columns)]
            cells.append(text(duration(fsum(run.seconds for run in arm.runs) / len(arm.runs))))
            rows.append(_row(arm, arm.title, cells, "mean"))
    caption = element("caption", f"Means over the last {LAST} steps of each run; “whole run” is the sum of its steps.")
    whole = element("table", caption, element("thead", rows[0]), element("tbody", *rows[1:]))
    return element("div", whole, class_="wide", role="region", tabindex=0, aria_label="Table of runs")


def _row(arm: Arm, name: str, cells: Sequence[str], kind: str) -> str:
    first = element("th", element("span", text(name), class_=f"name {arm.colour}"), scope="row")
    return element("tr", first, *(element("td", cell) for cell in cells), class_=kind)


def phases(runs: Sequence[RunRecord]) -> str:
    """Mean seconds of a step by phase: a stacked bar for each run, all on one scale, and the numbers."""
    found = [(label, _seconds(run)) for label, run in zip(labels(runs), runs, strict=True)]
    longest = max((sum(seconds.values()) for _, seconds in found), default=0.0) or 1.0
    names = [name for _, name in SEGMENTS if any(name in seconds for _, seconds in found)]
    order = [name for _, name in SEGMENTS]
    legend = [element("li", element("i", class_=f"p{order.index(name)}"), text(name)) for name in names]
    bars = []
    for label, seconds in found:
        parts = [_segment(name, seconds[name], longest, order.index(name)) for name in names if seconds.get(name)]
        total = element("b", text(f"{sum(seconds.values()):.2f} s"))
        spoken = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        bar = element("div", *parts, class_="stack", role="img", aria_label=f"{label}: {spoken}")
        bars.append(element("div", element("span", text(label)), bar, total, class_="phase"))
    return element("ul", *legend, class_="legend") + element("div", *bars, class_="phases")


def _segment(name: str, seconds: float, longest: float, index: int) -> str:
    share = seconds / longest
    inside = text(f"{seconds:.2f}") if share > 0.08 else ""
    return element("i", inside, class_=f"p{index}", style=f"width:{100 * share:.3f}%", title=f"{name}: {seconds:.3f} s")


def _seconds(run: RunRecord) -> dict[str, float]:
    """{phase: mean seconds a step}, over all steps (evaluation happens in some only)."""
    steps = max(len(run.steps), 1)
    sums = {name: fsum(metrics.get(metric, 0.0) for _, metrics in run.steps) / steps for metric, name in SEGMENTS}
    sums["generate"] = max(0.0, sums["generate"] - sums["judge, not hidden"])
    return {name: seconds for name, seconds in sums.items() if seconds > 0}


def differences(runs: Sequence[RunRecord]) -> str:
    """The settings that are not the same in all runs, a column for each; seeds and names of arms left out."""
    configs = [flatten(run.config) for run in runs]
    keys = sorted({key for config in configs for key in config} - {"train.seed", "train.arm"})
    differing = [key for key in keys if len({repr(config.get(key, "absent")) for config in configs}) > 1]
    if not differing:
        return ""
    head = element("tr", *(element("th", text(name), scope="col") for name in ("setting", *labels(runs))))
    rows = [
        element(
            "tr",
            element("th", text(key), scope="row"),
            *(element("td", text(config.get(key, "absent"))) for config in configs),
        )
        for key in differing
    ]
    table = element("table", element("thead", head), element("tbody", *rows))
    shown = element("div", table, class_="wide", role="region", tabindex=0, aria_label="Settings that differ")
    return element("h3", "What differs between the runs") + shown


def run_details(runs: Sequence[RunRecord]) -> str:
    """Each run's identity, versions and whole configuration, folded."""
    parts = []
    for label, run in zip(labels(runs), runs, strict=True):
        info = run.info
        versions = ", ".join(f"{name} {version}" for name, version in info.versions.items())
        resumed = f", taken up again {', '.join(info.resumed)}" if info.resumed else ""
        about = f"Started {info.started}{resumed}. {len(run.steps)} of {info.steps} steps done. {versions}."
        config = yaml.safe_dump(run.config, sort_keys=False)
        inner = [element("summary", text(label)), element("p", text(about), class_="soft")]
        inner.append(element("pre", text(config), tabindex=0, aria_label=f"Configuration of {label}"))
        parts.append(element("details", *inner))
    return "".join(parts)
