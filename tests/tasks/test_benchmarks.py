"""Benchmarks from files: columns as they are published, the seeded shuffle of options, letters as models box them."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_fapo.errors import ConfigError, DataError
from megatron_fapo.tasks import clock_tokenizer
from megatron_fapo.tasks.benchmarks import BENCHMARKS, BenchmarkTask
from megatron_fapo.tasks.settings import ClockSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer

AIME = [{"id": 60, "problem": "Find m.", "solution": "so \\boxed{25}", "answer": "025"}, {"Problem": "n?", "Answer": 7}]
MATH = [
    {"problem": "Half?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1"},
    {"problem": "Both?", "solution": "see \\boxed{0}", "answer": "(1, 2)"},
]
WRONG = {f"Incorrect Answer {number}": f"no {number}" for number in (1, 2, 3)}
GPQA = [{"Question": f"Which, {number}?", "Correct Answer": f"yes {number}\n", **WRONG} for number in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    clock_tokenizer.save(ClockSettings(), folder)
    return ChatTokenizer.load(folder)


def write(path, rows):
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case _:
            columns = {key: None for row in rows for key in row}
            rows = [{key: str(row[key]) if key in row else None for key in columns} for row in rows]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_rows_are_read_from_every_kind_of_file(tmp_path, tokenizer, kind):
    aime = BenchmarkTask("aime24", write(tmp_path / f"aime.{kind}", AIME), tokenizer, seed=1).held_out(9)
    assert [(p.question, p.reference_answer) for p in aime] == [("Find m.", "25"), ("n?", "7")]
    assert aime[0].messages[0].content.endswith("within \\boxed{}.")
    maths = BenchmarkTask("math500", write(tmp_path / f"math.{kind}", MATH), tokenizer, seed=1).held_out(9)
    assert [p.reference_answer for p in maths] == ["\\frac{1}{2}", "(1, 2)"]


def test_options_are_shuffled_by_seed_and_row(tmp_path, tokenizer):
    source = write(tmp_path / "gpqa.jsonl", GPQA)
    tasks = [BenchmarkTask("gpqa-diamond", source, tokenizer, seed=seed) for seed in (1, 1, 2)]
    one, same, other = ([p.reference_answer for p in task.held_out(999)] for task in tasks)
    assert one == same != other
    assert all(30 <= one.count(letter) <= 70 for letter in "ABCD"), "no letter is favoured"
    for number, prompt in enumerate(tasks[0].held_out(999)):
        assert f"({prompt.reference_answer}) yes {number}\n" in prompt.question
        assert prompt.question.count("(") == 4


async def test_a_letter_counts_however_it_is_boxed(tmp_path, tokenizer):
    task = BenchmarkTask("gpqa-diamond", write(tmp_path / "gpqa.jsonl", GPQA), tokenizer, seed=1)
    prompt = task.held_out(1)[0]
    right = prompt.reference_answer
    wrong = "ABCD".replace(right, "")[0]
    for form in ("{}", "({})", "\\text{{{}}}", " {}. ", "\\textbf{{({})}}"):
        for letter in (right, wrong, right.lower()):
            outcome = await task.check(prompt, f"so \\boxed{{{form.format(letter)}}}")
            assert (outcome.right, outcome.answer) == (letter.upper() == right, letter.upper()), form
    assert (await task.check(prompt, right)).why == "no answer"
    assert (await task.check(prompt, f"\\boxed{{{right} or {wrong}}}")).why == "unreadable"
    await task.close()


def test_what_cannot_be_a_benchmark_is_named(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"--on aime23: .*aime24"):
        BenchmarkTask("aime23", None, tokenizer, seed=1)
    with pytest.raises(DataError, match=r"line 2: answer must be an integer"):
        BenchmarkTask("aime24", write(tmp_path / "a.jsonl", [AIME[0], {"problem": "p", "answer": "1/2"}]), tokenizer, 1)
    with pytest.raises(DataError, match=r"row 1: needs Question"):
        BenchmarkTask("gpqa-diamond", write(tmp_path / "g.json", [{"Question": "q"}]), tokenizer, 1)
    with pytest.raises(ConfigError, match="never trained on"):
        BenchmarkTask("aime24", write(tmp_path / "b.jsonl", AIME), tokenizer, 1).prompt(0)
    assert set(BENCHMARKS) == {"aime24", "aime25", "math500", "gpqa-diamond"}
