"""Training data for the judge: right solutions of several policies, labelled, in the FAPO-Critic format.

A labeller reads each solution several times with the judge's own prompt, and a solution is kept when all its labels
name the same paragraph (FAPO, arXiv:2510.22543, §4.1: Qwen3-32B three times). What is not kept is counted by reason.
"""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from megatron_fapo.critique.paragraphs import split
from megatron_fapo.critique.prompt import judge_prompt
from megatron_fapo.critique.verdict import parse_verdict
from megatron_fapo.errors import DataError, RequestRejected, ServerError
from megatron_fapo.judge.answerer import Answerer, Question
from megatron_fapo.judge.settings import JudgeSettings
from megatron_fapo.observe.rollouts import RolloutRow, read_rollouts, rollout_files
from megatron_fapo.records import Group

Label = int | str
"""A first wrong paragraph, -1 for none, or why there is none."""
Labels = dict[str, tuple[Label, ...]]
"""{solution id: its labels}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A policy's right answer with its reasoning."""

    id: str
    source: str
    """The run or the model that it is from."""
    question: str
    reference: str
    text: str
    oracle: int | None
    """First wrong paragraph in truth, -1 when clean; None where the task has no oracle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticData:
    """Solutions with the index that their labels agree on, and what became of the others."""

    rows: tuple[tuple[Solution, int], ...]
    """The solutions of a question stand together, so the last rows are questions that the first ones have not."""
    dropped: dict[str, int]
    """{reason: solutions}."""

    @property
    def clean(self) -> int:
        """Rows with index -1."""
        return sum(index == -1 for _, index in self.rows)

    def critic(self) -> list[dict[str, Any]]:
        """Rows of the FAPO-Critic format, which task `critique` reads."""
        questions = {solution.question: None for solution, _ in self.rows}
        places = {question: place for place, question in enumerate(questions)}
        return [_critic_row(solution, index, places[solution.question]) for solution, index in self.rows]

    def bench(self) -> list[dict[str, Any]]:
        """Rows of ProcessBench's format, which `fapo bench-judge` reads."""
        return [
            {
                "id": solution.id,
                "generator": solution.source,
                "problem": solution.question,
                "steps": list(split(solution.text)),
                "final_answer_correct": True,
                "label": index,
                "reference_answer": solution.reference,
            }
            for solution, index in self.rows
        ]


def recorded(run: Path, steps: range) -> list[RolloutRow]:
    """The rollouts that a run recorded in these steps. Raises DataError when there are none."""
    if not run.is_dir():
        raise DataError(f"{run}: no such run folder")
    recorded_steps = rollout_files(run)
    files = [file for step, file in recorded_steps.items() if step in steps]
    if not files:
        there = f"only steps {min(recorded_steps)} to {max(recorded_steps)}" if recorded_steps else "nor any others"
        raise DataError(f"{run}: no recorded rollouts of the steps that are asked for, {there} (observe.rollouts)")
    return [row for file in files for row in read_rollouts(file)]


def solutions_of(rows: Iterable[RolloutRow], source: str, dropped: Counter[str]) -> list[Solution]:
    """The right answers among recorded rollouts; the others are counted in `dropped`."""
    found = []
    for row in rows:
        if _fit(right=row.right, text=row.text, dropped=dropped):
            found.append(
                Solution(
                    id=f"{source}/{row.rollout_id}",
                    source=source,
                    question=row.question,
                    reference=row.reference_answer,
                    text=row.text,
                    oracle=row.oracle,
                )
            )
    return found


def solutions_in(groups: Iterable[Group], source: str) -> tuple[list[Solution], dict[str, int]]:
    """The same of groups as a sampler makes them; also what was dropped."""
    found, dropped = [], Counter[str]()
    for group in groups:
        for one in group:
            if _fit(right=one.outcome.right, text=one.rollout.text, dropped=dropped):
                found.append(
                    Solution(
                        id=f"{source}/{one.rollout.id}",
                        source=source,
                        question=group.prompt.question,
                        reference=group.prompt.reference_answer,
                        text=one.rollout.text,
                        oracle=one.oracle,
                    )
                )
    return found, dict(dropped)


def _fit(*, right: bool, text: str, dropped: Counter[str]) -> bool:
    reason = "wrong answer" if not right else "" if split(text) else "empty"
    if reason:
        dropped[reason] += 1
    return not reason


def draw(solutions: Sequence[Solution], limit: int | None, seed: int, dropped: Counter[str]) -> list[Solution]:
    """Different solutions, at most `limit` of them, drawn at random; the others are counted in `dropped`."""
    different = list({(solution.question, solution.text): solution for solution in reversed(solutions)}.values())
    dropped["repeated"] += len(solutions) - len(different)
    chosen = different if limit is None else Random(f"draw/{seed}").sample(different, min(limit, len(different)))
    dropped["beyond the limit"] += len(different) - len(chosen)
    return sorted(chosen, key=lambda solution: solution.id)


