"""Which verdicts are asked; the judge's server lives in virtual time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.algorithm.rewards import PERFECT, Rates
from megatron_fapo.algorithm.settings import AlgorithmSettings, OverlongSettings, RewardSettings
from megatron_fapo.judge.judge import Judge, StepEnd
from megatron_fapo.judge.settings import JudgeSettings
from megatron_fapo.records import NotJudged, Outcome, Verdict
from tests.builders import make_rollout
from tests.judge.groups import CLEAN, PROMPT, asked, judge_group, outcome, reasons, rules
from tests.virtual_time import LoopClock, run_virtual


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


def test_a_graded_task_is_judged_where_a_skip_would_lose_something():
    right = (make_rollout("r0", "p0", "one"), outcome(True))
    wrong = (make_rollout("r1", "p0", "two"), outcome(False))
    graded = (make_rollout("r2", "p0", "three"), Outcome(right=False, score=0.75, answer="", why=""))
    assert not rules(JudgeSettings()).matters(0, 1, [right, wrong], PERFECT)
    assert rules(JudgeSettings()).matters(0, 1, [right, wrong, graded], PERFECT)


def test_without_a_judge_right_rollouts_are_not_judged():
    async def work():
        judge = Judge(None, rules(JudgeSettings())).open(0, PROMPT, StepEnd(LoopClock(), None, 1))
        judge.add(make_rollout("r0", "p0"), outcome(True))
        judge.add(make_rollout("r1", "p0"), outcome(False))
        return await judge.verdicts()

    assert run_virtual(work()) == {"r0": NotJudged(reason="off"), "r1": NotJudged(reason="wrong")}


def test_a_correction_by_measured_rates_that_makes_the_skip_lossy_switches_it_off():
    """λ = 1 over J = 0.45 takes more than 2 from a flagged answer, which may then be worse than a wrong one."""
    algorithm = AlgorithmSettings(reward=RewardSettings(correct_rates=True))
    landed = [(make_rollout("r0", "p0", "one"), outcome(True)), (make_rollout("r1", "p0", "x"), outcome(False))]
    judging = rules(JudgeSettings(), algorithm)
    assert not judging.matters(0, 1, landed, Rates(tpr=0.9, fpr=0.05))
    assert judging.matters(0, 1, landed, Rates(tpr=0.5, fpr=0.05))
