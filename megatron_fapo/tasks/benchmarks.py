"""Public benchmarks as held-out tasks: where their rows lie, how a row reads, when an answer is right.

A benchmark has no training stream: it is for `fapo eval --on NAME`, from the hub or from a file of the same columns.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from random import Random
from types import MappingProxyType

from megatron_fapo.critique.boxed import last_boxed
from megatron_fapo.errors import ConfigError
from megatron_fapo.records import Outcome, Prompt
from megatron_fapo.tasks import rows
from megatron_fapo.tasks.instruction import solve_prompt
from megatron_fapo.tasks.maths import Problem, check_boxed, parse_row, problem_of_texts
from megatron_fapo.tasks.maths_checker import MathsChecker
from megatron_fapo.tasks.tokenizer import ChatTokenizer

LETTERS = "ABCD"
CHOICE = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\{)?\s*\(?([A-D])\)?[.:]?\s*\}?", re.IGNORECASE)
"""A letter as models box it: `B`, `(B)`, `b.`, `\\text{B}`."""


Parse = Callable[[rows.Row, int, int], Problem]
"""(row, its number from 0, seed of the shuffle) → problem. Raises ValueError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A set of problems and how to read it."""

    source: str
    """Data set on the hub."""
    config: str
    split: str
    parse: Parse
    choices: bool = False
    """Whether the answer is one of four letters, compared as such, not by math-verify."""


def _aime(row: rows.Row, index: int, seed: int) -> Problem:
    """An integer in 0..999, which files write as 25, "25" or "025"."""
    problem = problem_of_texts(row)
    if not re.fullmatch(r"\d{1,3}", problem.answer):
        raise ValueError(f"answer must be an integer in 0..999, found {problem.answer!r:.100}")
    return Problem(question=problem.question, messages=problem.messages, answer=str(int(problem.answer)))


def _math(row: rows.Row, index: int, seed: int) -> Problem:
    return parse_row(row)


def _gpqa(row: rows.Row, index: int, seed: int) -> Problem:
    """The four options in an order that depends on the seed and the row's number alone."""
    question = rows.text_of(row, "question")
    options = [rows.text_of(row, "correct answer"), *(rows.text_of(row, f"incorrect answer {n}") for n in (1, 2, 3))]
    if not question or not all(options):
        raise ValueError(
            f"needs Question, Correct Answer and Incorrect Answer 1 to 3 as texts, found columns {sorted(row)!r:.200}"
        )
    order = list(range(len(LETTERS)))
    Random(f"gpqa/{seed}/{index}").shuffle(order)
    listed = "\n".join(f"({letter}) {options[place]}" for letter, place in zip(LETTERS, order, strict=True))
    asked = f"{question}\n\n{listed}\n\nAnswer with the letter of the correct option."
    return Problem(question=asked, messages=solve_prompt(asked), answer=LETTERS[order.index(0)])


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "aime24": Benchmark(source="HuggingFaceH4/aime_2024", config="default", split="train", parse=_aime),
        "aime25": Benchmark(source="yentinglin/aime_2025", config="default", split="train", parse=_aime),
        "math500": Benchmark(source="HuggingFaceH4/MATH-500", config="default", split="test", parse=_math),
        "gpqa-diamond": Benchmark(
            source="Idavidrein/gpqa", config="gpqa_diamond", split="train", parse=_gpqa, choices=True
        ),
    }
)


class BenchmarkTask:
    """A benchmark's problems, read once. Answers are compared by math-verify in worker processes, letters here."""

    def __init__(self, name: str, source: str | None, tokenizer: ChatTokenizer, seed: int) -> None:
        """`source` is a file or a data set of the benchmark's columns; by default the one that the hub has.

        Raises ConfigError for an unknown benchmark, DataError for rows that cannot be used.
        """
        if name not in BENCHMARKS:
            raise ConfigError(f"--on {name}: no such benchmark; known are {', '.join(BENCHMARKS)}")
        self.name = name
        self._benchmark = BENCHMARKS[name]
        self._tokenizer = tokenizer
        found = rows.read(source or self._benchmark.source, self._benchmark.config, self._benchmark.split)
        number = count()
        self._problems = rows.parse_all(found, lambda row: self._benchmark.parse(row, next(number), seed))
        self._checker = MathsChecker(workers=2, deadline=10.0)

    def prompt(self, index: int) -> Prompt:
        """Raises ConfigError: a benchmark is not trained on."""
        raise ConfigError(f"{self.name} is a benchmark: it is evaluated, never trained on")

    def held_out(self, count: int) -> list[Prompt]:
        """The first `count` problems."""
        return [
            Prompt(
                id=f"h{index}",
                task=self.name,
                question=problem.question,
                messages=problem.messages,
                token_ids=self._tokenizer.encode_chat(problem.messages),
                reference_answer=problem.answer,
            )
            for index, problem in enumerate(self._problems[:count])
        ]

    async def check(self, prompt: Prompt, text: str) -> Outcome:
        r"""Right when the last `\boxed{}` is equal to the reference answer, or names the right option."""
        if not self._benchmark.choices:
            return await check_boxed(self._checker, prompt.reference_answer, text)
        boxed = last_boxed(text)
        if boxed is None:
            return Outcome(right=False, score=-1.0, answer=None, why="no answer")
        letter = CHOICE.fullmatch(boxed.strip())
        if letter is None:
            return Outcome(right=False, score=-1.0, answer=boxed, why="unreadable")
        answer = letter[1].upper()
        right = answer == prompt.reference_answer
        return Outcome(right=right, score=1.0 if right else -1.0, answer=answer, why="equal" if right else "different")

    def oracle(self, prompt: Prompt, text: str) -> int | None:
        """None: nobody knows every step."""
        return None

    async def close(self) -> None:
        """End the worker processes."""
        await self._checker.close()
