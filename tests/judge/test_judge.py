"""Which verdicts are asked, when, and what failures become; the judge's server lives in virtual time."""

import asyncio
import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.algorithm.rewards import PERFECT, Rates
from megatron_fapo.algorithm.settings import AlgorithmSettings, OverlongSettings, RewardSettings
from megatron_fapo.errors import JudgeError, RequestRejected, ServerUnreachable
from megatron_fapo.judge.answerer import Served
from megatron_fapo.judge.ask import Asker, count_votes
from megatron_fapo.judge.judge import Judge, Rules, StepEnd
from megatron_fapo.judge.places import Places
from megatron_fapo.judge.settings import CascadeSettings, JudgeSettings
from megatron_fapo.records import NotJudged, Outcome, Prompt, Verdict, ints
from tests.builders import FAILED, make_group, make_rollout
from tests.virtual_time import LoopClock, ModelledServer, Words, run_virtual

PROMPT = Prompt(id="p0", task="clock", question="q", messages=(), token_ids=ints([1]), reference_answer="3")
CLEAN = r"all good, \boxed{-1}"
SECOND_IS_WRONG = r"look at 1: \boxed{1}"


def rules(judge: JudgeSettings, algorithm: AlgorithmSettings | None = None, size: int = 8) -> Rules:
    return Rules(judge=judge, algorithm=algorithm or AlgorithmSettings(), group_size=size, max_tokens=100)


def judge_group(solutions, *, server=None, answers=None, settings=None, algorithm=None, gap=1.0):
    """Feed (text or None for a wrong answer) one each `gap` seconds; returns verdicts by rollout number, server."""
    settings = settings or JudgeSettings(probe_share=0.0)
    server = server or ModelledServer(lambda request, index: ((answers or {}).get(_solution(request), CLEAN), 5.0))

    async def work():
        asker = Asker(Served(server, Words()), settings, LoopClock(), seed=1)
        whole = Judge(asker, rules(settings, algorithm, len(solutions)), LoopClock())
        judge = whole.open(0, PROMPT, whole.step(1))
        for number, text in enumerate(solutions):
            await LoopClock().sleep(gap)
            judge.add(make_rollout(f"r{number}", "p0", text or "nonsense"), _outcome(text is not None))
        results = await judge.verdicts()
        return [results[f"r{number}"] for number in range(len(solutions))]

    return run_virtual(work()), server


def _solution(request) -> str:
    text = Words().decode(request.token_ids)
    return text.split("<paragraph_0>\n")[1].split("\n")[0]


def _outcome(right: bool) -> Outcome:
    return Outcome(right=right, score=1.0 if right else -1.0, answer="", why="")


def reasons(verdicts) -> list[str]:
    return ["verdict" if isinstance(v, Verdict) else v.reason for v in verdicts]


def asked(server) -> list[tuple[float, str]]:
    return [(when, name) for when, what, name in server.log if what == "asked"]


def test_the_first_right_rollout_waits_for_the_second_and_no_other_does():
    verdicts, server = judge_group(["one", None, "two", "three", None])
    assert reasons(verdicts) == ["verdict", "wrong", "verdict", "verdict", "wrong"]
    assert asked(server) == [(3.0, "r0-judge-a0-v0"), (3.0, "r2-judge-a0-v0"), (4.0, "r3-judge-a0-v0")]


def test_a_single_right_rollout_is_skipped():
    verdicts, server = judge_group([None, "one", None])
    assert reasons(verdicts) == ["wrong", "skipped", "wrong"]
    assert server.log == []


def test_identical_solutions_share_one_verdict_and_alone_need_none():
    verdicts, server = judge_group(["one", "one", "one", None])
    assert reasons(verdicts) == ["skipped"] * 3 + ["wrong"]
    assert server.log == []
    verdicts, server = judge_group(["one", "one", "two", None], answers={"two": CLEAN, "one": r"\boxed{0}"})
    assert [v.first_wrong for v in verdicts[:3]] == [0, 0, -1]
    assert len(asked(server)) == 2


@pytest.mark.parametrize(
    "reward",
    [RewardSettings(flaw_penalty=2.5), RewardSettings(overlong=OverlongSettings(buffer=98))],
    ids=["large penalty", "shaping acts in this group"],
)
def test_where_a_skip_would_lose_something_the_only_right_rollout_is_judged(reward):
    verdicts, _ = judge_group([None, "one"], algorithm=AlgorithmSettings(reward=reward))
    assert reasons(verdicts) == ["wrong", "verdict"]


