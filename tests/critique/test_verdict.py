r"""Reading verdicts and answers, and what a verdict earns (Eq. 7)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.critique.boxed import last_boxed
from megatron_fapo.critique.reward import judge_reward
from megatron_fapo.critique.verdict import TAIL, parse_verdict


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("All fine. \\boxed{-1}", -1),
        ("\\boxed{2}", 2),
        ("\\boxed{ 0 }.", 0),
        ("First \\boxed{1}, no: \\boxed{-1}", -1),
        ("Paragraph 2 is wrong", "no box"),
        ("\\boxed{1" + "x" * 400, "no box"),
        ("\\boxed{2}" + "x" * 400, "no box"),
        ("\\boxed{2}" + "x" * 291, 2),
        ("\\boxed{2}" + "x" * 292, "no box"),
        ("\\boxed{1", "box not closed"),
        ("\\boxed{1} or \\boxed{2", "box not closed"),
        ("\\boxed{}", "not an integer"),
        ("\\boxed{1.0}", "not an integer"),
        ("\\boxed{\\text{1}}", "not an integer"),
        ("\\boxed{1 + 1}", "not an integer"),
        ("\\boxed{__import__('os')}", "not an integer"),
        ("\\boxed{-0}", "not an integer"),
        ("\\boxed{01}", "not an integer"),
        ("\\boxed{1_0}", "not an integer"),
        ("\\boxed{١}", "not an integer"),
        ("\\boxed{99999999999999999999}", "not an integer"),
        ("\\boxed{3}", "out of range"),
        ("\\boxed{-2}", "out of range"),
        (" \n", "empty"),
    ],
)
def test_parse_verdict(text: str, expected: int | str) -> None:
    assert parse_verdict(text, 3) == expected


def test_no_verdict_without_paragraphs() -> None:
    assert parse_verdict("\\boxed{-1}", 0) == "no paragraphs"


@given(st.integers(-3, 12), st.integers(1, 9), st.text(max_size=20), st.integers(0, 2 * TAIL))
def test_an_index_is_read_exactly_where_it_may_stand(index: int, paragraphs: int, before: str, behind: int) -> None:
    box = f"\\boxed{{{index}}}"
    verdict = parse_verdict(before + box + "x" * behind, paragraphs)
    if len(box) + behind > TAIL:
        assert isinstance(verdict, str)
    else:
        assert verdict == (index if -1 <= index < paragraphs else "out of range")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"),
        ("\\boxed{a} \\boxed{b}", "b"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{}", ""),
        ("\\boxed{{1}", None),
        ("\\boxed{1\\", None),
        ("boxed{1}", None),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("predicted", "truth", "reward"),
    [
        ("no box", -1, -1.0),
        ("out of range", 2, -1.0),
        (-1, -1, 1.0),
        (0, -1, -1.0),
        (-1, 2, -1.0),
        (2, 2, 1.0),
        (1, 2, 0.75),
        (0, 3, 0.25),
        (3, 0, 0.25),
    ],
)
def test_judge_reward(predicted: int, truth: int, reward: float) -> None:
    assert judge_reward(predicted, truth, 4) == reward


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(-1, n - 1), st.integers(-1, n - 1))))
def test_judge_reward_is_best_for_the_truth(case: tuple[int, int, int]) -> None:
    paragraphs, truth, predicted = case
    reward = judge_reward(predicted, truth, paragraphs)
    assert -1.0 <= reward <= 1.0
    assert (reward == 1.0) == (predicted == truth)
    if (predicted == -1) == (truth == -1):
        assert reward > 0
    else:
        assert reward == -1.0


def test_judge_reward_refuses_an_impossible_truth() -> None:
    with pytest.raises(ValueError, match="truth 4"):
        judge_reward(0, 4, 4)
