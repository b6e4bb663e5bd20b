"""One solution's verdict: a place in the queue, the cascade, the long verdict, retries, votes, deadlines."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any, Literal

from megatron_fapo.critique.boxed import OPENING
from megatron_fapo.critique.paragraphs import split
from megatron_fapo.critique.prompt import judge_prompt
from megatron_fapo.critique.verdict import parse_verdict
from megatron_fapo.errors import ConfigError, RequestRejected, ServerError
from megatron_fapo.judge.answerer import Answerer, Question, Served
from megatron_fapo.judge.places import Full, Places
from megatron_fapo.judge.settings import JudgeSettings
from megatron_fapo.records import Message, NotJudged, Prompt, Verdict
from megatron_fapo.trace import Clock

VoteRule = Literal["majority", "agreement"]


class Asker:
    """Asks a judge for verdicts. Stateless but for its queue.

    `judged(start, end)` is told when each solution was at the judge, on the clock's scale.
    """

    def __init__(
        self,
        judge: Answerer,
        settings: JudgeSettings,
        clock: Clock,
        seed: int,
        judged: Callable[[float, float], None] = lambda start, end: None,
    ) -> None:
        self._judge = judge
        self._scorer = judge if isinstance(judge, Served) else None
        if self._scorer is None and (settings.cascade is not None or settings.probability == "token"):
            raise ConfigError("judge.cascade and judge.probability = token need a judge server, not an endpoint")
        self._settings = settings
        self._clock = clock
        self._seed = seed
        self._judged = judged
        self._places = Places(settings.concurrency, settings.queue)

    async def ask(self, prompt: Prompt, solution: str, name: str, urgency: int = 0) -> Verdict | NotJudged:
        """The verdict on `solution`, or NotJudged("failed") with the reason; never raises a server's error.

        The seed depends on the run, the prompt and the solution's text, not on which of several identical
        rollouts happened to arrive first. `name` is the rollout's id, to be found again in the server's log. The
        lower `urgency` is, the earlier it gets its place.
        """
        case = _Case(prompt=prompt, solution=solution, name=name, paragraphs=len(split(solution)))
        if case.paragraphs == 0:
            return NotJudged(reason="failed", why="empty solution")
        try:
            await self._places.enter(urgency)
        except Full:
            return NotJudged(reason="failed", why="queue full")
        try:
            start = self._clock.now()
            result = await _within(self._clock, self._settings.deadline, self._verdict(case))
            self._judged(start, self._clock.now())
        finally:
            self._places.leave()
        return result or NotJudged(reason="failed", why="deadline", tokens=case.tokens)

    async def _verdict(self, case: "_Case") -> Verdict | NotJudged:
        if self._settings.cascade is not None:
            short = await self._short(case)
            if short is not None:
                return short
        verdict = await self._long(case)
        if self._settings.probability == "token" and isinstance(verdict, Verdict):
            return await self._with_probability(case, verdict)
        return verdict

    async def _short(self, case: "_Case") -> Verdict | None:
        """The verdict without reasoning where it is clear; None where the long one must be asked."""
        limits, scorer = self._settings.cascade, self._scorer
        assert limits is not None
        assert scorer is not None
        try:
            p, wrong = await scorer.flaw_probability(f"{case.name}-score", case.messages, case.paragraphs)
        except ServerError:
            return None
        case.tokens += 1
        clear = {-1: p < limits.clean_below, wrong: limits.flawed_above is not None and p > limits.flawed_above}
        for index, holds in clear.items():
            if holds:
                (heard,) = self._spoilt(case, [index])
                p = p if (heard == -1) == (index == -1) else 1.0 - p
                return Verdict(first_wrong=heard, p_flawed=p, votes=1, tokens=case.tokens, text="", short=True)
        return None

    async def _long(self, case: "_Case") -> Verdict | NotJudged:
        why = ""
        for attempt in range(self._settings.retries + 1):
            try:
                texts = await self._answers(case, attempt)
            except RequestRejected as error:
                why = f"refused: {error}"
                break
            except ServerError as error:
                why = f"server: {error}"
                continue
            rule, spoil = self._settings.vote_rule, partial(self._spoilt, case)
            verdict, why = count_votes(texts, case.paragraphs, case.tokens, rule, spoil)
            if verdict is not None:
                return verdict
            if self._settings.temperature == 0.0:
                break
        return NotJudged(reason="failed", why=why, tokens=case.tokens)

    async def _answers(self, case: "_Case", attempt: int) -> list[tuple[str, bool]]:
        """(text, complete) of every vote."""
        votes = range(self._settings.votes)
        question = Question(
            ids=tuple(f"{case.name}-judge-a{attempt}-v{vote}" for vote in votes),
            seeds=tuple(self._seed_of(case, attempt, vote) for vote in votes),
            messages=case.messages,
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            max_new_tokens=self._settings.max_new_tokens,
        )
        texts = []
        async for answer in self._judge.answers(question):
            case.tokens += answer.tokens
            texts.append((answer.text, answer.complete))
        return texts

    async def _with_probability(self, case: "_Case", verdict: Verdict) -> Verdict:
        """The same with P(flawed) read from the verdict's token, after the reasoning that led to it."""
        said, scorer = verdict.text[: verdict.text.rindex(OPENING)], self._scorer
        assert scorer is not None
        try:
            p, _ = await scorer.flaw_probability(f"{case.name}-p", case.messages, case.paragraphs, said)
        except ServerError:
            return verdict
        spoilt = (parse_verdict(verdict.text, case.paragraphs) != -1) != verdict.flawed
        return replace(verdict, p_flawed=1.0 - p if spoilt else p, tokens=case.tokens + 1)

    def _spoilt(self, case: "_Case", indices: Sequence[int]) -> list[int]:
        """The votes turned round at the rates of an experiment; the same solution always fares the same."""
        errors = self._settings.errors
        if errors is None:
            return list(indices)
        rng = Random(f"errors/{self._seed}/{case.prompt.id}/{case.solution}")

        def heard(index: int) -> int:
            if rng.random() >= (errors.invented if index == -1 else errors.missed):
                return index
            return rng.randrange(case.paragraphs) if index == -1 else -1

        return [heard(index) for index in indices]

    def _seed_of(self, case: "_Case", attempt: int, vote: int) -> int:
        words = f"{self._seed}/{case.prompt.id}/{attempt}/{vote}/{case.solution}".encode()
        return int.from_bytes(hashlib.blake2b(words, digest_size=4).digest(), "big") >> 1


