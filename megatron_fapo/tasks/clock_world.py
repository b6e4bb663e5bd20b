"""The clock world: chains of arithmetic on a clock, a sloppy teacher, and an oracle that knows every step. Pure.

    question   Compute on a 20-hour clock: 17 + 8 - 9 = ? (mod 5)
    solution   17 + 8 = 5        one paragraph a step, from left to right
               5 - 9 = 16
               \\boxed{1}         16 mod 5; an exact question (without "mod") wants 16

A coarse question ("mod m") forgives a step that is off by a multiple of m: the answer stays right, the solution is
flawed. That is the world's flawed positive, and an exact question punishes it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from megatron_fapo.critique.paragraphs import SEPARATOR, split
from megatron_fapo.errors import TaskError
from megatron_fapo.tasks.settings import ClockSettings

OPERATORS = ("+", "-", "*")
OPERANDS = range(2, 10)

_QUESTION = re.compile(r"Compute on a (\d+)-hour clock: (\d+)((?: [+*-] \d+)+) = \?(?: \(mod (\d+)\))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One operation with its result on the clock."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.result}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A chain of operations from `start`, applied from left to right.

    Example: `Problem(hours=20, start=17, operations=(("+", 8), ("-", 9)), modulus=5)`, whose answer is 1.
    """

    hours: int
    start: int
    operations: tuple[tuple[str, int], ...]
    modulus: int | None
    """What a coarse question reduces the result by; None for an exact one."""

    @property
    def question(self) -> str:
        """The problem in words; `parse` reads it back."""
        chain = "".join(f" {operator} {operand}" for operator, operand in self.operations)
        coarse = "" if self.modulus is None else f" (mod {self.modulus})"
        return f"Compute on a {self.hours}-hour clock: {self.start}{chain} = ?{coarse}"

    def step(self, index: int, left: int) -> Step:
        """Operation `index`, rightly applied to `left`."""
        operator, right = self.operations[index]
        result = {"+": left + right, "-": left - right, "*": left * right}[operator] % self.hours
        return Step(left=left, operator=operator, right=right, result=result)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The true steps."""
        steps: list[Step] = []
        for index in range(len(self.operations)):
            steps.append(self.step(index, steps[-1].result if steps else self.start))
        return tuple(steps)

    def answer(self, result: int) -> str:
        """What to answer when the chain ends at `result`."""
        return str(result if self.modulus is None else result % self.modulus)

    @property
    def reference_answer(self) -> str:
        """The right answer."""
        return self.answer(self.steps[-1].result)


def parse(question: str) -> Problem:
    """The problem that a question states. Raises TaskError when it is not a question of this world."""
    match = _QUESTION.fullmatch(question)
    if match is None:
        raise TaskError(f"not a question of the clock world: {question!r:.200}")
    hours, start, chain, modulus = match.groups()
    words = chain.split()
    operations = tuple((operator, int(operand)) for operator, operand in zip(words[::2], words[1::2], strict=True))
    return Problem(
        hours=int(hours), start=int(start), operations=operations, modulus=None if modulus is None else int(modulus)
    )


def write(steps: Sequence[object], answer: str) -> str:
    r"""A solution: one paragraph a step, then the answer in `\boxed{}`."""
    return SEPARATOR.join([*map(str, steps), f"\\boxed{{{answer}}}"])


def first_wrong(problem: Problem, solution: str) -> int:
    """The oracle: 0-based index of the first paragraph that is not the one that had to stand there, -1 when clean.

    Where a step is left out, that is the paragraph in its place; a solution that breaks off is wrong at its last
    paragraph.
    """
    found = split(solution)
    expected = split(write(problem.steps, problem.reference_answer))
    for index, (is_there, should_be) in enumerate(zip(found, expected, strict=False)):
        if is_there != should_be:
            return index
    if len(found) < len(expected):
        return max(len(found) - 1, 0)
    return len(expected) if len(found) > len(expected) else -1


def draw_problem(settings: ClockSettings, rng: Random) -> Problem:
    """A random problem."""
    return Problem(
        hours=settings.hours,
        start=rng.randrange(settings.hours),
        modulus=settings.modulus if rng.random() < settings.coarse else None,
        operations=tuple((rng.choice(OPERATORS), rng.choice(OPERANDS)) for _ in range(rng.choice(settings.chain))),
    )


def sloppy_solution(problem: Problem, settings: ClockSettings, rng: Random) -> str:
    """The teacher: clean, or one step off by a multiple of `modulus` and carried on, or the last step left out."""
    kind = rng.random()
    if kind < settings.slip:
        return _slipped(problem, rng, range(settings.modulus, settings.hours, settings.modulus))
    steps = problem.steps
    shown = steps[:-1] if kind < settings.slip + settings.jump else steps
    return write(shown, problem.reference_answer)


def _slipped(problem: Problem, rng: Random, offsets: Sequence[int], answer: str | None = None) -> str:
    """One random step is off by one of `offsets`, and the chain goes on from there, to `answer` or where it leads."""
    slip = rng.randrange(len(problem.operations))
    value = problem.start
    lines = []
    for index in range(len(problem.operations)):
        step = problem.step(index, value)
        value = (step.result + rng.choice(offsets)) % problem.hours if index == slip else step.result
        lines.append(Step(left=step.left, operator=step.operator, right=step.right, result=value))
    return write(lines, problem.answer(value) if answer is None else answer)


def suspect_solution(problem: Problem, settings: ClockSettings, rng: Random) -> str:
    """A solution with the right answer for the judge to learn from: half clean, half wrong somewhere.

    More kinds of wrong than the teacher's, because a policy under training does not only make the teacher's mistakes.
    """
    answer, steps = problem.reference_answer, [*map(str, problem.steps)]
    kind = rng.random()
    if kind < 0.5:
        return write(steps, answer)
    if kind < 0.7:
        multiples = range(settings.modulus, problem.hours, settings.modulus)
        return _slipped(problem, rng, multiples, answer)
    if kind < 0.75:
        return _slipped(problem, rng, range(1, problem.hours), answer)
    if kind < 0.83:
        return write(steps[:-1], answer)
    at = rng.randrange(len(steps))
    if kind < 0.88:
        del steps[at]
    elif kind < 0.9:
        steps.insert(at, rng.choice(steps))
    else:
        steps[at] = _misspelt(steps[at], problem, rng)
    return write(steps, answer)


def _misspelt(step: str, problem: Problem, rng: Random) -> str:
    """A line with one of its words replaced, the lines around it left as they were."""
    words = step.split()
    at = rng.randrange(len(words) - 1)
    at += at >= 3  # never the equals sign
    others = OPERATORS if words[at] in OPERATORS else [str(number) for number in range(problem.hours)]
    words[at] = rng.choice([word for word in others if word != words[at]])
    return " ".join(words)


def critique(problem: Problem, wrong: int) -> str:
    r"""The verdict a good judge writes: each step derived again from the question, ok or no, then the index.

    Example: `"17 + 8 = 5 ok\n5 - 9 = 16 no\n\boxed{1}"`.
    """
    lines = []
    for index, step in enumerate(problem.steps):
        lines.append(f"{step} {'no' if index == wrong else 'ok'}\n")
        if index == wrong:
            break
    return "".join(lines) + f"\\boxed{{{wrong}}}"
