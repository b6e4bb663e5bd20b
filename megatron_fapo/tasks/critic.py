"""Task `critique`: the judge's own task, on rows of the FAPO-Critic format."""

from dataclasses import dataclass

from megatron_fapo.critique.reward import judge_reward
from megatron_fapo.critique.verdict import parse_verdict
from megatron_fapo.records import Message, Outcome, Prompt
from megatron_fapo.tasks import rows
from megatron_fapo.tasks.settings import CritiqueSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A solution to judge, and its first wrong paragraph."""

    messages: tuple[Message, ...]
    first_wrong: int
    paragraphs: int


def parse_row(row: rows.Row) -> Case:
    """A FAPO-Critic row. Raises ValueError when it is none."""
    truth = rows.ground_truth_of(row)
    steps = (row.get("extra_info") or {}).get("total_steps")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"extra_info.total_steps must be the number of paragraphs, found {steps!r:.100}")
    if not isinstance(truth, int) or not -1 <= truth < steps:
        raise ValueError(f"reward_model.ground_truth must be an integer in [-1, {steps}), found {truth!r:.100}")
    return Case(messages=rows.messages_of(row), first_wrong=truth, paragraphs=steps)


class CritiqueTask:
    """Solutions to judge; the score is graded (FAPO Eq. 7), right means the exact index."""

    name = "critique"

    def __init__(self, settings: CritiqueSettings, tokenizer: ChatTokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        train = rows.parse_all(rows.read(str(settings.train)), parse_row)
        held_out = settings.held_out and rows.parse_all(rows.read(str(settings.held_out)), parse_row)
        self._corpus = rows.Corpus.of(train, held_out or None, settings.held_out_rows)

    def prompt(self, index: int) -> Prompt:
        """Case `index` of the training stream, reshuffled each time round."""
        return self._prompt(f"p{index}", self._corpus.draw(index, self._seed))

    def held_out(self, count: int) -> list[Prompt]:
        """The first `count` held-out cases."""
        return [self._prompt(f"h{index}", case) for index, case in enumerate(self._corpus.held_out[:count])]

    async def check(self, prompt: Prompt, text: str) -> Outcome:
        """The verdict in `text` against the truth."""
        case = self._corpus.find(prompt.id, self._seed)
        verdict = parse_verdict(text, case.paragraphs)
        score = judge_reward(verdict, case.first_wrong, case.paragraphs)
        if not isinstance(verdict, int):
            return Outcome(right=False, score=score, answer=None, why=verdict)
        right = verdict == case.first_wrong
        return Outcome(right=right, score=score, answer=str(verdict), why="equal" if right else "different")

    def oracle(self, prompt: Prompt, text: str) -> int | None:
        """None: a critique's own steps have no oracle."""
        return None

    async def close(self) -> None:
        """Nothing is held."""

    def _prompt(self, name: str, case: Case) -> Prompt:
        return Prompt(
            id=name,
            task=self.name,
            question=case.messages[-1].content,
            messages=case.messages,
            token_ids=self._tokenizer.encode_chat(case.messages),
            reference_answer=str(case.first_wrong),
        )
