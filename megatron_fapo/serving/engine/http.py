"""The routes: SGLang's HTTP API as far as training needs it, over an engine."""

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from aiohttp import web

from megatron_fapo.errors import BaseDiffers, DataError, FapoError, RequestRejected, WeightsError
from megatron_fapo.serving.engine.control_routes import ControlRoutes
from megatron_fapo.serving.engine.exchange import Behind, error
from megatron_fapo.serving.engine.generate_routes import GenerateRoutes
from megatron_fapo.serving.engine.protocol import Limits
from megatron_fapo.serving.engine.text import Text
from megatron_fapo.serving.engine.weight_routes import WeightRoutes
from megatron_fapo.serving.settings import ServerSettings

if TYPE_CHECKING:  # torch is imported after the port is open
    from megatron_fapo.serving.engine.engine import Engine

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_BODY_LIMIT = 256 * 2**20


class Routes:
    """All handlers over one engine. Everything is answered 503 until `open`."""

    def __init__(self, settings: ServerSettings, text: Text) -> None:
        self._behind, self._key = Behind(settings, text), settings.api_key()

    def open(self, engine: "Engine", limits: Limits) -> None:
        """From now on requests reach the engine."""
        self._behind.open(engine, limits)

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(middlewares=[self._guard], client_max_size=_BODY_LIMIT)
        app.router.add_get("/health", self.health)
        for path in ("/get_model_info", "/model_info"):
            app.router.add_get(path, self.model_info)
        for path in ("/get_server_info", "/server_info"):
            app.router.add_get(path, self.server_info)
        for routes in (GenerateRoutes(self._behind), WeightRoutes(self._behind), ControlRoutes(self._behind)):
            routes.add_to(app.router)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the key, and turn errors into JSON bodies."""
        given = request.headers.get("Authorization", "")
        if self._key is not None and not hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            return error(401, "wrong or missing API key: send Authorization: Bearer KEY")
        if not self._behind.is_open:
            return error(503, "the model is being loaded")
        try:
            return await handler(request)
        except web.HTTPException as refused:
            return error(refused.status, f"{request.method} {request.path}: {refused.reason}")
        except BaseDiffers as refused:
            return error(409, str(refused))
        except (RequestRejected, DataError, WeightsError) as refused:
            return error(400, str(refused))
        except FapoError as refused:
            return error(500, str(refused))

    async def health(self, request: web.Request) -> web.Response:
        """200 while the engine's thread lives."""
        self._behind.engine.check()
        return web.Response()

    async def model_info(self, request: web.Request) -> web.Response:
        """Which model, which weights."""
        return web.json_response(
            {"model_path": self._behind.settings.model, "weight_version": self._behind.engine.version}
        )

    async def server_info(self, request: web.Request) -> web.Response:
        """What the server is and which parts of the protocol it speaks."""
        running, waiting = self._behind.engine.load
        return web.json_response(
            {
                "engine": self._behind.settings.engine,
                "model_path": self._behind.settings.model,
                "weight_version": self._behind.engine.version,
                "weight_update": "begin_end",
                "weight_transports": ["disk", "shared_memory", "group", "delta"],
                "group_stream": True,
                "deterministic": self._behind.settings.deterministic,
                "context_length": self._behind.limits.context_length,
                "max_running_requests": self._behind.settings.max_running,
                "pid": os.getpid(),
                "running": running,
                "waiting": waiting,
                "served": self._behind.served,
                "blocked": self._behind.engine.blocked,
                "memory": self._behind.engine.memory(),
            }
        )
