"""What needs a look: a run's numbers against rules of thumb, each with what to do; and its failures by name."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import pyarrow.parquet as pq

from megatron_fapo.errors import DataError
from megatron_fapo.observe.interface import files_of
from megatron_fapo.observe.report.page import element, number, percent, text
from megatron_fapo.observe.run_info import read_failure
from megatron_fapo.observe.runs import RunRecord

Level = Literal["bad", "look"]
RECENT = 50
"""Steps whose rollouts are searched for failures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that a reader should know first."""

    level: Level
    what: str
    todo: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A limit on a metric's mean over the last ten steps."""

    metric: str
    above: float
    says: Callable[[float], str]
    todo: str
    level: Level = "look"


RULES = (
    Rule(
        metric="audit/alarm",
        above=0.5,
        level="bad",
        says=lambda _: "All of J's interval is below judge.audit.min_j: the verdicts say too little.",
        todo="Look at the flagged rollouts below; a better judge, or algorithm.reward.correct_rates.",
    ),
    Rule(
        metric="audit/short_alarm",
        above=0.5,
        says=lambda _: "The cascade's short verdicts err more often than judge.cascade.max_error.",
        todo="Choose its thresholds again on rollouts of the present policy: tools/calibrate_judge.py.",
    ),
    Rule(
        metric="mismatch/mean",
        above=0.05,
        level="bad",
        says=lambda value: f"Engine and Megatron differ by {number(value)} nats a token on average.",
        todo="policy.rescore=always with algorithm.loss.importance; compare the servers' dtype and attention backend.",
    ),
    Rule(
        metric="group/one_class_share_judge",
        above=0.7,
        says=lambda value: f"{percent(value, 0)} of the groups are of one class and teach nothing.",
        todo="rollout.dynamic_sampling replaces them; or harder (easier) prompts.",
    ),
    Rule(
        metric="rollout/truncated_share",
        above=0.1,
        says=lambda value: f"{percent(value, 0)} of the rollouts reach the token limit.",
        todo="Raise rollout.max_new_tokens, or shape length with algorithm.reward.overlong.",
    ),
    Rule(
        metric="train/imbalance",
        above=1.3,
        says=lambda value: f"The slowest data-parallel rank has {number(value)} times the mean work.",
        todo="More prompts an update, or a larger batch.tokens_per_microbatch.",
    ),
    Rule(
        metric="train/padding_share",
        above=0.2,
        says=lambda value: f"{percent(value, 0)} of the computed tokens are padding.",
        todo="A larger batch.tokens_per_microbatch packs more tightly.",
    ),
)


def findings(run: RunRecord) -> list[Finding]:
    """What a reader should look at first, the worst first. Raises DataError when failure.json is damaged."""
    found = []
    if failure := read_failure(run.path):
        todo = f"Its logs are in {run.path.name}/logs; fapo train with --resume goes on from the last checkpoint."
        found.append(Finding(level="bad", what=f"The run ended with {failure}", todo=todo))
    for rule in RULES:
        value = run.last(rule.metric)
        if value is not None and value > rule.above:
            found.append(Finding(level=rule.level, what=rule.says(value), todo=rule.todo))
    found += [
        finding for check in (_failed_verdicts, _exposed_judge, _growing_mismatch, _spikes) for finding in check(run)
    ]
    return sorted(found, key=lambda finding: finding.level != "bad")


def _failed_verdicts(run: RunRecord) -> list[Finding]:
    asked, failed = run.last("judge/asked"), run.last("judge/failed")
    if not asked or not failed or failed / asked < 0.01:
        return []
    what = f"{percent(failed / asked)} of the verdicts asked for fail."
    return [
        Finding(level="look", what=what, todo="“Failures by name” says why; logs/judge-0.log has the server's side.")
    ]


def _exposed_judge(run: RunRecord) -> list[Finding]:
    exposed, step = run.last("time/judge_exposed"), run.last("time/step")
    if not exposed or not step or exposed / step < 0.2:
        return []
    what = f"{percent(exposed / step, 0)} of a step waits for the judge alone."
    return [
        Finding(level="look", what=what, todo="More judge servers, judge.cascade, or a shorter judge.max_new_tokens.")
    ]


