"""Who is judged first, and how many at a time; the judge's server lives in virtual time."""

import asyncio
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.judge.answerer import Served
from megatron_fapo.judge.ask import Asker
from megatron_fapo.judge.judge import Judge
from megatron_fapo.judge.places import Places
from megatron_fapo.judge.settings import JudgeSettings
from tests.builders import make_rollout
from tests.judge.groups import CLEAN, PROMPT, asked, judge_group, outcome, reasons, rules
from tests.virtual_time import LoopClock, ModelledServer, Words, run_virtual


def test_verdicts_in_flight_are_limited():
    server = ModelledServer(lambda request, index: (CLEAN, 10.0))
    settings = JudgeSettings(concurrency=2, probe_share=0.0)
    judge_group(list("abcd"), server=server, settings=settings, gap=0.0)
    assert [when for when, _ in asked(server)] == [0.0, 0.0, 10.0, 10.0]


def test_groups_with_a_wrong_rollout_are_judged_first():
    server = ModelledServer(lambda request, index: (CLEAN, 10.0))

    async def work():
        settings = JudgeSettings(concurrency=1, probe_share=0.0)
        judge = Judge(Asker(Served(server, Words()), settings, LoopClock(), seed=1), rules(settings), LoopClock())
        end = judge.step(2)
        groups = {name: judge.open(0, replace(PROMPT, id=name), end) for name in ("right", "mixed")}
        for number, (name, text) in enumerate(
            [("right", "a"), ("right", "b"), ("right", "c"), ("mixed", None), ("mixed", "a"), ("mixed", "b")]
        ):
            groups[name].add(make_rollout(f"{name}{number}", name, text or "x"), outcome(text is not None))
            await LoopClock().sleep(0.1)
        for group in groups.values():
            await group.verdicts()

    run_virtual(work())
    names = [name.split("-")[0].rstrip("012345") for _, name in asked(server)]
    assert names == ["right", "mixed", "mixed", "right", "right"]


def test_a_full_queue_refuses_by_name():
    server = ModelledServer(lambda request, index: (CLEAN, 10.0))
    settings = JudgeSettings(concurrency=1, queue=1, probe_share=0.0)
    verdicts, _ = judge_group(["one", "two", "three"], server=server, settings=settings, gap=0.1)
    assert reasons(verdicts) == ["verdict", "verdict", "failed"]
    assert verdicts[2].why == "queue full"


def test_the_step_s_deadline_runs_from_the_end_of_its_generation():
    """Verdicts take 10 s one after the other; generation ends at 2 s, and at 2 + 15 s only one verdict is there."""
    server = ModelledServer(lambda request, index: (CLEAN, 10.0))

    async def work():
        settings = JudgeSettings(concurrency=1, probe_share=0.0, step_deadline=15.0)
        judge = Judge(Asker(Served(server, Words()), settings, LoopClock(), seed=1), rules(settings), LoopClock())
        async with judge.step(2) as end:
            end.generated()  # another group, long before
            group = judge.open(0, PROMPT, end)
            for number, text in enumerate("abc"):
                group.add(make_rollout(f"r{number}", "p0", text), outcome(True))
            await LoopClock().sleep(2.0)
            end.generated()
            results = await group.verdicts()
        return list(results.values()), LoopClock().now()

    verdicts, now = run_virtual(work())
    assert now == 17.0
    assert reasons(verdicts) == ["verdict", "failed", "failed"]
    assert verdicts[1].why == "step deadline"


def test_a_place_given_to_one_who_leaves_at_that_moment_goes_on():
    async def work():
        places = Places(1, 10)
        await places.enter(0)
        first, second = (asyncio.ensure_future(places.enter(0)) for _ in range(2))
        await asyncio.sleep(0)
        places.leave()  # to the first, who is cancelled before it hears of it
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await asyncio.wait_for(second, 1.0)

    run_virtual(work())


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=12), st.integers(1, 3))
def test_places_are_never_lost_and_the_most_urgent_goes_first(visitors, limit):
    """Some visitors are cancelled while they wait."""
    entered = []

    async def work():
        places = Places(limit, 100)

        async def visit(number, urgency):
            await places.enter(urgency)
            entered.append((number, urgency))
            await LoopClock().sleep(1.0)
            places.leave()

        tasks = [asyncio.ensure_future(visit(n, urgency)) for n, (urgency, _) in enumerate(visitors)]
        await LoopClock().sleep(0.5)
        for task, (_, leaves) in zip(tasks, visitors, strict=True):
            if leaves and not task.done() and tasks.index(task) not in [n for n, _ in entered]:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return places._free

    assert run_virtual(work()) == limit
    waited = [urgency for _, urgency in entered[limit:]]
    assert waited == sorted(waited)
