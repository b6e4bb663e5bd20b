"""What a judge is asked through: one of our servers (token ids), or any OpenAI-compatible endpoint (messages)."""

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_fapo.critique.boxed import OPENING
from megatron_fapo.errors import RequestRejected, ServerError, ServerUnreachable
from megatron_fapo.records import GenerationRequest, Ints, Message, Sampling, ints
from megatron_fapo.serving.interface import Scorer

_BACKOFF = 0.5
"""Seconds before an endpoint is asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer of a judge.  Example: `Answer(text="... \\boxed{-1}", complete=True, tokens=41)`."""

    text: str
    complete: bool
    """Whether it ended by itself, and was not cut at the token limit."""
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """n answers to one chat: one id and one seed each."""

    ids: tuple[str, ...]
    seeds: tuple[int, ...]
    messages: tuple[Message, ...]
    temperature: float
    top_p: float
    max_new_tokens: int


class Answerer(Protocol):
    """Something that answers chats. Its errors are `ServerError`s."""

    def answers(self, question: Question) -> AsyncIterator[Answer]:
        """Yield the answers, each as soon as it is there, in any order."""


class ChatCodec(Protocol):
    """The judge model's tokenizer."""

    eos_ids: tuple[int, ...]

    def encode_chat(self, messages: Sequence[Message]) -> Ints:
        """[T] ids of a chat under the template, generation prompt included."""

    def encode(self, text: str) -> Ints:
        """[T] ids of text as it stands."""

    def decode(self, token_ids: Ints) -> str:
        """Text without special tokens."""


class Served:
    """A judge on generation servers, at a `priority` where others use them too."""

    def __init__(self, servers: Scorer, tokenizer: ChatCodec, priority: int = 0) -> None:
        self._servers = servers
        self._priority = priority
        self._tokenizer = tokenizer

    async def answers(self, question: Question) -> AsyncIterator[Answer]:
        """As `Answerer.answers`."""
        request = GenerationRequest(
            ids=question.ids,
            token_ids=self._tokenizer.encode_chat(question.messages),
            seeds=question.seeds,
            sampling=Sampling(
                temperature=question.temperature,
                top_p=question.top_p,
                max_new_tokens=question.max_new_tokens,
                stop_token_ids=self._tokenizer.eos_ids,
            ),
            priority=self._priority,
        )
        async for generation in self._servers.generate(request):
            yield Answer(
                text=self._tokenizer.decode(generation.token_ids),
                complete=generation.finish_reason == "stop",
                tokens=len(generation.token_ids),
            )

    async def flaw_probability(
        self, name: str, messages: Sequence[Message], paragraphs: int, said: str = ""
    ) -> tuple[float, int]:
        r"""(P(flawed), the likeliest wrong paragraph), were the judge to write `said` and then its `\boxed{}`.

        A prefill alone: the tokens in which the verdicts -1, 0, ..., paragraphs - 1 first differ are weighed against
        each other. Without `said` it is the verdict without reasoning. Where all indices begin with one token the
        likeliest paragraph is 0. Raises ServerError.
        """
        verdicts = [self._tokenizer.encode(f"{said}{OPENING}{index}}}").tolist() for index in range(-1, paragraphs)]
        common = next(place for place, tokens in enumerate(zip(*verdicts, strict=False)) if len(set(tokens)) > 1)
        first = [verdict[common] for verdict in verdicts]
        prompt = ints([*self._tokenizer.encode_chat(messages).tolist(), *verdicts[0][:common]])
        choices = sorted(set(first))
        logprobs = await self._servers.choices(name, prompt, choices)
        likely = {token: math.exp(logprob) for token, logprob in zip(choices, logprobs, strict=True)}
        clean = likely[first[0]]
        flawed = sum(likely[token] for token in set(first[1:]) - {first[0]})
        wrong = max(range(paragraphs), key=lambda index: likely[first[1 + index]])
        return (flawed / (clean + flawed) if clean + flawed else 0.5), wrong


class _Busy(ServerError):
    """An endpoint that is to be asked later."""

    def __init__(self, message: str, after: str, name: str) -> None:
        super().__init__(message, request=name)
        self.seconds = float(after) if after.isdigit() else None


class OpenAI:
    """A judge behind an OpenAI-compatible `/chat/completions`.

    As an asynchronous context manager it keeps its connections; else each call has one of its own. An endpoint that is
    busy, fails or cannot be reached is asked again `retries` times, after a wait that doubles, or as it says itself.
    """

    def __init__(
        self, url: str, model: str, api_key: str | None = None, *, timeout: float = 600.0, retries: int = 0
    ) -> None:
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = timeout
        self._retries = retries
        self._session: Any = None

    async def __aenter__(self) -> "OpenAI":
        self._session = self._connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        self._session = None

    def _connect(self) -> Any:
        import aiohttp

        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=self._timeout)
        return aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=timeout)

    async def answers(self, question: Question) -> AsyncIterator[Answer]:
        """As `Answerer.answers`; a request for each answer, since endpoints differ in what they make of `n`."""
        session = self._session or self._connect()
        votes = [
            asyncio.ensure_future(self._patiently(session, question, name, seed))
            for name, seed in zip(question.ids, question.seeds, strict=True)
        ]
        try:
            for vote in asyncio.as_completed(votes):
                yield await vote
        finally:
            for task in votes:
                task.cancel()
            await asyncio.gather(*votes, return_exceptions=True)
            if session is not self._session:
                await session.close()

    async def _patiently(self, session: Any, question: Question, name: str, seed: int) -> Answer:
        for attempt in range(self._retries):
            try:
                return await self._answer(session, question, name, seed)
            except RequestRejected:
                raise
            except _Busy as busy:
                wait = busy.seconds
            except ServerError:
                wait = None
            await asyncio.sleep(_BACKOFF * 2**attempt if wait is None else wait)
        return await self._answer(session, question, name, seed)

    async def _answer(self, session: Any, question: Question, name: str, seed: int) -> Answer:
        import aiohttp

        body = {
            "model": self._model,
            "messages": [{"role": turn.role, "content": turn.content} for turn in question.messages],
            "temperature": question.temperature,
            "top_p": question.top_p,
            "max_tokens": question.max_new_tokens,
            "seed": seed,
        }
        try:
            async with session.post(self._url, json=body) as response:
                if response.status >= 400:
                    said = f"{self._url} answered {response.status}: {(await response.text())[:200]}"
                    if response.status < 500 and response.status != 429:
                        raise RequestRejected(said, request=name)
                    raise _Busy(said, response.headers.get("Retry-After", ""), name)
                return _answer_in(await response.json(), self._url, name)
        except (TimeoutError, aiohttp.ClientError, ValueError) as error:
            raise ServerUnreachable(f"{self._url}: {type(error).__name__}: {error}", request=name) from None


def _answer_in(body: Mapping[str, Any], url: str, name: str) -> Answer:
    match body:
        case {"choices": [{"message": {"content": str() | None as text}, "finish_reason": reason}, *_]}:
            used = (body.get("usage") or {}).get("completion_tokens", 0)
            return Answer(text=text or "", complete=reason == "stop", tokens=int(used))
        case _:
            raise ServerError(f"{url}: not a chat completion: {body!s:.200}", request=name)
