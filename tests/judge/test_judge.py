"""Which verdicts are asked, when, and what failures become; the judge's server lives in virtual time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.algorithm.settings import AlgorithmSettings, OverlongSettings, RewardSettings
from megatron_fapo.errors import JudgeError, RequestRejected, ServerUnreachable
from megatron_fapo.judge.ask import Asker
from megatron_fapo.judge.judge import Judge, Rules
from megatron_fapo.judge.settings import JudgeSettings
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
        asker = Asker(server, Words(), settings, LoopClock(), seed=1)
        judge = Judge(asker, rules(settings, algorithm, len(solutions))).open(0, PROMPT)
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

    judge = GroupJudge(None, rules(JudgeSettings(probe_share=share)), 0, PROMPT)
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
        asker = Asker(server, Words(), JudgeSettings(), LoopClock(), seed=1, judged=lambda *span: told.append(span))
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
    assert not rules(JudgeSettings()).matters(0, 1, [right, wrong])
    assert rules(JudgeSettings()).matters(0, 1, [right, wrong, graded])


def test_without_a_judge_right_rollouts_are_not_judged():
    async def work():
        judge = Judge(None, rules(JudgeSettings())).open(0, PROMPT)
        judge.add(make_rollout("r0", "p0"), _outcome(True))
        judge.add(make_rollout("r1", "p0"), _outcome(False))
        return await judge.verdicts()

    assert run_virtual(work()) == {"r0": NotJudged(reason="off"), "r1": NotJudged(reason="wrong")}
