"""All sinks of a run as one, with the few calls that the loop makes."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from megatron_fapo.observe.console import ConsoleSink, open_console
from megatron_fapo.observe.flops import ModelFlops, read_model_flops
from megatron_fapo.observe.interface import Sink, StepRecord
from megatron_fapo.observe.jsonl import JsonlSink
from megatron_fapo.observe.metrics import (
    Metrics,
    audit_metrics,
    declared,
    evaluation_metrics,
    mfu,
    recovery_metrics,
    step_metrics,
    switch_metrics,
    without_time,
)
from megatron_fapo.observe.rollouts import RolloutsSink
from megatron_fapo.observe.run_info import FAILURE, RunInfo, open_run_info
from megatron_fapo.observe.settings import ObserveSettings
from megatron_fapo.observe.tensorboard import TensorBoardSink
from megatron_fapo.observe.timeline import TimelineSink, merged
from megatron_fapo.observe.wandb import WandbSink
from megatron_fapo.records import Evaluation, Floats, Group, JudgeAudit, Recovered, StepReport, WeightVersion
from megatron_fapo.trace import Clock, Span, Spans, Stint, Switch, SystemClock

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What MFU is measured against."""

    flops: ModelFlops
    peak: float
    """FLOP/s of all training ranks."""


class Sinks:
    """What the loop tells: phases, progress, steps, evaluations. Passes each step on to every sink."""

    def __init__(
        self,
        opened: "Opened",
        info: RunInfo,
        reopen: "Reopen",
        clock: Clock | None = None,
        speed: "Speed | None" = None,
    ) -> None:
        self._sinks, self._console = opened
        self._info, self._reopen = info, reopen
        self._speed = speed
        self._clock = clock or SystemClock()
        self._epoch = time.time() - self._clock.now()
        self._landed = 0
        self._last_landed = 0.0
        self._judging: list[Span] = []
        self._faults = dict.fromkeys(("servers/retries", "servers/restarts"), 0.0)
        self._step_began: float | None = None
        self._evaluation: tuple[int, Metrics] | None = None
        self._recovered: Metrics = {}

    def rewind(self, step: int, recovered: Recovered | None = None) -> None:
        """Forget what was recorded of `step` and later steps: the run goes on from there, perhaps having lost ranks."""
        self._sinks, self._console = self._reopen(step)
        self._judging, self._step_began, self._evaluation = [], None, None
        self._recovered = self._recovered if recovered is None else recovery_metrics(recovered)

    @contextmanager
    def phase(self, name: str, spans: Spans) -> Iterator[None]:
        """Show a phase of a step while the body runs, and measure it as the span of this name."""
        start = self._clock.now()
        self._step_began = start if self._step_began is None else self._step_began
        self._landed, self._last_landed = 0, start
        self._console.phase(name)
        with spans.measure(name):
            yield
        if name == "generate" and self._info.judge:
            spans.ended.append(Span(name="judge_exposed", start=self._last_landed, end=self._clock.now()))

    def progress(self, rollouts: int) -> None:
        """That many more rollouts of this step have landed."""
        self._landed += rollouts
        self._last_landed = self._clock.now()
        self._console.progress(self._landed, self._info.rollouts_per_step)

    def judged(self, start: float, end: float) -> None:
        """A verdict of this step was being waited for from `start` to `end`, seconds of the sinks' clock."""
        self._judging.append(Span(name="judge", start=start, end=end))

    def retried(self, samples: int) -> None:
        """So many samples are asked again, since their server died."""
        self._faults["servers/retries"] += samples

    def restarted(self) -> None:
        """A server died and was started again."""
        self._faults["servers/restarts"] += 1

    def moved(self, samples: int) -> None:
        """So many samples go on at another server, the devices of theirs being lent."""
        self._faults["servers/moved"] = self._faults.get("servers/moved", 0.0) + samples

    def worked(self, stint: Stint) -> None:
        """Servers of a role have worked on devices that two roles share, until just now."""
        found = {
            "servers/moved": 0.0,
            "servers/handovers": float(stint.handed_over),
            "servers/handover_bytes": float(stint.nbytes),
            f"time/lent_to_{stint.role}": stint.seconds if stint.lent else 0.0,
        }
        self._faults |= {name: self._faults.get(name, 0.0) + value for name, value in found.items()}

    def write(
        self,
        step: int,
        groups: Sequence[Group],
        trained: Sequence[Group],
        rewards: Sequence[Floats],
        advantages: Sequence[Sequence[Floats | None]],
        report: StepReport,
        weights: WeightVersion,
        spans: Spans,
        audit: JudgeAudit | None = None,
        switches: Sequence[Switch] = (),
        too_old: int = 0,
    ) -> None:
        """Record a finished step.

        `trained` are the groups that the update used; `rewards` [n] and `advantages` (one array [T] a rollout) are
        theirs, in the same order.
        """
        now = self._clock.now()
        spans.ended.append(Span(name="step", start=now if self._step_began is None else self._step_began, end=now))
        self._step_began = now
        phases = list(spans.ended)
        spans.ended += self._judging
        judging, self._judging = self._judging, []
        ids = [judged.rollout.id for group in trained for judged in group]
        flat_rewards = [float(reward) for group in rewards for reward in group]
        flat_advantages = [_mean(tokens) for group in advantages for tokens in group]
        by_id = dict(zip(ids, flat_advantages, strict=True))
        metrics = step_metrics(
            groups=groups,
            rewards=rewards,
            report=report,
            weights=weights,
            spans=spans,
            advantages=by_id,
            too_old=too_old,
        )
        metrics |= audit_metrics(audit) | switch_metrics(switches) | declared(self._faults) | self._recovered
        self._recovered = without_time(self._recovered)
        self._faults = dict.fromkeys(self._faults, 0.0)
        if self._speed is not None:
            metrics |= mfu(groups, report, self._speed.flops, self._speed.peak)
        self._pass_on(
            StepRecord(
                step=step,
                metrics={**self._evaluated(step), **metrics},
                groups=tuple(groups),
                rewards=dict(zip(ids, flat_rewards, strict=True)),
                advantages=by_id,
                spans=self._since_1970([*phases, *merged(judging, "judge")]),
            )
        )

    def write_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Record a held-out evaluation of the weights after `step` steps; it goes into that step's line."""
        self._evaluation = (step, evaluation_metrics(evaluation))
        self._console.evaluation(self._evaluation[1])

    def finish(self) -> None:
        """Write what waits for its step: the evaluation after the last update."""
        if self._evaluation is not None:
            step = self._evaluation[0]
            self._pass_on(StepRecord(step=step, metrics=self._evaluated(step), rewards={}, advantages={}))

    def _since_1970(self, spans: Sequence[Span]) -> tuple[Span, ...]:
        shift = self._epoch
        return tuple(Span(name=span.name, start=span.start + shift, end=span.end + shift) for span in spans)

    def _evaluated(self, step: int) -> Metrics:
        waiting, self._evaluation = self._evaluation, None
        return waiting[1] if waiting and waiting[0] == step else {}

    def _pass_on(self, record: StepRecord) -> None:
        for sink in (*self._sinks, self._console):
            sink.write(record)


