"""The routes: SGLang's HTTP API as far as training needs it, over an engine."""

import asyncio
import hmac
import json
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web

from megatron_fapo.errors import BaseDiffers, DataError, FapoError, RequestRejected, WeightsError
from megatron_fapo.serving.engine import protocol, weight_bodies
from megatron_fapo.serving.engine.chat import Chat, parse_chat
from megatron_fapo.serving.engine.protocol import Json, Limits, Parsed
from megatron_fapo.serving.engine.sample import Answer
from megatron_fapo.serving.engine.text import Text
from megatron_fapo.serving.settings import ServerSettings
from megatron_fapo.weights import checksum

Pieces = AsyncGenerator[tuple[bytes, bool], None]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
TAGS = ("weights", "kv_cache")
_BODY_LIMIT = 256 * 2**20
_GOODBYE_SECONDS = 0.5
"""How long a server that was told to stop lets requests finish."""

if TYPE_CHECKING:  # torch is imported after the port is open
    from megatron_fapo.serving.engine.engine import Engine, PauseMode

log = logging.getLogger(__name__)


class Routes:
    """Handlers over one engine. Everything is answered 503 until `open`."""

    def __init__(self, settings: ServerSettings, text: Text) -> None:
        self._settings, self._text, self._key = settings, text, settings.api_key()
        self._engine: Engine
        self._limits: Limits
        self._open = False
        self._served = 0

    def open(self, engine: "Engine", limits: Limits) -> None:
        """From now on requests reach the engine."""
        self._engine, self._limits, self._open = engine, limits, True

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(middlewares=[self._guard], client_max_size=_BODY_LIMIT)
        get, post = app.router.add_get, app.router.add_post
        get("/health", self.health)
        get("/health_generate", self.health_generate)
        for path in ("/get_model_info", "/model_info"):
            get(path, self.model_info)
        for path in ("/get_server_info", "/server_info"):
            get(path, self.server_info)
        get("/v1/models", self.models)
        post("/generate", self.generate)
        post("/v1/chat/completions", self.chat)
        post("/update_weights_from_disk", self.update_from_disk)
        post("/begin_weight_update", self.begin_update)
        post("/update_weights_from_tensor", self.update_from_tensor)
        post("/init_weights_update_group", self.join_group)
        post("/update_weights_from_distributed", self.update_from_distributed)
        post("/destroy_weights_update_group", self.leave_group)
        post("/end_weight_update", self.end_update)
        post("/weights_checker", self.weights_checker)
        post("/pause_generation", self.pause)
        post("/continue_generation", self.proceed)
        post("/abort_request", self.abort)
        post("/flush_cache", self.flush)
        post("/release_memory_occupation", self.release)
        post("/resume_memory_occupation", self.resume)
        return app

    # What every request passes.

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the key, and turn errors into JSON bodies."""
        given = request.headers.get("Authorization", "")
        if self._key is not None and not hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            return _error(401, "wrong or missing API key: send Authorization: Bearer KEY")
        if not self._open:
            return _error(503, "the model is being loaded")
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _error(error.status, f"{request.method} {request.path}: {error.reason}")
        except BaseDiffers as error:
            return _error(409, str(error))
        except (RequestRejected, DataError, WeightsError) as error:
            return _error(400, str(error))
        except FapoError as error:
            return _error(500, str(error))

    # Reading.

    async def health(self, request: web.Request) -> web.Response:
        """200 while the engine's thread lives."""
        self._engine.check()
        return web.Response()

    async def health_generate(self, request: web.Request) -> web.StreamResponse:
        """200 when one token can be generated."""
        if self._engine.blocked is not None:
            return _error(503, f"nothing is generated: {self._engine.blocked}")
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        parsed = protocol.parse_generate(body, self._limits, self._text)
        async for _ in self._answers(parsed):
            pass
        return await self.health(request)

    async def model_info(self, request: web.Request) -> web.Response:
        """Which model, which weights."""
        return web.json_response({"model_path": self._settings.model, "weight_version": self._engine.version})

    async def server_info(self, request: web.Request) -> web.Response:
        """What the server is and which parts of the protocol it speaks."""
        running, waiting = self._engine.load
        return web.json_response(
            {
                "engine": self._settings.engine,
                "model_path": self._settings.model,
                "weight_version": self._engine.version,
                "weight_update": "begin_end",
                "weight_transports": ["disk", "shared_memory", "group", "delta"],
                "group_stream": True,
                "deterministic": self._settings.deterministic,
                "context_length": self._limits.context_length,
                "max_running_requests": self._settings.max_running,
                "pid": os.getpid(),
                "running": running,
                "waiting": waiting,
                "served": self._served,
                "blocked": self._engine.blocked,
                "memory": self._engine.memory(),
            }
        )

    # Generating.

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Token ids in, token ids out."""
        parsed = protocol.parse_generate(await _body(request), self._limits, self._text)
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
        card = {"id": self._settings.model, "object": "model", "created": 0, "owned_by": "megatron_fapo"}
        return web.json_response({"object": "list", "data": [{**card, "max_model_len": self._limits.context_length}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Messages in, messages out."""
        chat = parse_chat(await _body(request), self._settings.model, self._limits, self._text)
        parsed = protocol.parse_generate(chat.generate, self._limits, self._text)
        self._refuse_without_weights()
        results: list[Json] = [{}] * len(parsed.samples)
        if chat.stream:
            return await self._chat_stream(request, chat, parsed, results)
        async for answers, _ in self._answers(parsed):
            for answer in answers:
                results[answer.sample.index] = self._render(answer, parsed)
        return web.json_response(chat.completion(results, self._text))

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

        return await _stream(request, "text/event-stream", pieces())

    def _refuse_without_weights(self) -> None:
        blocked = self._engine.blocked or ""
        if "released" in blocked:
            raise RequestRejected(f"{blocked}: resume the memory, and load weights where they were released")

    async def _group_stream(self, request: web.Request, parsed: Parsed) -> web.StreamResponse:
        """One line a finished sample."""

        async def pieces() -> Pieces:
            async for answers, last in self._answers(parsed):
                lines = [json.dumps(protocol.render_compact(a, self._engine.versions)) for a in answers if a.reason]
                yield "".join(f"{line}\n" for line in lines).encode(), last

        return await _stream(request, "application/x-ndjson", pieces())

    async def _event_stream(self, request: web.Request, parsed: Parsed) -> web.StreamResponse:
        """Server-sent events, each with all tokens so far, as SGLang sends them."""

        async def pieces() -> Pieces:
            async for answers, last in self._answers(parsed):
                events = [f"data: {json.dumps(self._render(answer, parsed))}\n\n" for answer in answers]
                yield "".join([*events, "data: [DONE]\n\n"] if last else events).encode(), last

        return await _stream(request, "text/event-stream", pieces())

    def _render(self, answer: Answer, parsed: Parsed) -> Json:
        return protocol.render(answer, parsed, self._engine.versions, self._text)

    async def _answers(self, parsed: Parsed) -> AsyncIterator[tuple[list[Answer], bool]]:
        """Submit, then yield what has come, and whether that is all; when the client leaves, its samples end."""
        left = {sample.index for sample in parsed.samples}
        self._engine.submit(parsed.samples)
        self._served += len(parsed.samples)
        try:
            while left:
                answers = [await parsed.inbox.get()]
                while not parsed.inbox.empty():
                    answers.append(parsed.inbox.get_nowait())
                self._engine.check()
                left.difference_update(answer.sample.index for answer in answers if answer.reason)
                yield answers, not left
        finally:
            if left and self._engine.failure is None:
                for sample in parsed.samples:
                    sample.aborted = True
                self._engine.forget()

    # Weights.

    async def update_from_disk(self, request: web.Request) -> web.Response:
        """Replace all weights by those of a folder; or read them into an open update, which ends as others do."""
        body = await _body(request)
        folder = Path(str(body.get("model_path") or self._settings.model))
        if self._engine.updating:
            await self._engine.call(lambda: self._engine.read_folder(folder))
            return web.json_response({"success": True, "message": f"read {folder.name}"})
        version = str(body.get("weight_version") or folder.name)
        await self._engine.call(lambda: self._engine.load_from_disk(folder, version))
        return web.json_response({"success": True, "message": f"loaded {folder.name}", "weight_version": version})

    async def begin_update(self, request: web.Request) -> web.Response:
        """Open an update."""
        await self._engine.call(self._engine.begin_update)
        return web.json_response({"success": True, "message": "update open"})

    async def update_from_tensor(self, request: web.Request) -> web.Response:
        """Copy one bucket, or overwrite what changed."""
        body = await _body(request)
        match body.get("load_format"):
            case "shared_memory":
                bucket = weight_bodies.parse_bucket(body)
                await self._engine.call(lambda: self._engine.copy_bucket(bucket))
                number = len(bucket.tensors)
            case "delta":
                changes = weight_bodies.parse_changes(body)
                await self._engine.call(lambda: self._engine.apply(changes))
                number = len(changes)
            case other:
                raise RequestRejected(f"load_format {other!r} is not supported: use shared_memory or delta")
        return web.json_response({"success": True, "message": f"{number} tensors"})

    async def join_group(self, request: web.Request) -> web.Response:
        """Become a member of a group in which a trainer sends weights."""
        name, join = weight_bodies.parse_group(await _body(request))
        await self._engine.call(lambda: self._engine.join(name, join))
        return web.json_response({"success": True, "message": f"joined {name}"})

    async def update_from_distributed(self, request: web.Request) -> web.Response:
        """Take tensors that a group's rank 0 sends."""
        specs, name = weight_bodies.parse_sent(await _body(request))
        await self._engine.call(lambda: self._engine.receive(specs, name))
        return web.json_response({"success": True, "message": f"{len(specs)} tensors"})

    async def leave_group(self, request: web.Request) -> web.Response:
        """Leave a group."""
        name = str((await _body(request)).get("group_name"))
        await self._engine.call(lambda: self._engine.leave(name))
        return web.json_response({"success": True, "message": f"left {name}"})

    async def end_update(self, request: web.Request) -> web.Response:
        """Close the update under a version."""
        version = (await _body(request)).get("weight_version")
        if version is None:
            raise RequestRejected("weight_version: which version are these weights?")
        await self._engine.call(lambda: self._engine.end_update(str(version)))
        return web.json_response({"success": True, "weight_version": str(version)})

    async def weights_checker(self, request: web.Request) -> web.Response:
        """The checksum of what the model holds, and of each parameter."""
        return web.json_response({"success": True, **await self._held()})

    async def _held(self) -> Json:
        engine = self._engine

        def held() -> Json:
            digests = engine.weights.digests()
            return {
                "checksum": checksum(digests),
                "checksums": digests,
                "tensors": len(engine.weights.names),
                "nbytes": engine.weights.nbytes,
                "weight_version": engine.version,
            }

        return await engine.call(held)

    # Control.

    async def pause(self, request: web.Request) -> web.Response:
        """Stop generating."""
        mode = (await _body(request)).get("mode") or "abort"
        if mode not in ("in_place", "retract", "abort"):
            raise RequestRejected(f"mode {mode!r}: must be in_place, retract or abort")
        running = await self._engine.call(lambda: self._engine.pause(cast("PauseMode", mode)))
        return web.json_response({"success": True, "status": "paused", "mode": mode, "running": running})

    async def proceed(self, request: web.Request) -> web.Response:
        """Generate again."""
        await self._engine.call(self._engine.proceed)
        return web.json_response({"success": True, "status": "running"})

    async def abort(self, request: web.Request) -> web.Response:
        """End requests by id, or all."""
        body = await _body(request)
        rid = None if body.get("abort_all") else body.get("rid")
        if rid is None and not body.get("abort_all"):
            raise RequestRejected("rid: which request? (or abort_all: true)")
        if not isinstance(rid, str | None):
            raise RequestRejected(f"rid: must be a string, found {rid!r:.60}")
        count = await self._engine.call(lambda: self._engine.abort(rid, "aborted by request"))
        return web.json_response({"success": True, "aborted": count})

    async def flush(self, request: web.Request) -> web.Response:
        """Free the KV cache."""
        await self._engine.call(self._engine.flush)
        return web.json_response({"success": True, "message": "cache flushed"})

    async def release(self, request: web.Request) -> web.Response:
        """Give memory back."""
        tags, backup = await _tags(request), self._settings.weights_cpu_backup
        await self._engine.call(lambda: self._engine.release(tags, backup))
        return web.json_response({"success": True, "released": tags})

    async def resume(self, request: web.Request) -> web.Response:
        """Take memory again."""
        tags = await _tags(request)
        await self._engine.call(lambda: self._engine.resume(tags))
        return web.json_response({"success": True, "resumed": tags, "blocked": self._engine.blocked})


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"success": False, "error": {"message": message, "code": status}}, status=status)


