"""Tasks `math` and `critique`: rows from files and data sets, answers compared, bad rows named."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_fapo.errors import ConfigError, DataError
from megatron_fapo.records import Message
from megatron_fapo.tasks import clock_tokenizer
from megatron_fapo.tasks.critic import CritiqueTask
from megatron_fapo.tasks.maths import MathTask
from megatron_fapo.tasks.maths_checker import MathsChecker
from megatron_fapo.tasks.registry import open_task
from megatron_fapo.tasks.settings import ClockSettings, CritiqueSettings, MathSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    clock_tokenizer.save(ClockSettings(), folder)
    return ChatTokenizer.load(folder)


def ecosystem_row(index: int) -> dict[str, object]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"What is {index} + 1?{INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(index + 1)},
        "extra_info": {"split": "train", "index": index, "question": f"What is {index} + 1?"},
    }


def processed_row(index: int) -> dict[str, object]:
    return {"prompt": f"What is {index} + 1?", "solution": str(index + 1), "data_source": "math_dapo"}


def write_lines(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, object]]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("make", [ecosystem_row, processed_row])
@pytest.mark.parametrize(("write", "name"), [(write_lines, "rows.jsonl"), (write_parquet, "rows.parquet")])
def test_math_rows(tmp_path: Path, tokenizer: ChatTokenizer, make, write, name: str) -> None:
    source = write(tmp_path / name, [make(index) for index in range(12)])
    task = open_task(MathSettings(train=source, held_out_rows=4), tokenizer, seed=3)
    first, second = ([task.prompt(8 * turn + index) for index in range(8)] for turn in range(2))
    questions = [f"What is {index} + 1?" for index in range(12)]
    assert sorted(prompt.question for prompt in first) == sorted(questions[:8])
    assert sorted(prompt.question for prompt in second) == sorted(questions[:8])
    assert [prompt.question for prompt in first] != [prompt.question for prompt in second], "a new order each time"
    assert [prompt.question for prompt in task.held_out(100)] == questions[8:]
    for prompt in first:
        assert prompt.messages == (Message(role="user", content=prompt.question + INSTRUCTION),)
        assert int(prompt.reference_answer) == int(prompt.question.split()[2]) + 1
    assert task.oracle(first[0], "") is None


def test_math_streams_depend_on_the_seed(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    settings = MathSettings(
        train=write_lines(tmp_path / "r.jsonl", [processed_row(i) for i in range(40)]), held_out_rows=4
    )
    one, same, other = (MathTask(settings, tokenizer, seed) for seed in (1, 1, 2))
    order = [one.prompt(index).question for index in range(60)]
    assert order == [same.prompt(index).question for index in reversed(range(60))][::-1]
    assert order != [other.prompt(index).question for index in range(60)]
    assert [p.question for p in one.held_out(4)] == [p.question for p in other.held_out(4)]


def test_a_data_set_is_read_as_from_the_hub_and_without_torch(tmp_path: Path) -> None:
    """A folder in the hub's layout, with a configuration named as in open-r1/DAPO-Math-17k-Processed."""
    (tmp_path / "all").mkdir()
    write_parquet(tmp_path / "all" / "train-00000-of-00001.parquet", [processed_row(index) for index in range(3)])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: all\n  data_files:\n  - split: train\n    path: all/train-*\n---\n"
    )
    code = (
        "import sys; from megatron_fapo.tasks import maths, rows;"
        "found = rows.parse_all(rows.read(sys.argv[1], 'all'), maths.parse_row);"
        "print(*[problem.answer for problem in found], 'torch' in sys.modules)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == ["1", "2", "3", "False"]


def test_an_unknown_data_set_is_named(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="no-such-folder"):
        MathTask(MathSettings(train=str(tmp_path / "no-such-folder")), tokenizer, seed=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: must be a JSON object"),
        ('{"prompt": "q"}', "line 2: solution must be"),
        ('{"prompt": "q", "solution": " "}', "line 2: solution must be"),
        ('{"solution": "1"}', "line 2: prompt must be a list"),
        ('{"prompt": [{"role": "user", "content": "q"}]}', "line 2: reward_model"),
        (
            '{"prompt": [{"role": "robot", "content": "q"}], "reward_model": {"ground_truth": "1"}}',
            "line 2: prompt must",
        ),
        ('{"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": ""}}', "line 2: .*is empty"),
    ],
)
def test_bad_math_rows_are_named(tmp_path: Path, tokenizer: ChatTokenizer, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(processed_row(1)) + "\n" + line + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl, {message}"):
        MathTask(MathSettings(train=str(path), held_out_rows=1), tokenizer, seed=1)


def test_files_that_do_not_fit_are_named(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match=r"missing\.parquet: no such file"):
        MathTask(MathSettings(train=str(tmp_path / "missing.parquet")), tokenizer, seed=1)
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"text\.parquet: not a parquet file"):
        MathTask(MathSettings(train=str(tmp_path / "text.parquet")), tokenizer, seed=1)
    source = write_lines(tmp_path / "short.jsonl", [processed_row(index) for index in range(5)])
    with pytest.raises(ConfigError, match="only 5 training rows"):
        MathTask(MathSettings(train=source, held_out_rows=5), tokenizer, seed=1)
    with pytest.raises(ConfigError, match="no task for dict"):
        open_task({"name": "chess"}, tokenizer, seed=1)