def _growing_mismatch(run: RunRecord) -> list[Finding]:
    series = [value for _, value in run.series("mismatch/mean")]
    last = run.last("mismatch/mean")
    if len(series) < 30 or last is None or last < 1e-3 or last < 5 * median(series[:10]):
        return []
    what = f"The mismatch of engine and Megatron has grown to {number(last / median(series[:10]))} times its start."
    return [
        Finding(
            level="look", what=what, todo="Often a policy that grows too sure of itself: watch entropy and clipping."
        )
    ]


def _spikes(run: RunRecord) -> list[Finding]:
    series = run.series("train/grad_norm_max")
    recent = series[-20:]
    if len(series) < 20:
        return []
    usual = median(value for _, value in series)
    step, largest = max(recent, key=lambda point: point[1])
    if usual <= 0 or largest < 20 * usual:
        return []
    what = f"The gradient norm of step {step} is {number(largest / usual)} times the usual one."
    return [
        Finding(level="look", what=what, todo="A single spike is clipped; several in a row want a lower learning rate.")
    ]


def failures(run: RunRecord) -> Counter[tuple[str, str]]:
    """{(what, why): rollouts} over the last steps that kept rollouts: verdicts that failed, answers not compared."""
    found: Counter[tuple[str, str]] = Counter()
    for path in list(run.rollouts.values())[-RECENT:]:
        try:
            with files_of(path):
                columns = pq.read_table(path, columns=["verdict", "verdict_why", "why", "finish_reason"]).to_pydict()
        except (ValueError, KeyError) as error:  # pyarrow's own errors are ValueErrors
            raise DataError(f"{path}: not a whole parquet file ({error})") from None
        for verdict, reason, why, finish in zip(*columns.values(), strict=True):
            if verdict == "failed":
                found["verdict failed", reason] += 1
            if why not in ("equal", "different"):
                found["answer not compared", why] += 1
            if finish == "length":
                found["rollout cut off", "token limit"] += 1
    return found


def state(run: RunRecord) -> str:
    """How far the run is."""
    done, all_steps = len(run.steps), run.info.steps
    if read_failure(run.path):
        return f"failed after step {run.steps[-1][0]}" if run.steps else "failed"
    return "complete" if done >= all_steps else f"step {done} of {all_steps}"


def findings_list(labelled: Sequence[tuple[str, RunRecord]]) -> str:
    """What needs a look, a list; a word of comfort where nothing does."""
    alike: dict[tuple[str, str], list[tuple[str, Finding]]] = {}
    for label, run in labelled:
        for finding in findings(run):
            alike.setdefault((finding.level, finding.todo), []).append((label, finding))
    if not alike:
        return element("p", "Nothing: no limit of the report's rules of thumb is passed.", class_="calm")
    items = [_item(found) for _, found in sorted(alike.items(), key=lambda group: group[0][0] != "bad")]
    return element("ul", *items, class_="findings")


def _item(found: Sequence[tuple[str, Finding]]) -> str:
    """One finding, with the runs that share it."""
    label, finding = found[0]
    mark = element("span", text("✗" if finding.level == "bad" else "!"), class_="mark", aria_hidden="true")
    kind = element("span", text("Bad: " if finding.level == "bad" else "Look: "), class_="spoken")
    words = element("span", element("b", text(finding.what)), " ", text(finding.todo))
    others = ", ".join(name for name, _ in found[1:])
    more = element("span", text(f" and {len(found) - 1} more"), title=others) if others else ""
    return element("li", mark, kind, words, element("small", text(label), more), class_=finding.level)


def failures_table(labelled: Sequence[tuple[str, RunRecord]]) -> str:
    """Failures by name, a column for each run."""
    counts = [failures(run) for _, run in labelled]
    names = sorted({name for count in counts for name in count}, key=lambda name: -sum(count[name] for count in counts))
    if not names:
        return element("p", "None in the rollouts that were kept.", class_="calm")
    head = element(
        "tr", *(element("th", text(name), scope="col") for name in ("what", "why", *(la for la, _ in labelled)))
    )
    rows = []
    for what, why in names:
        cells = [element("td", text(count[what, why] or "–")) for count in counts]
        rows.append(
            element("tr", element("th", text(what), scope="row"), element("td", text(why), class_="why"), *cells)
        )
    table = element("table", element("thead", head), element("tbody", *rows))
    return element("div", table, class_="wide", role="region", tabindex=0, aria_label="Failures by name")