async def _stream(request: web.Request, kind: str, pieces: Pieces) -> web.StreamResponse:
    """Send (piece, whether it is the last) as they come, in as few packets as that allows.

    An error after the first piece can only be shown by breaking the connection off.
    """
    response: web.StreamResponse | None = None
    try:
        async for piece, last in pieces:
            if response is None:
                if last:
                    return web.Response(body=piece, content_type=kind)
                response = web.StreamResponse(headers={"Content-Type": kind})
                await response.prepare(request)
            if last:
                await response.write_eof(piece)
            elif piece:
                await response.write(piece)
    except FapoError:
        if response is None:
            raise
        log.exception("a stream broke off")
        if request.transport is not None:
            request.transport.abort()
    finally:
        await pieces.aclose()
    assert response is not None, "a request has at least one sample"
    return response


async def _body(request: web.Request) -> Json:
    """The JSON object of a request; an empty body is an empty object."""
    raw = await request.read()
    try:
        body: Any = json.loads(raw) if raw else {}
    except ValueError as error:
        raise RequestRejected(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestRejected("the body must be a JSON object")
    return body


async def _tags(request: web.Request) -> list[str]:
    tags = (await _body(request)).get("tags") or list(TAGS)
    if not isinstance(tags, list) or not set(tags) <= set(TAGS):
        raise RequestRejected(f"tags {tags!r}: known are {', '.join(TAGS)}")
    return tags


def runner(app: web.Application) -> web.AppRunner:
    """How an application runs: a client that leaves cancels its handler, so that its samples end."""
    return web.AppRunner(
        app, access_log=None, handler_cancellation=True, keepalive_timeout=3600, shutdown_timeout=_GOODBYE_SECONDS
    )


async def listen(app_runner: web.AppRunner, host: str, port: int) -> int:
    """Start listening and return the port."""
    await app_runner.setup()
    site = web.TCPSite(app_runner, host, port, backlog=1024)
    await site.start()
    port_bound: int = app_runner.addresses[0][1]
    return port_bound


def run_forever(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `main` until SIGTERM or SIGINT sets the event it is given."""
    import signal

    async def body() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    asyncio.run(body())
