"""What a task is: a stream of prompts, and a verdict of right or wrong on an answer."""

from typing import Protocol

from megatron_fapo.records import Outcome, Prompt


class Task(Protocol):
    """Prompts and their checker. The prompts depend on the seed and the index alone.

    Consumes nothing; `check` waits for the checker (a worker process in `math`). Call `close` at the end.
    """

    name: str

    def prompt(self, index: int) -> Prompt:
        """Prompt `index` >= 0 of the endless training stream: the same for the same seed, in any order of calls."""

    def held_out(self, count: int) -> list[Prompt]:
        """The first `count` prompts kept for evaluation, the same for every seed; fewer when there are not as many."""

    async def check(self, prompt: Prompt, text: str) -> Outcome:
        """Whether the answer in `text` is right. Raises TaskError when the checker itself breaks."""

    def oracle(self, prompt: Prompt, text: str) -> int | None:
        """The first wrong paragraph of `text` in truth, -1 when clean; None where the task has no oracle."""

    async def close(self) -> None:
        """Release what the checker holds."""