@pytest.fixture(scope="module")
async def checker() -> AsyncIterator[MathsChecker]:
    checker = MathsChecker(workers=1, deadline=20.0)
    yield checker
    await checker.close()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("34", "34", "equal"),
        ("34", "34.0", "equal"),
        ("34", "35", "different"),
        ("1/2", "\\frac{1}{2}", "equal"),
        ("\\frac{1}{2}", "0.5", "equal"),
        ("1000", "1,000", "equal"),
        ("2\\sqrt{2}", "\\sqrt{8}", "equal"),
        ("\\{1, 2\\}", "\\{2, 1\\}", "equal"),
        ("x^2 + 2x + 1", "(x+1)^2", "equal"),
        ("\\pi", "3.14", "different"),
        ("-3", "3", "different"),
        ("A", "A", "equal"),
        ("34", "", "unreadable"),
        ("34", "__import__('os').system('exit')", "different"),
    ],
)
async def test_math_verify(checker: MathsChecker, reference: str, answer: str, expected: str) -> None:
    assert await checker.compare(reference, answer) == expected


async def test_a_hostile_answer_costs_its_deadline_and_nothing_else() -> None:
    checker = MathsChecker(workers=1, deadline=1.0)
    try:
        assert await checker.compare("3", "3.0") == "equal"
        before = checker._workers[0]._process
        hostile = ["9^{9^{9^{9^{9}}}}", "3.0", "(" * 3000 + "1" + ")" * 3000]
        first, then, last = await asyncio.gather(*(checker.compare("3", answer) for answer in hostile))
        assert first in ("timeout", "unreadable")
        assert then == "equal"
        assert last in ("timeout", "unreadable", "different")
        after = checker._workers[0]._process
        assert before is not None
        assert before.returncode is not None or before is after
        assert await checker.compare("3", "3.0") == "equal"
    finally:
        await checker.close()


async def test_a_hanging_worker_is_killed_and_replaced() -> None:
    """The worker is stopped from outside (SIGSTOP), which no expression could undo."""
    checker = MathsChecker(workers=1, deadline=1.0)
    try:
        assert await checker.compare("3", "3.0") == "equal"
        stopped = checker._workers[0]._process
        assert stopped is not None
        stopped.send_signal(19)
        assert await checker.compare("3", "3.0") == "timeout"
        assert stopped.returncode == -9
        assert await checker.compare("3", "3.0") == "equal"
    finally:
        await checker.close()
    assert checker._workers[0]._process is None


async def test_a_cancelled_comparison_does_not_answer_the_next_one() -> None:
    checker = MathsChecker(workers=1, deadline=20.0)
    try:
        assert await checker.compare("3", "3.0") == "equal"
        cancelled = asyncio.create_task(checker.compare("3", "9^{9^{9}}"))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await checker.compare("3", "4") == "different"
        assert await checker.compare("3", "3.0") == "equal"
    finally:
        await checker.close()