def test_probes_are_for_the_metrics_alone():
    verdicts, server = judge_group(["one", None], settings=JudgeSettings(probe_share=1.0))
    assert verdicts[0].reason == "skipped"
    assert verdicts[0].probe == Verdict(first_wrong=-1, p_flawed=0.0, votes=1, tokens=len(CLEAN) + 1, text=CLEAN)
    assert len(asked(server)) == 1


@given(st.floats(0.05, 0.95))
def test_the_share_of_probes_is_the_configured_one(share):
    from megatron_fapo.judge.judge import GroupJudge

    judge = GroupJudge(None, rules(JudgeSettings(probe_share=share)), 0, PROMPT, StepEnd(LoopClock(), None, 1), PERFECT)
    drawn = sum(judge._drawn(make_rollout(f"s0-p{i}-r0", "p")) for i in range(500))
    assert abs(drawn / 500 - share) < 0.1


def test_a_verdict_that_comes_too_late_is_a_failed_one():
    server = ModelledServer(lambda request, index: (CLEAN, 50.0))
    verdicts, _ = judge_group(["one", "two"], server=server, settings=JudgeSettings(deadline=10.0))
    assert [(v.reason, v.why) for v in verdicts] == [("failed", "deadline")] * 2


def test_an_unreachable_server_is_asked_again_and_a_refusal_is_not():
    server = ModelledServer(lambda request, index: (CLEAN, 1.0), failures=[ServerUnreachable("gone")] * 2)
    verdicts, server = judge_group(["one", "two"], server=server)
    assert reasons(verdicts) == ["verdict", "verdict"]
    assert len(asked(server)) == 4
    server = ModelledServer(lambda request, index: (CLEAN, 1.0), failures=[RequestRejected("too long")])
    verdicts, server = judge_group(["one", "two"], server=server)
    assert sorted(reasons(verdicts)) == ["failed", "verdict"]
    assert len(asked(server)) == 2


@pytest.mark.parametrize("text", ["no box", r"\boxed{7}", r"\boxed{-2}", r"\boxed{x}", ""])
def test_an_unusable_verdict_fails_and_is_never_clean(text):
    verdicts, _ = judge_group(["one", "two"], answers={"one": text, "two": CLEAN})
    assert reasons(verdicts) == ["failed", "verdict"]
    assert verdicts[0].tokens == len(text) + 1


def test_with_sampling_an_unusable_verdict_is_asked_again_with_another_seed():
    seeds, texts = [], iter(["no box", CLEAN, CLEAN])

    def answer(request, index):
        seeds.append(request.seeds[index])
        return next(texts), 1.0

    settings = JudgeSettings(temperature=1.0, probe_share=0.0, concurrency=1)
    verdicts, _ = judge_group(["one", "two"], server=ModelledServer(answer), settings=settings)
    assert reasons(verdicts) == ["verdict", "verdict"]
    assert len(set(seeds)) == 3


@pytest.mark.parametrize(
    ("votes", "first_wrong", "p_flawed"),
    [([1, 1, -1], 1, 2 / 3), ([-1, -1, 0], -1, 1 / 3), ([0, 1, -1], 0, 2 / 3), ([0, -1, None], 0, 0.5)],
)
def test_the_majority_decides_and_a_tie_counts_as_flagged(votes, first_wrong, p_flawed):
    def answer(request, index):
        return ("no box" if votes[index] is None else rf"\boxed{{{votes[index]}}}"), 1.0

    settings = JudgeSettings(votes=3, temperature=1.0, probe_share=0.0)
    verdicts, _ = judge_group(["one\n\nb", "two\n\nb"], server=ModelledServer(answer), settings=settings)
    assert verdicts[0].first_wrong == first_wrong
    assert verdicts[0].p_flawed == pytest.approx(p_flawed)


def test_verdicts_in_flight_are_limited():
    server = ModelledServer(lambda request, index: (CLEAN, 10.0))
    settings = JudgeSettings(concurrency=2, probe_share=0.0)
    judge_group(list("abcd"), server=server, settings=settings, gap=0.0)
    assert [when for when, _ in asked(server)] == [0.0, 0.0, 10.0, 10.0]


