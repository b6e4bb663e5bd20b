"""Task `clock`: the clock world on the road that mathematics takes."""

from random import Random

from megatron_fapo.critique.boxed import last_boxed
from megatron_fapo.critique.prompt import judge_prompt
from megatron_fapo.errors import ConfigError
from megatron_fapo.records import Message, Outcome, Prompt
from megatron_fapo.tasks import clock_world
from megatron_fapo.tasks.clock_world import Problem
from megatron_fapo.tasks.instruction import solve_prompt
from megatron_fapo.tasks.settings import ClockSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer


class ClockTask:
    """Prompts, checker, oracle and teacher of the clock world."""

    name = "clock"

    def __init__(self, settings: ClockSettings, tokenizer: ChatTokenizer, seed: int) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._seed = seed
        content = self.prompt(0).messages[-1].content
        if tokenizer.decode(tokenizer.encode(content)) != content:
            raise ConfigError(
                f"task.hours={settings.hours}, task.modulus={settings.modulus}: the model's tokenizer cannot spell "
                "this clock world's questions; use a warm start made with these settings (make warm-start)"
            )

    def prompt(self, index: int) -> Prompt:
        """Problem `index` of the training stream."""
        return self._prompt(f"p{index}", self._problem("train", self._seed, index))

    def held_out(self, count: int) -> list[Prompt]:
        """The first `count` problems of a stream of its own, the same for every seed."""
        return [self._prompt(f"h{index}", self._problem("held-out", 0, index)) for index in range(count)]

    async def check(self, prompt: Prompt, text: str) -> Outcome:
        r"""Right when the last `\boxed{}` holds the reference answer."""
        answer = last_boxed(text)
        right = answer is not None and answer.strip() == prompt.reference_answer
        why = "no answer" if answer is None else "equal" if right else "different"
        return Outcome(right=right, score=1.0 if right else -1.0, answer=answer, why=why)

    def oracle(self, prompt: Prompt, text: str) -> int | None:
        """The first paragraph that is not the step that had to stand there, -1 when clean."""
        return clock_world.first_wrong(clock_world.parse(prompt.question), text)

    async def close(self) -> None:
        """Nothing is held."""

    def teacher(self, index: int) -> tuple[Prompt, str]:
        """Example `index` for the policy's supervised warm-up: a problem and the sloppy teacher's solution."""
        problem = self._problem("teacher", self._seed, index)
        rng = _rng("teacher's solution", self._seed, index)
        return self._prompt(f"t{index}", problem), clock_world.sloppy_solution(problem, self._settings, rng)

    def critic_example(self, index: int) -> tuple[tuple[Message, ...], str]:
        """Example `index` for the judge's supervised warm-up: the judge's prompt and the verdict it should write."""
        problem = self._problem("critic", self._seed, index)
        solution = clock_world.suspect_solution(problem, self._settings, _rng("suspect", self._seed, index))
        wrong = clock_world.first_wrong(problem, solution)
        messages = judge_prompt(problem.question, problem.reference_answer, solution)
        return messages, clock_world.critique(problem, wrong)

    def _problem(self, stream: str, seed: int, index: int) -> Problem:
        if index < 0:
            raise ValueError(f"index {index} is negative")
        return clock_world.draw_problem(self._settings, _rng(stream, seed, index))

    def _prompt(self, name: str, problem: Problem) -> Prompt:
        messages = solve_prompt(problem.question)
        return Prompt(
            id=name,
            task=self.name,
            question=problem.question,
            messages=messages,
            token_ids=self._tokenizer.encode_chat(messages),
            reference_answer=problem.reference_answer,
        )


def _rng(stream: str, seed: int, index: int) -> Random:
    """A generator of its own for each example: what it gives does not depend on the order of calls."""
    return Random(f"clock/{stream}/{seed}/{index}")