class _Case:
    """A solution at the judge, with the tokens spent on it so far; outlives a deadline."""

    def __init__(self, prompt: Prompt, solution: str, name: str, paragraphs: int) -> None:
        self.prompt, self.solution, self.name, self.paragraphs = prompt, solution, name, paragraphs
        self.messages: tuple[Message, ...] = judge_prompt(prompt.question, prompt.reference_answer, solution)
        self.tokens = 0


def count_votes(
    texts: Sequence[tuple[str, bool]],
    count: int,
    tokens: int,
    rule: VoteRule = "majority",
    spoil: Callable[[Sequence[int]], Sequence[int]] = lambda indices: indices,
) -> tuple[Verdict | None, str]:
    """The verdict of (text, complete) votes, or (None, why) when fewer than half of them are usable.

    Flagged or not is decided by the rule over the usable votes: by majority, where a tie counts as flagged, or by
    agreement of all. The index is the most frequent one among the flagging votes, the earliest of equals. In which
    order the votes came makes no difference. `spoil` is given their indices and says what is heard instead.
    """
    said: list[tuple[int, str]] = []
    problems = []
    for text, complete in sorted(texts):
        parsed = parse_verdict(text, count) if complete else "cut"
        if isinstance(parsed, int):
            said.append((parsed, text))
        else:
            problems.append(parsed)
    heard = spoil([index for index, _ in said])
    votes = [(index, text) for index, (_, text) in zip(heard, said, strict=True)]
    if 2 * len(votes) < len(texts) or not votes:
        return None, problems[0] if problems else "no votes"
    flags = [index for index, _ in votes if index != -1]
    chosen = -1
    if len(flags) == len(votes) or (rule == "majority" and 2 * len(flags) >= len(votes)):
        counts = Counter(flags)
        chosen = min(counts, key=lambda index: (-counts[index], index))
    words = next(text for index, text in votes if index == chosen)
    p_flawed = len(flags) / len(votes)
    return Verdict(first_wrong=chosen, p_flawed=p_flawed, votes=len(votes), tokens=tokens, text=words), ""


async def _within(
    clock: Clock, seconds: float, work: Coroutine[Any, Any, Verdict | NotJudged]
) -> Verdict | NotJudged | None:
    """The result of `work`, or None when `seconds` of the clock passed first (then `work` is cancelled)."""
    task = asyncio.ensure_future(work)
    timer = asyncio.ensure_future(clock.sleep(seconds))
    try:
        await asyncio.wait({task, timer}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        timer.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, timer, return_exceptions=True)