def test_the_time_at_the_judge_is_told():
    told = []

    async def work():
        server = ModelledServer(lambda request, index: (CLEAN, 5.0))
        asker = Asker(
            Served(server, Words()), JudgeSettings(), LoopClock(), seed=1, judged=lambda *span: told.append(span)
        )
        await LoopClock().sleep(2.0)
        await asker.ask(PROMPT, "one", "r0")

    run_virtual(work())
    assert told == [(2.0, 7.0)]


def test_the_seed_of_a_verdict_does_not_depend_on_who_came_first():
    seeds = []

    def answer(request, index):
        seeds.append((_solution(request), request.seeds[index]))
        return CLEAN, 1.0

    for order in (["one", "two", "one"], ["two", "one", "two"]):
        judge_group(order, server=ModelledServer(answer))
    assert sorted(seeds[:2]) == sorted(seeds[2:])


def test_a_step_with_too_many_failures_stops_the_run_by_name():
    judge = Judge(None, rules(JudgeSettings()))
    judge.check([make_group([FAILED] * 2), make_group(["clean"] * 8), make_group(["clean"] * 8)])
    with pytest.raises(JudgeError, match="18 of 26 verdicts failed"):
        judge.check([make_group([FAILED] * 18), make_group(["clean"] * 8)])


def test_failures_are_counted_over_steps_until_there_are_enough_to_tell():
    judge = Judge(None, rules(JudgeSettings()))
    for _ in range(3):
        judge.check([make_group([FAILED] * 5)])
    with pytest.raises(JudgeError, match="20 of 20 verdicts failed"):
        judge.check([make_group([FAILED] * 5)])


def test_a_graded_task_is_judged_where_a_skip_would_lose_something():
    right = (make_rollout("r0", "p0", "one"), _outcome(True))
    wrong = (make_rollout("r1", "p0", "two"), _outcome(False))
    graded = (make_rollout("r2", "p0", "three"), Outcome(right=False, score=0.75, answer="", why=""))
    assert not rules(JudgeSettings()).matters(0, 1, [right, wrong], PERFECT)
    assert rules(JudgeSettings()).matters(0, 1, [right, wrong, graded], PERFECT)


def test_without_a_judge_right_rollouts_are_not_judged():
    async def work():
        judge = Judge(None, rules(JudgeSettings())).open(0, PROMPT, StepEnd(LoopClock(), None, 1))
        judge.add(make_rollout("r0", "p0"), _outcome(True))
        judge.add(make_rollout("r1", "p0"), _outcome(False))
        return await judge.verdicts()

    assert run_virtual(work()) == {"r0": NotJudged(reason="off"), "r1": NotJudged(reason="wrong")}


def scored(clean: float, **settings) -> tuple[JudgeSettings, ModelledServer]:
    """A judge that finds every solution clean with this probability, and flags all at length."""
    server = ModelledServer(
        lambda request, index: (SECOND_IS_WRONG, 5.0),
        likely=lambda text: {"-": clean, "0": (1 - clean) / 4, "1": 3 * (1 - clean) / 4},
    )
    return JudgeSettings(probe_share=0.0, cascade=CascadeSettings(**settings)), server


@pytest.mark.parametrize(("clean", "first_wrong", "short"), [(0.99, -1, True), (0.7, 1, False), (0.01, 1, True)])
def test_the_cascade_ends_clear_cases_and_asks_about_the_others(clean, first_wrong, short):
    settings, server = scored(clean, clean_below=0.05, flawed_above=0.95)
    verdicts, _ = judge_group(["one\n\nb", "two\n\nb"], server=server, settings=settings)
    assert [(v.first_wrong, v.short) for v in verdicts] == [(first_wrong, short)] * 2
    assert len(asked(server)) == (0 if short else 2)
    assert verdicts[0].tokens == 1 if short else verdicts[0].tokens > 1
    if short:
        assert verdicts[0].p_flawed == pytest.approx(1 - clean)


def test_without_an_upper_threshold_no_flag_is_short():
    settings, server = scored(0.01, clean_below=0.05)
    verdicts, _ = judge_group(["one\n\nb", "two\n\nb"], server=server, settings=settings)
    assert not verdicts[0].short
    assert verdicts[0].flawed


