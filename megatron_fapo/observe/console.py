"""What stands on the terminal while a run goes on: a live table, or one line a step where nobody watches."""

import sys
from collections import deque
from collections.abc import Callable
from typing import Literal, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from megatron_fapo.observe.interface import Sink, StepRecord
from megatron_fapo.observe.metrics import Metrics
from megatron_fapo.observe.run_info import RunInfo
from megatron_fapo.trace import Clock, SystemClock

RECENT = 20
"""Steps that the estimate of the remaining time looks back."""

REFRESHES_PER_SECOND = 4

Format = Callable[[float], str]


class ConsoleSink(Sink, Protocol):
    """A sink that also shows what is going on between two steps."""

    def phase(self, name: str) -> None:
        """A phase of the step begins; its progress starts at none."""

    def progress(self, done: int, total: int) -> None:
        """Rollouts that landed in this phase, of all of the step."""

    def evaluation(self, metrics: Metrics) -> None:
        """A held-out evaluation is done."""


def open_console(
    mode: Literal["auto", "live", "plain", "off"], info: RunInfo, *, first_step: int = 0, console: Console | None = None
) -> ConsoleSink:
    """The console for a mode of `ObserveSettings.console`; it writes to stdout unless told otherwise."""
    console = console or Console(file=sys.stdout, highlight=False)
    pace = Pace(info.steps, first_step)
    if mode == "off":
        return SilentConsole()
    if mode == "live" or (mode == "auto" and console.is_terminal):
        return LiveConsole(info, pace, console)
    return PlainConsole(info, pace, console)


def percent(share: float) -> str:
    """`0.123` as `12.3 %`."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Seconds as `45 s`, `3:05` or `2:07:09`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Pace:
    """How many steps are done, and how long the rest will take at the pace of the recent ones."""

    def __init__(self, steps: int, first_step: int) -> None:
        self.steps = steps
        self.done = first_step
        self._recent: deque[float] = deque(maxlen=RECENT)

    def after(self, record: StepRecord) -> None:
        """A step is done."""
        if record.groups:
            self.done = record.step + 1
            self._recent.append(record.metrics.get("time/step", 0.0))

    @property
    def eta(self) -> str:
        """The remaining time in words; `…` before the first step is done."""
        if not self._recent:
            return "…"
        return duration((self.steps - self.done) * sum(self._recent) / len(self._recent))


class SilentConsole:
    """Shows nothing."""

    def phase(self, name: str) -> None:
        """Nothing."""

    def progress(self, done: int, total: int) -> None:
        """Nothing."""

    def evaluation(self, metrics: Metrics) -> None:
        """Nothing."""

    def write(self, record: StepRecord) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainConsole(SilentConsole):
    """One line a step, for CI and Slurm logs."""

    SHOWN: tuple[tuple[str, str, Format], ...] = (
        ("reward", "reward/mean", "{:+.3f}".format),
        ("right", "rollout/right_share", percent),
        ("flawed (oracle)", "flawed/oracle", percent),
        ("flawed (judge)", "flawed/judge", percent),
        ("unjudged", "flawed/unjudged_share", percent),
        ("grad norm", "train/grad_norm_mean", "{:.3f}".format),
        ("mismatch", "mismatch/max", "{:.1e}".format),
        ("tokens/s", "time/step_rate", "{:.0f}".format),
        ("step", "time/step", "{:.1f} s".format),
    )

    def __init__(self, info: RunInfo, pace: Pace, console: Console) -> None:
        self._pace = pace
        self._console = console
        self._say(f"{info.label}: steps {pace.done} to {info.steps}, {info.rollouts_per_step} rollouts a step")

    def evaluation(self, metrics: Metrics) -> None:
        """One line with the held-out shares."""
        shares = {name.removeprefix("eval/"): share for name, share in metrics.items() if name != "eval/prompts"}
        self._say("evaluation: " + " · ".join(f"{name} {percent(share)}" for name, share in shares.items()))

    def write(self, record: StepRecord) -> None:
        """One line with the step's numbers."""
        self._pace.after(record)
        if record.groups:
            values = [f"{label} {form(record.metrics[m])}" for label, m, form in self.SHOWN if m in record.metrics]
            self._say(" · ".join([f"step {self._pace.done}/{self._pace.steps}", *values, f"ETA {self._pace.eta}"]))

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


