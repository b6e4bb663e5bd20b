"""Watches a group's servers, starts again those that die or no longer answer, adds and removes some when asked.

A server that was started in the course of a run gets no work before it holds the group's present weights:
`Hooks.catch_up` brings them, or the next update does.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from megatron_fapo.errors import FapoError, ServerError, ServerUnreachable
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.group import ServerGroup
from megatron_fapo.serving.hooks import Router
from megatron_fapo.serving.process import Server
from megatron_fapo.serving.settings import ServerSettings

log = logging.getLogger(__name__)

Start = Callable[[int], Awaitable[Server]]
"""Start the server of a place in the group."""
_LOOK = 0.1
"""Seconds between two looks at whether a server that leaves has finished."""
_IDLE_LOOKS = 2
"""So many in a row must find it idle: a request may be on its way to it, or an answer from it."""
Connect = Callable[[Server], ServerClient]


@dataclass(slots=True, kw_only=True)
class _Place:
    """A place in the group, and who is there now."""

    number: int
    server: Server | None = None
    client: ServerClient | None = None
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when its server is no longer wanted."""


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
        self._places = {
            number: _Place(number=number, server=server, client=client)
            for number, (client, server) in enumerate(self._kept.items())
        }
        self._wanted = len(servers)
        self._tasks = asyncio.TaskGroup()
        self._ended: FapoError | None = None
        group.hooks.suspect, group.hooks.diagnose = self.suspect, self.diagnose
        group.hooks.resize, group.hooks.seated = self.resize, self.seated

    async def run(self) -> None:
        """Until cancelled; then all servers are stopped. Raises the first error of a keeper's own."""
        try:
            async with self._tasks:
                for place in self._places.values():
                    self._tasks.create_task(self._keep(place))
                await asyncio.Event().wait()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def resize(self, count: int) -> None:
        """As `Hooks.resize`: servers of the places beyond leave, and those that are missing are started."""
        if not 0 < count <= self._settings.places:
            raise ServerError(f"{self._name}: {count} servers are wanted, 1 to {self._settings.places} can be had")
        self._wanted = count
        for place in self._places.values():
            if place.number >= count and not place.leaving.is_set():
                place.leaving.set()
                if place.client is not None:
                    self._group.retire(place.client)
        for number in range(count):
            if number not in self._places:
                self._fill(number)

    def seated(self) -> dict[int, ServerClient]:
        """As `Hooks.seated`."""
        return {place.number: place.client for place in self._places.values() if place.client is not None}

    def _fill(self, number: int) -> None:
        place = self._places[number] = _Place(number=number)
        self._group.expect()
        self._tasks.create_task(self._keep(place))

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

    async def _keep(self, place: _Place) -> None:
        """Until the server of a place has left, or is not started again."""
        try:
            await self._serve(place)
        finally:
            del self._places[place.number]
            await self._end_of(place)
        if place.leaving.is_set() and place.number < self._wanted:  # wanted again while it left
            self._fill(place.number)

    async def _serve(self, place: _Place) -> None:
        tries, added = self._settings.restarts, place.server is None
        if added:
            tries += 1
        while True:
            if place.server is None:
                tries = await self._bring(place, tries)
                if place.client is None:
                    log.error("%s: %s; it is not started again", self._at(place), self._ended)
                    self._group.give_up()
                    return
                if not added:
                    self._group.hooks.restarted()
                added = False
                await self._catch_up(place, place.client)
            server, client = place.server, place.client
            assert server is not None
            assert client is not None
            ended = await self._end(server, client, place.leaving)
            if ended is None:
                await self._let_go(place, client)
                return
            self._ended = ended
            self._lose(client)
            await self._end_of(place)
            if self._router is not None:
                await self._router.remove(client)
            log.warning("%s: %s; starting it again (at most %d times)", self._at(place), ended, tries)

    def _at(self, place: _Place) -> str:
        return f"{self._name}-{place.number}"

    async def _bring(self, place: _Place, tries: int) -> int:
        """Start a server there, which joins the group without being asked yet; how many tries are left of so many."""
        while tries and not place.leaving.is_set():
            tries -= 1
            async with self._group.hooks.room():
                try:
                    server = await self._start(place.number)
                except ServerError as error:
                    self._ended = error
                    log.warning("%s did not start: %s", self._at(place), error)
                    continue
                place.server, place.client = server, self._connect(server)
                self._kept[place.client] = server
                self._group.gain(place.client)
                break
        return tries

    async def _end_of(self, place: _Place) -> None:
        """Stop a server, whether it lives or not, and forget it."""
        server, client, place.server, place.client = place.server, place.client, None, None
        if server is not None:
            await server.stop()
        if client is not None:
            self._kept.pop(client, None)
            await client.close()

    async def _let_go(self, place: _Place, client: ServerClient) -> None:
        """Wait until a server has finished what it was asked, as long as a request may take; it then ends."""
        self._group.retire(client)
        if self._router is not None:
            await self._router.remove(client)
        self._kept.pop(client)
        with contextlib.suppress(TimeoutError, ServerError):
            async with asyncio.timeout(self._settings.deadline):
                idle = 0
                while idle < _IDLE_LOOKS:
                    await asyncio.sleep(_LOOK)
                    idle = 0 if await self._group.busy(client) else idle + 1
        self._group.part(client)
        log.warning("%s at %s has left", self._at(place), client.url)

    async def _catch_up(self, place: _Place, client: ServerClient) -> None:
        """The present weights for a server that was started. What is wrong with them ends the run."""
        if place.leaving.is_set():
            return
        try:
            if await self._group.hooks.catch_up(client):
                await self._group.admit([client])
        except ServerUnreachable as error:  # it has died again, which `_keep` sees
            log.warning("%s did not take the weights: %s", self._at(place), error)
            await self.suspect(client)
        except FapoError as error:
            self._group.fail(error)

    async def _end(self, server: Server, client: ServerClient, leaving: asyncio.Event) -> FapoError | None:
        """How the server ended: by itself, or because it did not answer `/health` for too long and was killed. None
        when it lives, and is to leave."""
        ending, asked = asyncio.ensure_future(server.wait()), asyncio.ensure_future(leaving.wait())
        try:
            while not ending.done():
                await asyncio.wait(
                    {ending, asked}, timeout=self._settings.health_interval, return_when="FIRST_COMPLETED"
                )
                if asked.done() and not ending.done():
                    return None
                if not ending.done() and not await client.health(self._settings.health_deadline) and not ending.done():
                    log.warning("%s no longer answers /health: it is killed", server.url)
                    self._lose(client)
                    server.kill()
                    await ending
        finally:
            ending.cancel()
            asked.cancel()
        try:
            server.check()
        except ServerError as error:
            return error
        raise AssertionError("a process that has been waited for has ended")
