"""Watches a group's servers and starts again those that die or no longer answer.

A server that was started again gets no work before it holds the group's present weights: `Hooks.catch_up` brings
them, or the next update does.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence

from megatron_fapo.errors import FapoError, ServerError, ServerUnreachable
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.group import Router, ServerGroup
from megatron_fapo.serving.process import Server
from megatron_fapo.serving.settings import ServerSettings

log = logging.getLogger(__name__)

Start = Callable[[int], Awaitable[Server]]
"""Start the server of a place in the group."""
Connect = Callable[[Server], ServerClient]


class Keeper:
    """Keeps the servers of a group. Waits for the end of each process and for what `/health` answers."""

    def __init__(
        self,
        group: ServerGroup,
        settings: ServerSettings,
        name: str,
        servers: Sequence[Server],
        start: Start,
        connect: Connect,
        router: Router | None = None,
    ) -> None:
        self._group, self._settings, self._name = group, settings, name
        self._start, self._connect, self._router = start, connect, router
        self._kept = dict(zip(group.clients, servers, strict=True))
        self._ended: FapoError | None = None
        group.hooks.suspect, group.hooks.diagnose = self.suspect, self.diagnose

    async def run(self) -> None:
        """Until cancelled; then what was started again is stopped."""
        await asyncio.gather(*(self._keep(place, client) for place, client in enumerate(self._group.clients)))

    async def suspect(self, client: ServerClient) -> bool:
        """As `Hooks.suspect`: a server that does not answer `/health` now is killed, which `_keep` sees."""
        server = self._kept.get(client)
        if server is None:
            return True
        if await client.health(self._settings.health_deadline):
            return False
        self._lose(client)
        server.kill()
        return True

    def diagnose(self) -> None:
        """As `Hooks.diagnose`."""
        if self._ended is not None:
            raise self._ended

    def _lose(self, client: ServerClient) -> None:
        if self._kept.pop(client, None) is not None:
            self._group.lose(client)

    async def _keep(self, place: int, client: ServerClient) -> None:
        server, first = self._kept[client], True
        left = self._settings.restarts
        try:
            while True:
                self._ended = await self._end(server, client)
                self._lose(client)
                await server.stop()
                if self._router is not None:
                    await self._router.remove(client)
                await client.close()
                again = None
                while again is None and left:
                    left -= 1
                    log.warning("%s-%d: %s; starting it again (%d more times)", self._name, place, self._ended, left)
                    async with self._group.hooks.room():
                        with contextlib.suppress(ServerError):
                            again = await self._start(place)
                        if again is not None:
                            server, first, client = again, False, self._connect(again)
                            self._kept[client] = server
                            self._group.gain(client)
                if again is None:
                    log.error("%s-%d: %s; it is not started again", self._name, place, self._ended)
                    self._group.give_up()
                    return
                self._group.hooks.restarted()
                await self._catch_up(place, client)
        finally:
            if not first:
                await client.close()
                await server.stop()

    async def _catch_up(self, place: int, client: ServerClient) -> None:
        """The present weights for a server that was started again. What is wrong with them ends the run."""
        try:
            if await self._group.hooks.catch_up(client):
                await self._group.admit([client])
        except ServerUnreachable as error:  # it has died again, which `_keep` sees
            log.warning("%s-%d did not take the weights: %s", self._name, place, error)
            await self.suspect(client)
        except FapoError as error:
            self._group.fail(error)

    async def _end(self, server: Server, client: ServerClient) -> FapoError:
        """How the server ended: by itself, or because it did not answer `/health` for too long and was killed."""
        ending = asyncio.ensure_future(server.wait())
        try:
            while not ending.done():
                await asyncio.wait({ending}, timeout=self._settings.health_interval)
                if not ending.done() and not await client.health(self._settings.health_deadline) and not ending.done():
                    log.warning("%s no longer answers /health: it is killed", server.url)
                    self._lose(client)
                    server.kill()
                    await ending
        finally:
            ending.cancel()
        try:
            server.check()
        except ServerError as error:
            return error
        raise AssertionError("a process that has been waited for has ended")
