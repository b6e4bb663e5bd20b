"""The routes that stop and continue generation, and give and take memory."""

from typing import TYPE_CHECKING, cast

from aiohttp import web

from megatron_fapo.errors import RequestRejected
from megatron_fapo.serving.engine.exchange import Behind, body_of

if TYPE_CHECKING:  # torch is imported after the port is open
    from megatron_fapo.serving.engine.engine import PauseMode

TAGS = ("weights", "kv_cache")


class ControlRoutes:
    """Handlers that control the engine."""

    def __init__(self, behind: Behind) -> None:
        self._behind = behind

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Register all paths."""
        router.add_post("/pause_generation", self.pause)
        router.add_post("/continue_generation", self.proceed)
        router.add_post("/abort_request", self.abort)
        router.add_post("/flush_cache", self.flush)
        router.add_post("/release_memory_occupation", self.release)
        router.add_post("/resume_memory_occupation", self.resume)

    async def pause(self, request: web.Request) -> web.Response:
        """Stop generating."""
        mode = (await body_of(request)).get("mode") or "abort"
        if mode not in ("in_place", "retract", "abort"):
            raise RequestRejected(f"mode {mode!r}: must be in_place, retract or abort")
        running = await self._behind.engine.call(lambda: self._behind.engine.pause(cast("PauseMode", mode)))
        return web.json_response({"success": True, "status": "paused", "mode": mode, "running": running})

    async def proceed(self, request: web.Request) -> web.Response:
        """Generate again."""
        await self._behind.engine.call(self._behind.engine.proceed)
        return web.json_response({"success": True, "status": "running"})

    async def abort(self, request: web.Request) -> web.Response:
        """End requests by id, or all."""
        body = await body_of(request)
        rid = None if body.get("abort_all") else body.get("rid")
        if rid is None and not body.get("abort_all"):
            raise RequestRejected("rid: which request? (or abort_all: true)")
        if not isinstance(rid, str | None):
            raise RequestRejected(f"rid: must be a string, found {rid!r:.60}")
        count = await self._behind.engine.call(lambda: self._behind.engine.abort(rid, "aborted by request"))
        return web.json_response({"success": True, "aborted": count})

    async def flush(self, request: web.Request) -> web.Response:
        """Free the KV cache."""
        await self._behind.engine.call(self._behind.engine.flush)
        return web.json_response({"success": True, "message": "cache flushed"})

    async def release(self, request: web.Request) -> web.Response:
        """Give memory back."""
        tags, backup = await _tags(request), self._behind.settings.weights_cpu_backup
        await self._behind.engine.call(lambda: self._behind.engine.release(tags, backup))
        return web.json_response({"success": True, "released": tags})

    async def resume(self, request: web.Request) -> web.Response:
        """Take memory again."""
        tags = await _tags(request)
        await self._behind.engine.call(lambda: self._behind.engine.resume(tags))
        return web.json_response({"success": True, "resumed": tags, "blocked": self._behind.engine.blocked})


async def _tags(request: web.Request) -> list[str]:
    tags = (await body_of(request)).get("tags") or list(TAGS)
    if not isinstance(tags, list) or not set(tags) <= set(TAGS):
        raise RequestRejected(f"tags {tags!r}: known are {', '.join(TAGS)}")
    return tags
