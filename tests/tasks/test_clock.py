"""The clock world: the oracle against brute force, the teacher's rates, the tokenizer on the ordinary road."""

import itertools
import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.critique.paragraphs import split
from megatron_fapo.critique.verdict import parse_verdict
from megatron_fapo.errors import ConfigError, TaskError
from megatron_fapo.tasks import clock_tokenizer, clock_world
from megatron_fapo.tasks.clock import ClockTask
from megatron_fapo.tasks.clock_world import Problem
from megatron_fapo.tasks.instruction import solve_prompt
from megatron_fapo.tasks.settings import ClockSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer

PROBLEM = Problem(hours=20, start=17, operations=(("+", 8), ("-", 9)), modulus=5)
CLEAN = "17 + 8 = 5\n\n5 - 9 = 16\n\n\\boxed{1}"
MIXED = ClockSettings(coarse=0.7, slip=0.35, jump=0.15)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("clock")
    clock_tokenizer.save(ClockSettings(), folder)
    return ChatTokenizer.load(folder)


@pytest.fixture(scope="module")
def task(tokenizer: ChatTokenizer) -> ClockTask:
    return ClockTask(MIXED, tokenizer, seed=1)


def problems() -> st.SearchStrategy[Problem]:
    operation = st.tuples(st.sampled_from("+-*"), st.integers(2, 9))
    return st.builds(
        Problem,
        hours=st.just(20),
        start=st.integers(0, 19),
        operations=st.lists(operation, min_size=1, max_size=6).map(tuple),
        modulus=st.sampled_from([None, 5]),
    )


@given(problems())
def test_a_question_says_everything(problem: Problem) -> None:
    assert clock_world.parse(problem.question) == problem
    value = problem.start
    for operator, operand in problem.operations:  # the same in Python's own precedence-free arithmetic
        value = {"+": value.__add__, "-": value.__sub__, "*": value.__mul__}[operator](operand)
    assert problem.reference_answer == str(value % (problem.modulus or problem.hours))


def test_other_questions_are_refused() -> None:
    with pytest.raises(TaskError, match="not a question of the clock world"):
        clock_world.parse("What is 1 + 1?")


@pytest.mark.parametrize(
    ("solution", "wrong"),
    [
        (CLEAN, -1),
        ("\n\n17 + 8 = 5\n\n\n5 - 9 = 16 \n\n\\boxed{1}\n", -1),
        ("17 + 8 = 10\n\n10 - 9 = 1\n\n\\boxed{1}", 0),
        ("17 + 8 = 5\n\n5 - 9 = 11\n\n\\boxed{1}", 1),
        ("17 + 8 = 5\n\n\\boxed{1}", 1),
        ("\\boxed{1}", 0),
        ("17 + 8 = 5\n\n5 - 9 = 16\n\n\\boxed{2}", 2),
        ("17 + 8 = 5\n\n5 - 9 = 16\n\n16 + 0 = 16\n\n\\boxed{1}", 2),
        (CLEAN + "\n\n\\boxed{1}", 3),
        ("17 + 8 = 5\n5 - 9 = 16\n\n\\boxed{1}", 0),
        ("17 + 8 5\n\n5 - 9 = 16\n\n\\boxed{1}", 0),
        ("17 + 8 = 5\n\n5 - 9 = 16", 1),
        ("", 0),
    ],
)
def test_oracle_by_hand(solution: str, wrong: int) -> None:
    assert clock_world.first_wrong(PROBLEM, solution) == wrong


def test_oracle_against_brute_force() -> None:
    """All chains of two lines over a few numbers: the first line that is false, or starts where it must not."""
    numbers = [1, 5, 6, 11, 16, 17]
    for a, b, c, d in itertools.product(numbers, repeat=4):
        lines = [f"{a} + 8 = {b}", f"{c} - 9 = {d}"]
        if (a, b) != (17, (17 + 8) % 20):
            truth = 0
        elif (c, d) != (b, (b - 9) % 20):
            truth = 1
        else:
            truth = -1
        assert clock_world.first_wrong(PROBLEM, "\n\n".join([*lines, "\\boxed{1}"])) == truth


@given(problems(), st.integers(0, 2**32))
def test_the_oracle_finds_what_was_broken(problem: Problem, seed: int) -> None:
    solution = clock_world.suspect_solution(problem, MIXED, Random(seed))
    good = split(clock_world.write(problem.steps, problem.reference_answer))
    wrong = clock_world.first_wrong(problem, solution)
    found = split(solution)
    if wrong == -1:
        assert found == good
    else:
        assert found[:wrong] == good[:wrong]
        assert found[wrong] != good[wrong]
    verdict = clock_world.critique(problem, wrong)
    assert parse_verdict(verdict, len(found)) == wrong
    assert verdict.count(" no\n") == (0 <= wrong < len(problem.operations))


