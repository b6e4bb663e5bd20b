"""What becomes of the judge's answers, and of those that do not come; its server lives in virtual time."""

import itertools

import pytest

from megatron_fapo.errors import JudgeError, RequestRejected, ServerUnreachable
from megatron_fapo.judge.answerer import Served
from megatron_fapo.judge.ask import Asker, count_votes
from megatron_fapo.judge.judge import Judge
from megatron_fapo.judge.settings import CascadeSettings, JudgeSettings
from tests.builders import FAILED, make_group
from tests.judge.groups import CLEAN, PROMPT, SECOND_IS_WRONG, _solution, asked, judge_group, reasons, rules
from tests.virtual_time import LoopClock, ModelledServer, Words, run_virtual


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
