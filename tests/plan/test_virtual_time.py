"""A loop that never sleeps: timers in order, cancelled ones without effect, an end instead of a hang."""

import asyncio
import time

import pytest

from megatron_fapo.plan.virtual_time import LoopClock, run_virtual


def test_days_pass_at_once_and_in_order() -> None:
    seen = []

    async def after(seconds: float) -> None:
        await LoopClock().sleep(seconds)
        seen.append((seconds, LoopClock().now()))

    async def work() -> None:
        await asyncio.gather(*(after(seconds) for seconds in (86400.0 * 3, 5.0, 60.0)))

    begin = time.monotonic()
    run_virtual(work())
    assert time.monotonic() - begin < 30
    assert seen == [(5.0, 5.0), (60.0, 60.0), (86400.0 * 3, pytest.approx(86400.0 * 3))]


def test_a_cancelled_timer_moves_no_clock() -> None:
    async def work() -> float:
        timer = asyncio.get_running_loop().call_later(600.0, lambda: None)
        timer.cancel()
        await asyncio.sleep(1.0)
        return LoopClock().now()

    assert run_virtual(work()) == 1.0


def test_waiting_for_nothing_is_an_error() -> None:
    async def work() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="never happen"):
        run_virtual(work())