async def test_math_check(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [processed_row(index) for index in range(3)])
    task = MathTask(MathSettings(train=source, held_out_rows=1), tokenizer, seed=1)
    try:
        prompt = task.prompt(0)
        right = prompt.reference_answer
        good = await task.check(prompt, f"So \\boxed{{7}}, no: \\boxed{{\\frac{{{right}}}{{1}}}}")
        assert (good.right, good.score, good.answer, good.why) == (True, 1.0, f"\\frac{{{right}}}{{1}}", "equal")
        bad = await task.check(prompt, f"So {right}, or \\boxed{{99}}")
        assert (bad.right, bad.score, bad.answer, bad.why) == (False, -1.0, "99", "different")
        none = await task.check(prompt, f"It is {right}.")
        assert (none.right, none.score, none.answer, none.why) == (False, -1.0, None, "no answer")
    finally:
        await task.close()


def critic_row(index: int, truth: object = 1, steps: object = 4) -> dict[str, object]:
    return {
        "data_source": "fapo_critic",
        "prompt": [{"content": f"Judge {index}", "role": "user"}],
        "ability": "math_critic",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"question_index": index, "split": "train", "total_steps": steps},
    }


@pytest.mark.parametrize(
    ("text", "right", "score", "why"),
    [
        ("\\boxed{1}", True, 1.0, "equal"),
        ("\\boxed{3}", False, 0.5, "different"),
        ("\\boxed{-1}", False, -1.0, "different"),
        ("\\boxed{4}", False, -1.0, "out of range"),
        ("one", False, -1.0, "no box"),
    ],
)
async def test_critique(
    tmp_path: Path, tokenizer: ChatTokenizer, text: str, right: bool, score: float, why: str
) -> None:
    source = write_lines(tmp_path / "critic.jsonl", [critic_row(index) for index in range(6)])
    task = open_task(CritiqueSettings(train=Path(source), held_out_rows=2), tokenizer, seed=1)
    for prompt in (task.prompt(7), task.held_out(2)[1]):
        outcome = await task.check(prompt, text)
        assert (outcome.right, outcome.score, outcome.why) == (right, score, why)
    assert [prompt.question for prompt in task.held_out(9)] == ["Judge 4", "Judge 5"]


async def test_critique_knows_each_rows_truth(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write_lines(tmp_path / "critic.jsonl", [critic_row(i, truth=i % 5 - 1, steps=4 + i) for i in range(9)])
    task = CritiqueTask(CritiqueSettings(train=Path(source), held_out_rows=2), tokenizer, seed=1)
    for prompt in [*(task.prompt(index) for index in range(14)), *task.held_out(2)]:
        row = int(prompt.question.removeprefix("Judge "))
        assert prompt.reference_answer == str(row % 5 - 1)
        assert (await task.check(prompt, f"\\boxed{{{3 + row}}}")).why in ("equal", "different")
        assert (await task.check(prompt, f"\\boxed{{{4 + row}}}")).why == "out of range"


@pytest.mark.parametrize(("truth", "steps"), [(4, 4), (-2, 4), ("1", 4), (None, 4), (1.5, 4), (1, None), (1, 0)])
def test_bad_critique_rows_are_named(tmp_path: Path, tokenizer: ChatTokenizer, truth: object, steps: object) -> None:
    source = write_lines(tmp_path / "critic.jsonl", [critic_row(0), critic_row(1, truth, steps)])
    with pytest.raises(DataError, match=r"critic\.jsonl, line 2: (reward_model|extra_info)"):
        CritiqueTask(CritiqueSettings(train=Path(source), held_out_rows=1), tokenizer, seed=1)


def test_the_authors_rows(tokenizer: ChatTokenizer, fapo_critic_sample: Path) -> None:
    settings = CritiqueSettings(train=fapo_critic_sample, held_out_rows=10)
    task = CritiqueTask(settings, tokenizer, seed=1)
    prompts = [task.prompt(index) for index in range(90)] + task.held_out(10)
    assert len({prompt.question for prompt in prompts}) == 100
    assert sum(prompt.reference_answer == "-1" for prompt in prompts) == 50
