"""Task `math`: problems with a final answer, compared by math-verify in a process that may be killed."""

from dataclasses import dataclass

from megatron_fapo.critique.boxed import last_boxed
from megatron_fapo.records import Message, Outcome, Prompt
from megatron_fapo.tasks import rows
from megatron_fapo.tasks.instruction import INSTRUCTION, solve_prompt
from megatron_fapo.tasks.maths_checker import MathsChecker
from megatron_fapo.tasks.settings import MathSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A problem as its row states it."""

    question: str
    messages: tuple[Message, ...]
    answer: str


def parse_row(row: rows.Row) -> Problem:
    """A row in the ecosystem's format (chat and ground truth), in that of DAPO-Math-17k-Processed (prompt and solution
    as text), or in that of AIME and MATH (problem and answer).

    Raises ValueError when it is none of them.
    """
    if isinstance(row.get("prompt"), str):
        question, answer = row["prompt"], row.get("solution")
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"solution must be the answer as text, found {answer!r:.100}")
        return Problem(question=question, messages=solve_prompt(question), answer=answer.strip())
    if rows.text_of(row, "problem", "question"):
        return problem_of_texts(row)
    messages = rows.messages_of(row)
    answer = str(rows.ground_truth_of(row)).strip()
    if not answer:
        raise ValueError("reward_model.ground_truth is empty")
    extra = row.get("extra_info") or {}
    question = extra.get("question") or messages[-1].content.removesuffix(INSTRUCTION)
    return Problem(question=question, messages=messages, answer=answer)


def problem_of_texts(row: rows.Row) -> Problem:
    r"""A row with `problem` (or `question`) and `answer`, or, as in MATH, a `solution` whose last `\boxed{}` holds it.

    Column names in any case. Raises ValueError when either is missing.
    """
    question = rows.text_of(row, "problem", "question")
    answer = rows.text_of(row, "answer") or last_boxed(rows.text_of(row, "solution")) or ""
    if not question or not answer.strip():
        raise ValueError(f"needs a problem and its answer as texts, found columns {sorted(row)!r:.200}")
    return Problem(question=question, messages=solve_prompt(question), answer=answer.strip())


async def check_boxed(checker: MathsChecker, reference: str, text: str) -> Outcome:
    r"""Right when the last `\boxed{}` of `text` is mathematically equal to the reference answer."""
    answer = last_boxed(text)
    if answer is None:
        return Outcome(right=False, score=-1.0, answer=None, why="no answer")
    why = await checker.compare(reference, answer)
    right = why == "equal"
    return Outcome(right=right, score=1.0 if right else -1.0, answer=answer, why=why)


class MathTask:
    """Problems read once, answers checked in worker processes."""

    name = "math"

    def __init__(self, settings: MathSettings, tokenizer: ChatTokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        train = rows.parse_all(rows.read(settings.train, settings.train_config), parse_row)
        held_out = settings.held_out and rows.parse_all(
            rows.read(settings.held_out, settings.held_out_config), parse_row
        )
        self._corpus = rows.Corpus.of(train, held_out or None, settings.held_out_rows)
        self._checker = MathsChecker(workers=settings.check_workers, deadline=settings.check_seconds)

    def prompt(self, index: int) -> Prompt:
        """Problem `index` of the training stream, reshuffled each time round."""
        return self._prompt(f"p{index}", self._corpus.draw(index, self._seed))

    def held_out(self, count: int) -> list[Prompt]:
        """The first `count` held-out problems."""
        return [self._prompt(f"h{index}", problem) for index, problem in enumerate(self._corpus.held_out[:count])]

    async def check(self, prompt: Prompt, text: str) -> Outcome:
        r"""Right when the last `\boxed{}` is mathematically equal to the reference answer."""
        return await check_boxed(self._checker, prompt.reference_answer, text)

    def oracle(self, prompt: Prompt, text: str) -> int | None:
        """None: nobody knows every step of a proof."""
        return None

    async def close(self) -> None:
        """End the worker processes."""
        await self._checker.close()

    def _prompt(self, name: str, problem: Problem) -> Prompt:
        return Prompt(
            id=name,
            task=self.name,
            question=problem.question,
            messages=problem.messages,
            token_ids=self._tokenizer.encode_chat(problem.messages),
            reference_answer=problem.answer,
        )
