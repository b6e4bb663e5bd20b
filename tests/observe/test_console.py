import io
from random import Random

import pytest
from rich.console import Console

from megatron_fapo.observe.console import LiveConsole, Pace, PlainConsole, SilentConsole, duration, open_console
from megatron_fapo.observe.interface import StepRecord
from megatron_fapo.observe.run_info import RunInfo
from tests.observe.synthetic import HandClock, make_groups, write_run

INFO = RunInfo(
    id="a", arm="fapo", seed=2, steps=60, rollouts_per_step=256, judge=True, started="2026-01-01T00:00:00", versions={}
)
METRICS = {
    "reward/mean": 0.25,
    "rollout/right_share": 0.81,
    "flawed/oracle": 0.123,
    "flawed/judge": 0.1,
    "time/step": 2.0,
}


def record(step: int) -> StepRecord:
    groups = tuple(make_groups("fapo", step, 0.5, Random(0))[:1])
    return StepRecord(step=step, metrics=METRICS, groups=groups, rewards={}, advantages={})


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False)


@pytest.mark.parametrize(
    ("mode", "terminal", "kind"),
    [
        ("auto", True, LiveConsole),
        ("auto", False, PlainConsole),
        ("live", False, LiveConsole),
        ("plain", True, PlainConsole),
        ("off", True, SilentConsole),
    ],
)
def test_each_mode_opens_its_console_and_all_take_every_call(mode, terminal, kind):
    shown = open_console(mode, INFO, console=console(terminal))
    assert type(shown) is kind
    shown.phase("generate")
    shown.progress(3, 256)
    shown.evaluation({"eval/prompts": 8.0, "eval/right_share": 0.5})
    shown.write(record(0))
    shown.close()
    shown.close()


def test_plain_lines_say_the_step_its_numbers_and_the_time_left():
    out = console(False)
    plain = open_console("plain", INFO, console=out)
    plain.phase("generate")
    plain.progress(1, 256)
    plain.write(record(0))
    plain.write(record(1))
    lines = out.file.getvalue().splitlines()
    assert len(lines) == 3  # the heading and a line a step: nothing for phases and progress
    assert lines[2].startswith("step 2/60 · reward +0.250 · right 81.0 % · flawed (oracle) 12.3 %")
    assert lines[2].endswith("ETA 1:56")
    assert "\x1b" not in out.file.getvalue()


def test_live_panel_shows_phase_progress_rate_numbers_and_time_left():
    clock, out = HandClock(), console(True)
    live = LiveConsole(INFO, Pace(60, 0), out, clock)
    live.phase("generate")
    clock.time += 2.0
    live.progress(64, 256)
    live.write(record(0))
    shot = Console(file=io.StringIO(), width=100)
    shot.print(live.panel())
    text = shot.file.getvalue()
    live.close()
    for words in ("fapo seed 2", "1/60", "64/256", "32 rollouts/s", "ETA 1:58", "81.0 %", "12.3 %", "+0.250"):
        assert words in text, text
    live.phase("update")
    shot.print(live.panel())
    assert "update" in shot.file.getvalue()


def test_a_resumed_run_counts_from_where_it_goes_on():
    out = console(False)
    open_console("plain", INFO, first_step=40, console=out).write(record(40))
    assert "step 41/60" in out.file.getvalue()


def test_durations():
    assert [duration(s) for s in (4.4, 65, 3600 * 2 + 65)] == ["4 s", "1:05", "2:01:05"]


def test_the_loop_reaches_the_plain_console(tmp_path, capsys):
    write_run(tmp_path, "fapo", 1, 2, "observe.console=plain")
    assert capsys.readouterr().out.count("\nstep ") == 2