class LiveConsole:
    """A panel that is drawn anew: phase, progress, rates, the last step beside the one before, remaining time."""

    ROWS: tuple[tuple[str, str, Format], ...] = (
        ("reward", "reward/mean", "{:+.3f}".format),
        ("right answers", "rollout/right_share", percent),
        ("flawed of right, oracle", "flawed/oracle", percent),
        ("flawed of right, judge", "flawed/judge", percent),
        ("right but unjudged", "flawed/unjudged_share", percent),
        ("judge F1", "judge/f1", percent),
        ("three-class groups", "group/three_class_share_judge", percent),
        ("response length", "rollout/length_mean", "{:.1f}".format),
        ("gradient norm", "train/grad_norm_mean", "{:.3f}".format),
        ("train/inference mismatch", "mismatch/max", "{:.1e}".format),
        ("tokens a second", "time/step_rate", "{:.0f}".format),
        ("seconds a step", "time/step", "{:.1f}".format),
        ("held-out right answers", "eval/right_share", percent),
    )

    def __init__(self, info: RunInfo, pace: Pace, console: Console, clock: Clock | None = None) -> None:
        self._info = info
        self._pace = pace
        self._clock = clock or SystemClock()
        self._phase, self._since = "starting", self._clock.now()
        self._done, self._total = 0, info.rollouts_per_step
        self._spinner = Spinner("dots")
        self._last: Metrics = {}
        self._before: Metrics = {}
        self._live = Live(
            get_renderable=self.panel, console=console, refresh_per_second=REFRESHES_PER_SECOND, transient=False
        )
        self._live.start()

    def phase(self, name: str) -> None:
        """Show a phase and how long it has been going on."""
        self._phase, self._since, self._done = name, self._clock.now(), 0

    def progress(self, done: int, total: int) -> None:
        """Move the bar of rollouts."""
        self._done, self._total = done, total

    def evaluation(self, metrics: Metrics) -> None:
        """Show the held-out shares from now on."""
        self._last = {**self._last, **metrics}

    def write(self, record: StepRecord) -> None:
        """Show the step's numbers, the ones before beside them."""
        self._pace.after(record)
        self._before, self._last = self._last, {**self._last, **record.metrics}
        self._live.refresh()

    def close(self) -> None:
        """Leave the last state on the terminal."""
        self._phase = "ended"
        self._live.stop()

    def panel(self) -> Panel:
        """What is drawn."""
        parts: list[RenderableType] = [self._bars()]
        if self._last:
            parts += [Text(), self._numbers()]
        return Panel(Group(*parts), title=f"[bold]{self._info.label}[/bold]", border_style="blue", width=76)

    def _bars(self) -> Table:
        table = Table.grid(padding=(0, 1))
        done, steps = self._pace.done, self._pace.steps
        table.add_row(
            "steps", ProgressBar(total=steps, completed=done, width=28), f"{done}/{steps}", f"ETA {self._pace.eta}"
        )
        seconds = self._clock.now() - self._since
        if self._phase == "generate":
            rate = f"{self._done / seconds:.0f} rollouts/s" if self._done and seconds > 0 else ""
            bar: RenderableType = ProgressBar(total=self._total, completed=self._done, width=28)
            table.add_row("generate", bar, f"{self._done}/{self._total}", rate)
        elif self._phase == "ended":
            table.add_row(self._phase)
        else:
            table.add_row(self._phase, self._spinner, "", duration(seconds))
        return table

    def _numbers(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name, justify in (("", "left"), ("last step", "right"), ("step before", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type] # rich's own literal type is private
        for label, name, form in self.ROWS:
            if name in self._last:
                before = form(self._before[name]) if name in self._before else ""
                table.add_row(label, Text(form(self._last[name]), style="bold"), Text(before, style="dim"))
        return table