def oracle_labels(solutions: Iterable[Solution]) -> Labels:
    """The task's own word. Raises DataError where a task has no oracle."""
    labels: Labels = {}
    for solution in solutions:
        if solution.oracle is None:
            raise DataError(f"{solution.id}: its task has no oracle; name a labeller (--model or --endpoint)")
        labels[solution.id] = (solution.oracle,)
    return labels


async def ask_labels(
    solutions: Sequence[Solution],
    labeller: Answerer,
    settings: JudgeSettings,
    *,
    name: str,
    out: Path,
    seed: int = 0,
    told: Callable[[int], None] = lambda solutions: None,
) -> Labels:
    """`settings.votes` labels of each solution; every solution's go to `out` as they come, which resumes.

    A solution whose server fails after all retries is not in the result, and is asked about again by another call.
    Raises DataError when `out` holds labels of another labeller or another number of votes.
    """
    labels = read_labels(out, name, settings.votes)
    told(sum(solution.id in labels for solution in solutions))
    places = asyncio.Semaphore(settings.concurrency)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:

        async def one(solution: Solution) -> None:
            async with places:
                found = await _labels(solution, labeller, settings, seed)
            if found is not None:
                labels[solution.id] = found
                file.write(json.dumps({"id": solution.id, "labels": found, "labeller": name}) + "\n")
                file.flush()
            told(1)

        async with asyncio.TaskGroup() as group:
            for solution in solutions:
                if solution.id not in labels:
                    group.create_task(one(solution))
    return labels


def read_labels(path: Path, name: str, votes: int) -> Labels:
    """What an earlier call wrote; a line cut by its end is forgotten."""
    labels: Labels = {}
    kept = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if value["labeller"] != name or len(value["labels"]) != votes:
            raise DataError(
                f"{path}: holds {len(value['labels'])} labels a solution by {value['labeller']!r}, not {votes} by "
                f"{name!r}; remove it, or name another --out"
            )
        labels[value["id"]] = tuple(value["labels"])
        kept.append(line)
    if kept:
        path.write_text("".join(line + "\n" for line in kept))
    return labels


async def _labels(
    solution: Solution, labeller: Answerer, settings: JudgeSettings, seed: int
) -> tuple[Label, ...] | None:
    paragraphs = len(split(solution.text))
    for attempt in range(settings.retries + 1):
        votes = range(settings.votes)
        question = Question(
            ids=tuple(f"{solution.id}-a{attempt}-v{vote}" for vote in votes),
            seeds=tuple(_seed(f"{seed}/{solution.id}/{attempt}/{vote}") for vote in votes),
            messages=judge_prompt(solution.question, solution.reference, solution.text),
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
        )
        try:
            answers = [answer async for answer in labeller.answers(question)]
        except RequestRejected:
            return ("refused",) * settings.votes
        except ServerError:
            continue
        return tuple(parse_verdict(answer.text, paragraphs) if answer.complete else "cut" for answer in answers)
    return None


def assemble(
    solutions: Sequence[Solution], labels: Labels, *, balance: bool, seed: int, dropped: Counter[str]
) -> CriticData:
    """The solutions whose labels agree; with `balance` as many clean as flawed ones. Questions come in random order."""
    agreed: list[tuple[Solution, int]] = []
    for solution in solutions:
        found = labels.get(solution.id)
        if found is None:
            dropped["no answer from the labeller"] += 1
        elif not all(isinstance(label, int) for label in found):
            dropped["a label cannot be read"] += 1
        elif len(set(found)) > 1:
            dropped["labels disagree"] += 1
        else:
            agreed.append((solution, int(found[0])))
    rng = Random(f"critic/{seed}")
    if balance:
        sides = [[row for row in agreed if (row[1] == -1) is clean] for clean in (True, False)]
        size = min(map(len, sides))
        dropped["more than the other class"] += len(agreed) - 2 * size
        agreed = [row for side in sides for row in rng.sample(side, size)]
    questions = sorted({solution.question for solution, _ in agreed})
    rng.shuffle(questions)
    order = {question: place for place, question in enumerate(questions)}
    agreed.sort(key=lambda row: (order[row[0].question], row[0].id))
    return CriticData(rows=tuple(agreed), dropped={reason: count for reason, count in dropped.items() if count})


def _critic_row(solution: Solution, index: int, question: int) -> dict[str, Any]:
    messages = judge_prompt(solution.question, solution.reference, solution.text)
    return {
        "data_source": "fapo_critic",
        "prompt": [{"content": message.content, "role": message.role} for message in messages],
        "ability": "math_critic",
        "reward_model": {"ground_truth": index, "style": "rule"},
        "extra_info": {"question_index": question, "split": "train", "total_steps": len(split(solution.text))},
    }


def _seed(words: str) -> int:
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=4).digest(), "big") >> 1
