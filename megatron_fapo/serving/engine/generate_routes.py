"""The routes that generate: SGLang's /generate and OpenAI's chat completions."""

import json
from collections.abc import AsyncIterator

from aiohttp import web

from megatron_fapo.errors import RequestRejected
from megatron_fapo.serving.engine import protocol
from megatron_fapo.serving.engine.chat import Chat, parse_chat
from megatron_fapo.serving.engine.exchange import Behind, Pieces, body_of, error, stream
from megatron_fapo.serving.engine.protocol import Json, Parsed
from megatron_fapo.serving.engine.sample import Answer


class GenerateRoutes:
    """Handlers that draw tokens."""

    def __init__(self, behind: Behind) -> None:
        self._behind = behind

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Register all paths."""
        router.add_get("/health_generate", self.health)
        router.add_get("/v1/models", self.models)
        router.add_post("/generate", self.generate)
        router.add_post("/v1/chat/completions", self.chat)

    async def health(self, request: web.Request) -> web.Response:
        """200 when one token can be generated."""
        if self._behind.engine.blocked is not None:
            return error(503, f"nothing is generated: {self._behind.engine.blocked}")
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        parsed = protocol.parse_generate(body, self._behind.limits, self._behind.text)
        async for _ in self._answers(parsed):
            pass
        self._behind.engine.check()
        return web.Response()

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Token ids in, token ids out."""
        parsed = protocol.parse_generate(await body_of(request), self._behind.limits, self._behind.text)
        self._refuse_without_weights()
        if parsed.group_stream:
            return await self._group_stream(request, parsed)
        if parsed.stream:
            return await self._event_stream(request, parsed)
        results: list[Json] = [{}] * len(parsed.samples)
        async for answers, _ in self._answers(parsed):
            for answer in answers:
                results[answer.sample.index] = self._render(answer, parsed)
        return web.json_response(results if parsed.many else results[0])

    async def models(self, request: web.Request) -> web.Response:
        """The one model, as OpenAI's clients list them."""
        card = {"id": self._behind.settings.model, "object": "model", "created": 0, "owned_by": "megatron_fapo"}
        return web.json_response(
            {"object": "list", "data": [{**card, "max_model_len": self._behind.limits.context_length}]}
        )

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Messages in, messages out."""
        chat = parse_chat(await body_of(request), self._behind.settings.model, self._behind.limits, self._behind.text)
        parsed = protocol.parse_generate(chat.generate, self._behind.limits, self._behind.text)
        self._refuse_without_weights()
        results: list[Json] = [{}] * len(parsed.samples)
        if chat.stream:
            return await self._chat_stream(request, chat, parsed, results)
        async for answers, _ in self._answers(parsed):
            for answer in answers:
                results[answer.sample.index] = self._render(answer, parsed)
        return web.json_response(chat.completion(results, self._behind.text))

    async def _chat_stream(
        self, request: web.Request, chat: Chat, parsed: Parsed, results: list[Json]
    ) -> web.StreamResponse:
        """Server-sent events, each with what is new in a choice."""

        async def pieces() -> Pieces:
            told = [0] * len(results)
            async for answers, last in self._answers(parsed):
                chunks: list[Json] = []
                for answer in answers:
                    index = answer.sample.index
                    results[index] = self._render(answer, parsed)
                    new, told[index] = chat.chunks(index, results[index], told[index])
                    chunks += new
                if last and chat.usage:
                    chunks.append(chat.last_chunk(results))
                events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
                yield "".join([*events, "data: [DONE]\n\n"] if last else events).encode(), last

        return await stream(request, "text/event-stream", pieces())

    def _refuse_without_weights(self) -> None:
        blocked = self._behind.engine.blocked or ""
        if "released" in blocked:
            raise RequestRejected(f"{blocked}: resume the memory, and load weights where they were released")

    async def _group_stream(self, request: web.Request, parsed: Parsed) -> web.StreamResponse:
        """One line a finished sample."""

        async def pieces() -> Pieces:
            async for answers, last in self._answers(parsed):
                lines = [
                    json.dumps(protocol.render_compact(a, self._behind.engine.versions)) for a in answers if a.reason
                ]
                yield "".join(f"{line}\n" for line in lines).encode(), last

        return await stream(request, "application/x-ndjson", pieces())

    async def _event_stream(self, request: web.Request, parsed: Parsed) -> web.StreamResponse:
        """Server-sent events, each with all tokens so far, as SGLang sends them."""

        async def pieces() -> Pieces:
            async for answers, last in self._answers(parsed):
                events = [f"data: {json.dumps(self._render(answer, parsed))}\n\n" for answer in answers]
                yield "".join([*events, "data: [DONE]\n\n"] if last else events).encode(), last

        return await stream(request, "text/event-stream", pieces())

    def _render(self, answer: Answer, parsed: Parsed) -> Json:
        return protocol.render(answer, parsed, self._behind.engine.versions, self._behind.text)

    async def _answers(self, parsed: Parsed) -> AsyncIterator[tuple[list[Answer], bool]]:
        """Submit, then yield what has come, and whether that is all; when the client leaves, its samples end."""
        left = {sample.index for sample in parsed.samples}
        self._behind.engine.submit(parsed.samples)
        self._behind.served += len(parsed.samples)
        try:
            while left:
                answers = [await parsed.inbox.get()]
                while not parsed.inbox.empty():
                    answers.append(parsed.inbox.get_nowait())
                self._behind.engine.check()
                left.difference_update(answer.sample.index for answer in answers if answer.reason)
                yield answers, not left
        finally:
            if left and self._behind.engine.failure is None:
                for sample in parsed.samples:
                    sample.aborted = True
                self._behind.engine.forget()