async def test_the_teacher_is_as_sloppy_as_the_settings_say(task: ClockTask) -> None:
    counts: Counter[str] = Counter()
    total = 3000
    for index in range(total):
        prompt, solution = task.teacher(index)
        coarse = clock_world.parse(prompt.question).modulus is not None
        right = (await task.check(prompt, solution)).right
        wrong = task.oracle(prompt, solution)
        steps = len(clock_world.parse(prompt.question).operations)
        if len(split(solution)) <= steps:
            counts["jump"] += 1
            assert right
            assert wrong == steps - 1
        elif wrong != -1:
            counts["slip"] += 1
            assert right or not coarse, "a slip by a multiple of the modulus leaves every coarse answer right"
            counts["forgiven"] += right and not coarse  # 10 hours too many, then doubled: the clock forgets them
        counts["coarse"] += coarse
        counts[f"{steps} steps"] += 1
    assert counts["jump"] / total == pytest.approx(0.15, abs=0.03)
    assert counts["slip"] / total == pytest.approx(0.35, abs=0.04)
    assert counts["forgiven"] < 0.4 * 0.3 * counts["slip"]
    assert counts["coarse"] / total == pytest.approx(0.7, abs=0.04)
    for steps in MIXED.chain:
        assert counts[f"{steps} steps"] / total == pytest.approx(1 / 3, abs=0.04)


def test_half_of_the_judges_examples_are_clean(task: ClockTask) -> None:
    verdicts = [task.critic_example(index)[1] for index in range(2000)]
    assert sum(text.endswith("\\boxed{-1}") for text in verdicts) / 2000 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("text", "right", "why"),
    [
        (CLEAN, True, "equal"),
        ("\\boxed{ 1 }", True, "equal"),
        ("\\boxed{1} \\boxed{2}", False, "different"),
        ("17 + 8 = 5", False, "no answer"),
        ("\\boxed{1", False, "no answer"),
    ],
)
async def test_check(task: ClockTask, tokenizer: ChatTokenizer, text: str, right: bool, why: str) -> None:
    prompt = task._prompt("p0", PROBLEM)
    outcome = await task.check(prompt, text)
    assert (outcome.right, outcome.why, outcome.score) == (right, why, 1.0 if right else -1.0)


def test_prompts_depend_on_seed_and_index_alone(task: ClockTask, tokenizer: ChatTokenizer) -> None:
    again = ClockTask(MIXED, tokenizer, seed=1)
    other = ClockTask(MIXED, tokenizer, seed=2)
    backwards = {index: again.prompt(index).question for index in reversed(range(50))}
    questions = [task.prompt(index).question for index in range(50)]
    assert questions == [backwards[index] for index in range(50)]
    assert len(set(questions)) > 45
    assert questions != [other.prompt(index).question for index in range(50)]
    kept = [prompt.question for prompt in task.held_out(40)]
    assert kept == [prompt.question for prompt in other.held_out(40)]
    assert kept[:10] == [prompt.question for prompt in task.held_out(10)]
    assert not set(kept) & set(questions)
    assert task.prompt(10**12).id == "p1000000000000"
    with pytest.raises(ValueError, match="negative"):
        task.prompt(-1)


def test_everything_is_spelt_without_loss(task: ClockTask, tokenizer: ChatTokenizer) -> None:
    unknown = tokenizer.encode("?")
    for index in range(300):
        prompt, solution = task.teacher(index)
        messages, verdict = task.critic_example(index)
        for text in (solution, verdict, prompt.messages[0].content, messages[0].content):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert unknown[0] not in ids
        assert len(prompt.token_ids) <= 18
        assert len(tokenizer.encode(solution)) <= 6 * 5 + 3


@given(st.lists(st.integers(5, 36), max_size=30))
def test_whatever_a_policy_says_can_be_read_by_the_judge(tokenizer: ChatTokenizer, ids: list[int]) -> None:
    text = tokenizer.decode(ids)
    again = tokenizer.encode(text)
    assert tokenizer.decode(again) == text
    assert tokenizer.encode("?")[0] not in again


def test_the_tokenizer_is_an_ordinary_one(tmp_path: Path, task: ClockTask) -> None:
    from transformers import AutoTokenizer

    clock_tokenizer.save(ClockSettings(), tmp_path)
    ours = ChatTokenizer.load(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_ids == (theirs.eos_token_id,)
    assert len(theirs) == ours.vocab_size
    for index in range(20):
        prompt, solution = task.teacher(index)
        messages, verdict = task.critic_example(index)
        for chat in (prompt.messages, messages):
            turns = [{"role": message.role, "content": message.content} for message in chat]
            ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            assert ours.encode_chat(chat).tolist() == ids
        for text in (solution, verdict):
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.encode(text).tolist() == ids
            assert theirs.decode([*ids, theirs.eos_token_id], skip_special_tokens=True) == text


def test_a_world_that_the_tokenizer_cannot_spell_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"task\.hours=30"):
        ClockTask(ClockSettings(hours=30), tokenizer, seed=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modulus": 7}, "must divide hours"),
        ({"modulus": 20}, "must divide hours"),
        ({"slip": 0.8, "jump": 0.3}, "together at most 1"),
        ({"chain": (3, 11)}, r"in 1\.\.10"),
    ],
)
def test_settings_are_checked(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClockSettings.model_validate(values)


def test_the_example_of_the_serving_page_is_the_prompt_of_a_question_that_the_task_asks(
    tokenizer: ChatTokenizer,
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    body = json.loads(page.split("/generate -d '")[1].split("'\n")[0])
    question = body["text"].removeprefix("<|user|>").split("\n\n")[0]
    assert len(clock_world.parse(question).operations) in ClockSettings().chain
    assert body["text"] == tokenizer.render(solve_prompt(question))
    unknown = tokenizer.encode(clock_tokenizer.UNKNOWN)[0]
    assert unknown not in tokenizer.encode(body["text"])
