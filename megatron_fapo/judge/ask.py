"""One solution's verdict: ask, wait within a deadline, parse, retry, count votes."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal, Protocol

from megatron_fapo.critique.paragraphs import split
from megatron_fapo.critique.prompt import judge_prompt
from megatron_fapo.critique.verdict import parse_verdict
from megatron_fapo.errors import RequestRejected, ServerError
from megatron_fapo.judge.settings import JudgeSettings
from megatron_fapo.records import GenerationRequest, Ints, Message, NotJudged, Prompt, Sampling, Verdict
from megatron_fapo.serving.interface import Generator
from megatron_fapo.trace import Clock

VoteRule = Literal["majority", "agreement"]


class ChatCodec(Protocol):
    """The judge model's tokenizer."""

    eos_ids: tuple[int, ...]

    def encode_chat(self, messages: Sequence[Message]) -> Ints:
        """[T] ids of a chat under the template, generation prompt included."""

    def decode(self, token_ids: Ints) -> str:
        """Text without special tokens."""


class Asker:
    """Asks a judge server for verdicts. Stateless but for its limit of solutions in flight.

    `judged(start, end)` is told when each solution was at the judge, on the clock's scale.
    """

    def __init__(
        self,
        servers: Generator,
        tokenizer: ChatCodec,
        settings: JudgeSettings,
        clock: Clock,
        seed: int,
        judged: Callable[[float, float], None] = lambda start, end: None,
    ) -> None:
        self._servers = servers
        self._tokenizer = tokenizer
        self._settings = settings
        self._clock = clock
        self._seed = seed
        self._judged = judged
        self._slots = asyncio.Semaphore(settings.concurrency)

    async def ask(self, prompt: Prompt, solution: str, name: str) -> Verdict | NotJudged:
        """The verdict on `solution`, or NotJudged("failed") with the reason; never raises a server's error.

        The seed depends on the run, the prompt and the solution's text, not on which of several identical
        rollouts happened to arrive first. `name` is the rollout's id, to be found again in the server's log.
        """
        attempts = _Attempts()
        verdict = self._attempt_until_usable(prompt, solution, name, attempts)
        async with self._slots:
            start = self._clock.now()
            result = await _within(self._clock, self._settings.deadline, verdict)
            self._judged(start, self._clock.now())
        if result is None:
            return NotJudged(reason="failed", why="deadline", tokens=attempts.tokens)
        return result

    async def _attempt_until_usable(
        self, prompt: Prompt, solution: str, name: str, attempts: "_Attempts"
    ) -> Verdict | NotJudged:
        count = len(split(solution))
        tokens = self._tokenizer.encode_chat(judge_prompt(prompt.question, prompt.reference_answer, solution))
        why = "empty solution" if count == 0 else ""
        for attempt in range(self._settings.retries + 1):
            if count == 0:
                break
            try:
                texts = await self._generate(prompt, solution, name, tokens, attempt, attempts)
            except RequestRejected as error:
                why = f"refused: {error}"
                break
            except ServerError as error:
                why = f"server: {error}"
                continue
            verdict, why = count_votes(texts, count, attempts.tokens, self._settings.vote_rule)
            if verdict is not None:
                return verdict
            if self._settings.temperature == 0.0:
                break
        return NotJudged(reason="failed", why=why, tokens=attempts.tokens)

    async def _generate(
        self, prompt: Prompt, solution: str, name: str, tokens: Ints, attempt: int, attempts: "_Attempts"
    ) -> list[tuple[str, bool]]:
        """(text, complete) of every vote."""
        votes = range(self._settings.votes)
        request = GenerationRequest(
            ids=tuple(f"{name}-judge-a{attempt}-v{vote}" for vote in votes),
            token_ids=tokens,
            seeds=tuple(self._seed_of(prompt.id, solution, attempt, vote) for vote in votes),
            sampling=Sampling(
                temperature=self._settings.temperature,
                top_p=self._settings.top_p,
                max_new_tokens=self._settings.max_new_tokens,
                stop_token_ids=self._tokenizer.eos_ids,
            ),
        )
        texts = []
        async for generation in self._servers.generate(request):
            attempts.tokens += len(generation.token_ids)
            texts.append((self._tokenizer.decode(generation.token_ids), generation.finish_reason == "stop"))
        return texts

    def _seed_of(self, prompt_id: str, solution: str, attempt: int, vote: int) -> int:
        words = f"{self._seed}/{prompt_id}/{attempt}/{vote}/{solution}".encode()
        return int.from_bytes(hashlib.blake2b(words, digest_size=4).digest(), "big") >> 1


class _Attempts:
    """Tokens spent so far; outlives a deadline."""

    tokens = 0


def count_votes(
    texts: Sequence[tuple[str, bool]], count: int, tokens: int, rule: VoteRule = "majority"
) -> tuple[Verdict | None, str]:
    """The verdict of (text, complete) votes, or (None, why) when fewer than half of them are usable.

    Flagged or not is decided by the rule over the usable votes: by majority, where a tie counts as flagged, or by
    agreement of all. The index is the most frequent one among the flagging votes, the earliest of equals.
    """
    votes: list[tuple[int, str]] = []
    problems = []
    for text, complete in texts:
        parsed = parse_verdict(text, count) if complete else "cut"
        if isinstance(parsed, int):
            votes.append((parsed, text))
        else:
            problems.append(parsed)
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
