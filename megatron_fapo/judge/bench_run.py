"""Asking a judge about a bench: many rows at once, each written down as soon as it is known, so that it can go on."""

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_fapo.critique.prompt import judge_prompt_of, process_bench_prompt
from megatron_fapo.errors import DataError, RequestRejected, ServerError
from megatron_fapo.judge.answerer import Answerer, Question
from megatron_fapo.judge.ask import count_votes
from megatron_fapo.judge.bench import Row
from megatron_fapo.judge.settings import JudgeSettings
from megatron_fapo.records import Message

Form = Literal["fapo", "original"]
"""The prompt: ours, which shows the reference answer, or ProcessBench's own, which does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A row's verdict; `as_json` is its line in the file of predictions."""

    id: str
    prediction: int | None
    why: str
    """Why there is none."""
    tokens: int
    text: str
    judge: str
    prompt: Form

    def as_json(self) -> str:
        """One line."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}, ensure_ascii=False)


def check_references(rows: Sequence[Row], form: Form) -> None:
    """Raise DataError when the prompt shows a reference answer and rows have none."""
    lacking = [row.id for row in rows if row.reference is None]
    if form == "fapo" and lacking:
        raise DataError(
            f"{len(lacking)} of {len(rows)} rows name no reference answer, which the prompt shows; the first is "
            f"{lacking[0]!r}. Add `reference_answer` to the rows, or take --prompt original"
        )


def already_done(path: Path, judge: str, form: Form) -> set[str]:
    """Ids of the rows that an earlier run wrote. A line cut by its end is forgotten. Raises DataError for a file of
    another judge or prompt."""
    if not path.exists():
        return set()
    done, kept = set(), []
    for line in path.read_text().splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if (value.get("judge"), value.get("prompt")) != (judge, form):
            raise DataError(
                f"{path}: holds predictions of judge {value.get('judge')!r} with prompt {value.get('prompt')!r}, "
                f"not of {judge!r} with {form!r}; name another file"
            )
        done.add(value["id"])
        kept.append(line)
    path.write_text("".join(line + "\n" for line in kept))
    return done


async def predict(
    rows: Sequence[Row],
    answerer: Answerer,
    settings: JudgeSettings,
    *,
    judge: str,
    form: Form,
    out: Path,
    seed: int = 0,
    told: Callable[[int], None] = lambda rows: None,
) -> int:
    """Ask about all rows that `out` does not hold yet, and append each verdict to it as it comes.

    Returns how many rows got no answer from the server after all retries; another run asks for them again.
    """
    done = already_done(out, judge, form)
    told(len(done & {row.id for row in rows}))
    slots = asyncio.Semaphore(settings.concurrency)
    failed = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:

        async def one(row: Row) -> None:
            nonlocal failed
            async with slots:
                found = await _ask(row, answerer, settings, judge, form, seed)
            if found is None:
                failed += 1
            else:
                file.write(found.as_json() + "\n")
                file.flush()
            told(1)

        async with asyncio.TaskGroup() as group:
            for row in rows:
                if row.id not in done:
                    group.create_task(one(row))
    return failed


async def _ask(
    row: Row, answerer: Answerer, settings: JudgeSettings, judge: str, form: Form, seed: int
) -> Prediction | None:
    tokens = 0
    for attempt in range(settings.retries + 1):
        votes = range(settings.votes)
        question = Question(
            ids=tuple(f"{row.id}-a{attempt}-v{vote}" for vote in votes),
            seeds=tuple(_seed(f"{seed}/{row.id}/{attempt}/{vote}") for vote in votes),
            messages=_messages(row, form),
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
        )
        texts = []
        try:
            async for answer in answerer.answers(question):
                tokens += answer.tokens
                texts.append((answer.text, answer.complete))
        except RequestRejected as error:
            return Prediction(
                id=row.id, prediction=None, why=f"refused: {error}", tokens=tokens, text="", judge=judge, prompt=form
            )
        except ServerError:
            continue
        verdict, why = count_votes(texts, len(row.steps), tokens, settings.vote_rule)
        return Prediction(
            id=row.id,
            prediction=None if verdict is None else verdict.first_wrong,
            why=why,
            tokens=tokens,
            text=verdict.text if verdict else texts[0][0],
            judge=judge,
            prompt=form,
        )
    return None


def _messages(row: Row, form: Form) -> tuple[Message, ...]:
    if form == "original":
        return process_bench_prompt(row.problem, row.steps)
    assert row.reference is not None  # check_references says so
    return judge_prompt_of(row.problem, row.reference, row.steps)


def _seed(words: str) -> int:
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=4).digest(), "big") >> 1