def test_a_score_that_does_not_come_leads_to_the_long_verdict():
    settings, server = scored(0.99, clean_below=0.05)
    server.failures += [ServerUnreachable("down")]
    verdicts, _ = judge_group(["one\n\nb", "two\n\nb"], server=server, settings=settings)
    assert [v.short for v in verdicts] == [False, True]


def test_the_probability_of_the_verdict_s_token_is_asked_after_the_reasoning():
    seen = []

    def likely(text):
        seen.append(text)
        return {"-": 0.2, "0": 0.1, "1": 0.5}

    server = ModelledServer(lambda request, index: (SECOND_IS_WRONG, 5.0), likely=likely)
    settings = JudgeSettings(probe_share=0.0, probability="token")
    verdicts, _ = judge_group(["one\n\nb", "two\n\nb"], server=server, settings=settings)
    assert verdicts[0].p_flawed == pytest.approx(0.75)
    assert verdicts[0].first_wrong == 1
    assert all(text.endswith("look at 1: \\boxed{") for text in seen)


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
            groups[name].add(make_rollout(f"{name}{number}", name, text or "x"), _outcome(text is not None))
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
                group.add(make_rollout(f"r{number}", "p0", text), _outcome(True))
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


def test_errors_on_purpose_come_at_their_rates_and_are_the_same_for_the_same_solution():
    server = ModelledServer(lambda request, index: (SECOND_IS_WRONG if "bad" in _solution(request) else CLEAN, 1.0))
    settings = JudgeSettings(probe_share=0.0, errors={"missed": 0.3, "invented": 0.1})
    solutions = [f"{kind} {number}\n\nb" for number in range(400) for kind in ("bad", "good")]
    first, _ = judge_group(solutions, server=server, settings=settings, gap=0.0)
    missed = sum(not verdict.flawed for verdict in first[0::2]) / 400
    false = sum(verdict.flawed for verdict in first[1::2]) / 400
    assert missed == pytest.approx(0.3, abs=0.07)
    assert false == pytest.approx(0.1, abs=0.05)
    assert {verdict.p_flawed for verdict in first if not verdict.flawed} == {0.0}
    again, _ = judge_group(solutions[::-1], server=server, settings=settings, gap=0.0)
    assert [v.first_wrong for v in again[::-1]] == [v.first_wrong for v in first]


def test_each_vote_errs_by_itself():
    """Of three votes that are each turned round in 3 of 10, two in 21.6 %."""
    server = ModelledServer(lambda request, index: (SECOND_IS_WRONG, 1.0))
    settings = JudgeSettings(probe_share=0.0, votes=3, temperature=1.0, errors={"missed": 0.3})
    found, _ = judge_group([f"bad {number}\n\nb" for number in range(1000)], server=server, settings=settings, gap=0.0)
    assert {round(3 * verdict.p_flawed, 6) for verdict in found} == {0.0, 1.0, 2.0, 3.0}
    assert sum(verdict.p_flawed for verdict in found) / 1000 == pytest.approx(0.7, abs=0.03)
    assert sum(not verdict.flawed for verdict in found) / 1000 == pytest.approx(0.216, abs=0.04)


def test_in_which_order_votes_come_makes_no_difference():
    texts = [(rf"{words} \boxed{{{index}}}", True) for words, index in (("b", 1), ("a", 2), ("c", -1), ("a", 1))]
    texts.append(("no box", True))
    spoil = lambda indices: [-1, *indices[1:]]  # noqa: E731 - the first that is counted, whichever came first
    found = {str(count_votes(list(order), 3, 7, spoil=spoil)) for order in itertools.permutations(texts)}
    assert len(found) == 1


def test_a_correction_by_measured_rates_that_makes_the_skip_lossy_switches_it_off():
    """λ = 1 over J = 0.45 takes more than 2 from a flagged answer, which may then be worse than a wrong one."""
    algorithm = AlgorithmSettings(reward=RewardSettings(correct_rates=True))
    landed = [(make_rollout("r0", "p0", "one"), _outcome(True)), (make_rollout("r1", "p0", "x"), _outcome(False))]
    judging = rules(JudgeSettings(), algorithm)
    assert not judging.matters(0, 1, landed, Rates(tpr=0.9, fpr=0.05))
    assert judging.matters(0, 1, landed, Rates(tpr=0.5, fpr=0.05))
