"""What every route of the HTTP API shares: the engine behind it, reading a body, answering, streaming."""

import json
import logging
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from aiohttp import web

from megatron_fapo.errors import FapoError, RequestRejected
from megatron_fapo.serving.engine.protocol import Json, Limits
from megatron_fapo.serving.engine.text import Text
from megatron_fapo.serving.settings import ServerSettings

if TYPE_CHECKING:  # torch is imported after the port is open
    from megatron_fapo.serving.engine.engine import Engine

Pieces = AsyncGenerator[tuple[bytes, bool], None]
"""Parts of an answer, and whether each is the last."""

log = logging.getLogger(__name__)


class Behind:
    """What is behind the routes; engine and limits are there from `open` on."""

    def __init__(self, settings: ServerSettings, text: Text) -> None:
        self.settings, self.text = settings, text
        self.engine: Engine
        self.limits: Limits
        self.is_open = False
        self.served = 0
        """Samples that were asked for so far."""

    def open(self, engine: "Engine", limits: Limits) -> None:
        """From now on requests reach the engine."""
        self.engine, self.limits, self.is_open = engine, limits, True


def error(status: int, message: str) -> web.Response:
    """An error as SGLang words it."""
    return web.json_response({"success": False, "error": {"message": message, "code": status}}, status=status)


async def stream(request: web.Request, kind: str, pieces: Pieces) -> web.StreamResponse:
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


async def body_of(request: web.Request) -> Json:
    """The JSON object of a request; an empty body is an empty object."""
    raw = await request.read()
    try:
        body: Any = json.loads(raw) if raw else {}
    except ValueError as error:
        raise RequestRejected(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestRejected("the body must be a JSON object")
    return body
