"""The routes that bring new weights and say what is held."""

from pathlib import Path

from aiohttp import web

from megatron_fapo.errors import RequestRejected
from megatron_fapo.serving.engine import weight_bodies
from megatron_fapo.serving.engine.exchange import Behind, body_of
from megatron_fapo.serving.engine.protocol import Json
from megatron_fapo.weights import checksum


class WeightRoutes:
    """Handlers that change and sum the weights."""

    def __init__(self, behind: Behind) -> None:
        self._behind = behind

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Register all paths."""
        router.add_post("/update_weights_from_disk", self.update_from_disk)
        router.add_post("/begin_weight_update", self.begin_update)
        router.add_post("/update_weights_from_tensor", self.update_from_tensor)
        router.add_post("/init_weights_update_group", self.join_group)
        router.add_post("/update_weights_from_distributed", self.update_from_distributed)
        router.add_post("/destroy_weights_update_group", self.leave_group)
        router.add_post("/end_weight_update", self.end_update)
        router.add_post("/weights_checker", self.weights_checker)

    async def update_from_disk(self, request: web.Request) -> web.Response:
        """Replace all weights by those of a folder; or read them into an open update, which ends as others do."""
        body = await body_of(request)
        folder = Path(str(body.get("model_path") or self._behind.settings.model))
        if self._behind.engine.updating:
            await self._behind.engine.call(lambda: self._behind.engine.read_folder(folder))
            return web.json_response({"success": True, "message": f"read {folder.name}"})
        version = str(body.get("weight_version") or folder.name)
        await self._behind.engine.call(lambda: self._behind.engine.load_from_disk(folder, version))
        return web.json_response({"success": True, "message": f"loaded {folder.name}", "weight_version": version})

    async def begin_update(self, request: web.Request) -> web.Response:
        """Open an update."""
        await self._behind.engine.call(self._behind.engine.begin_update)
        return web.json_response({"success": True, "message": "update open"})

    async def update_from_tensor(self, request: web.Request) -> web.Response:
        """Copy one bucket, or overwrite what changed."""
        body = await body_of(request)
        match body.get("load_format"):
            case "shared_memory":
                bucket = weight_bodies.parse_bucket(body)
                await self._behind.engine.call(lambda: self._behind.engine.copy_bucket(bucket))
                number = len(bucket.tensors)
            case "delta":
                changes = weight_bodies.parse_changes(body)
                await self._behind.engine.call(lambda: self._behind.engine.apply(changes))
                number = len(changes)
            case other:
                raise RequestRejected(f"load_format {other!r} is not supported: use shared_memory or delta")
        return web.json_response({"success": True, "message": f"{number} tensors"})

    async def join_group(self, request: web.Request) -> web.Response:
        """Become a member of a group in which a trainer sends weights."""
        name, join = weight_bodies.parse_group(await body_of(request))
        await self._behind.engine.call(lambda: self._behind.engine.join(name, join))
        return web.json_response({"success": True, "message": f"joined {name}"})

    async def update_from_distributed(self, request: web.Request) -> web.Response:
        """Take tensors that a group's rank 0 sends."""
        specs, name = weight_bodies.parse_sent(await body_of(request))
        await self._behind.engine.call(lambda: self._behind.engine.receive(specs, name))
        return web.json_response({"success": True, "message": f"{len(specs)} tensors"})

    async def leave_group(self, request: web.Request) -> web.Response:
        """Leave a group."""
        name = str((await body_of(request)).get("group_name"))
        await self._behind.engine.call(lambda: self._behind.engine.leave(name))
        return web.json_response({"success": True, "message": f"left {name}"})

    async def end_update(self, request: web.Request) -> web.Response:
        """Close the update under a version."""
        version = (await body_of(request)).get("weight_version")
        if version is None:
            raise RequestRejected("weight_version: which version are these weights?")
        await self._behind.engine.call(lambda: self._behind.engine.end_update(str(version)))
        return web.json_response({"success": True, "weight_version": str(version)})

    async def weights_checker(self, request: web.Request) -> web.Response:
        """The checksum of what the model holds, and of each parameter."""
        return web.json_response({"success": True, **await self._held()})

    async def _held(self) -> Json:
        engine = self._behind.engine

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