Opened = tuple[Sequence[Sink], ConsoleSink]
"""Sinks, and the console, which comes last."""

Reopen = Callable[[int], Opened]
"""Close the sinks of a run and open them again at a step."""


def _mean(advantages: Floats | None) -> float:
    """Over the response's tokens; 0 for one that is empty or takes no part in the loss."""
    return float(advantages.mean()) if advantages is not None and len(advantages) else 0.0


@contextmanager
def open_sinks(
    settings: ObserveSettings,
    folder: Path,
    *,
    config: Mapping[str, Any],
    resume_step: int = 0,
    clock: Clock | None = None,
    extra: Sequence[Sink] = (),
) -> Iterator[Sinks]:
    """The sinks of a run in `folder`, closed at the end; then the run's report, unless the run failed.

    `config` is the whole configuration as `Config.model_dump(mode="json")` gives it. What was recorded of
    `resume_step` and later steps is forgotten. `extra` sinks come after those of the settings, before the console.
    Raises DataError.
    """
    info = open_run_info(folder, config)
    (folder / FAILURE).unlink(missing_ok=True)
    with ExitStack() as last, ExitStack() as stack:
        last.push(partial(_note_failure, folder))
        for sink in extra:
            last.callback(sink.close)

        def open_at(step: int) -> Opened:
            stack.close()
            sinks = []
            for sink in _file_sinks(settings, folder, info, config, step):
                stack.callback(sink.close)
                sinks.append(sink)
            console = open_console(settings.console, info, first_step=step)
            stack.callback(console.close)
            return (*sinks, *extra), console

        together = Sinks(open_at(resume_step), info, open_at, clock, _speed(settings, config))
        yield together
        together.finish()
    if settings.report:
        _write_report(folder)


def _speed(settings: ObserveSettings, config: Mapping[str, Any]) -> Speed | None:
    if settings.peak_tflops is None:
        return None
    parallel = config["policy"]["parallel"]
    ranks = parallel["tensor"] * parallel["pipeline"] * parallel["context"] * parallel["data"]
    flops = read_model_flops(Path(config["policy"]["model"]))
    return Speed(flops=flops, peak=settings.peak_tflops * 1e12 * ranks)


def _note_failure(folder: Path, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
    """What ended a run, for its report; a run that is told to stop has not failed."""
    if isinstance(error, Exception):
        now = datetime.now(UTC).isoformat(timespec="seconds")
        note = {"error": type(error).__name__, "message": str(error), "at": now}
        with suppress(OSError):  # a full disk is what ended it, perhaps: its error must come through
            (folder / FAILURE).write_text(json.dumps(note) + "\n")


def _file_sinks(
    settings: ObserveSettings, folder: Path, info: RunInfo, config: Mapping[str, Any], resume_step: int
) -> Iterator[Sink]:
    yield JsonlSink(folder, resume_step)
    yield TimelineSink(folder, resume_step)
    if settings.rollouts:
        yield RolloutsSink(folder, resume_step)
    if settings.tensorboard:
        yield TensorBoardSink(folder, resume_step)
    if settings.wandb != "off":
        yield WandbSink(
            folder,
            mode=settings.wandb,
            project=settings.wandb_project,
            run_id=info.id,
            name=info.label,
            group=info.arm,
            config=config,
        )


def _write_report(folder: Path) -> None:
    from megatron_fapo.observe.report.build import write_report
    from megatron_fapo.observe.runs import read_run

    run = read_run(folder)
    if not run.steps:  # stopped before its first step
        return
    write_report([run], folder / "report.html")
    log.info("%s written", folder / "report.html")
