"""Several servers of one role as one generator: where a request goes, and what happens when its server dies."""

import asyncio
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from megatron_fapo.errors import FapoError, ServerError, ServerUnreachable
from megatron_fapo.records import Generation, GenerationRequest, Ints, VersionSpan, floats, ints
from megatron_fapo.serving.client import PauseMode, ServerClient, group_of
from megatron_fapo.serving.hooks import Hooks, Router

log = logging.getLogger(__name__)

_BALANCE = 1.25
"""A group's requests stay at its server while that has at most so much of an even share (arXiv:1608.01350)."""
_HOMES = 4096
"""Groups whose server is remembered."""
_TRIES = 3
"""Requests to one server that lives: a connection that it has closed in between breaks off as one does that dies."""
_ROUTED_TRIES = 6
_BACKOFF = 0.2
"""Seconds before the second request to a router; twice as long before each further one."""
_LOOK = 0.05
"""Seconds between two looks at whether a server has ended what it was asked."""


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """A server of a group."""

    client: ServerClient
    ready: bool = True
    """Whether it holds the weights that the group generates with, so that it may be asked."""
    leaving: bool = False
    """Whether it only finishes what it was asked."""
    resting: bool = False
    """Whether its devices are lent to others: it holds the weights, and is asked nothing until it works again."""
    asked: dict[str, None] = field(default_factory=dict)
    """Samples asked of it that have not arrived, the latest last."""

    @property
    def outstanding(self) -> int:
        """How many."""
        return len(self.asked)

    @property
    def at_work(self) -> bool:
        """Whether it may be asked."""
        return self.ready and not self.leaving and not self.resting


Moves = Literal["never", "on", "anew"]
"""An aborted sample is its receiver's; or it is drawn at another server: from where it was, or from its first token,
which gives the same digits as without the abort."""


@dataclass(slots=True)
class _Attempt:
    """How far a request has come."""

    key: str
    tried: Counter[Member] = field(default_factory=Counter)
    routed: int = 0
    error: ServerError | None = None


class ServerGroup:
    """Several servers of one role as one `Generator` that loses no sample and yields none twice.

    A request goes where its group's requests went before, which share a prefix, unless that server is behind the
    others; else where the fewest samples are outstanding. When its server dies it goes on at another one with the
    samples that have not arrived, or waits until a dead one has been started again and holds the present weights;
    `deadline` bounds all of that, in seconds from the request's start. A server that failed is asked last until it
    has answered something again, be it a request, a control verb or an update. With a `router`, requests go through
    it and everything else to the servers; when the router dies the group does without, and so does a request that it
    refuses again and again.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        hooks: Hooks | None = None,
        *,
        deadline: float = math.inf,
        router: Router | None = None,
    ) -> None:
        if not clients:
            raise ValueError("a group needs at least one server")
        self.hooks = hooks or Hooks()
        self._deadline = deadline
        self._members = [Member(client=client) for client in clients]
        self._router = router
        self._homes: OrderedDict[str, Member] = OrderedDict()
        self.moves: Moves = "never"
        """What becomes of a sample that its server ends early, as servers do whose devices are lent."""
        self.outstanding = 0
        """Samples that somebody waits for, whether or not a server has been asked for them."""
        self._coming = 0
        self._changed = asyncio.Event()
        self._failure: FapoError | None = None

    @property
    def clients(self) -> tuple[ServerClient, ...]:
        """The servers that live and stay, those whose weights are behind included: what an update must reach."""
        return tuple(member.client for member in self._members if not member.leaving)

    # Who belongs to it.

    def may_ask(self, client: ServerClient) -> bool:
        """Whether this server is one of the group's and holds the present weights."""
        return any(member.client is client and member.ready and not member.leaving for member in self._members)

    def lose(self, client: ServerClient) -> None:
        """A server has died and is being started again; its requests go on elsewhere."""
        if any(member.client is client for member in self._members):
            self._members = [member for member in self._members if member.client is not client]
            self._coming += 1
            self._tell()

    def gain(self, client: ServerClient) -> None:
        """A server that was lost, or expected, has been started. It is asked nothing until `admit`."""
        self._coming -= 1
        self._members.append(Member(client=client, ready=False))
        self._tell()

    def give_up(self) -> None:
        """A server that was lost, or expected, does not come."""
        self._coming -= 1
        self._tell()

    def resize(self, count: int) -> None:
        """So many servers from now on. Those that come hold the present weights before they are asked anything; those
        that leave first finish what they were asked."""
        self.hooks.resize(count)

    async def settled(self) -> None:
        """Return when no server is expected any more."""
        while self._coming:
            await self._changed.wait()

    def expect(self) -> None:
        """A server more is being started; `gain` or `give_up` follows."""
        self._coming += 1

    def retire(self, client: ServerClient) -> None:
        """Ask this server nothing more; `part` follows."""
        for member in self._members:
            member.leaving = member.leaving or member.client is client
        self._tell()

    async def busy(self, client: ServerClient) -> bool:
        """Whether a server still generates what it was asked; what came through the router only the server knows."""
        if any(member.client is client and member.outstanding for member in self._members):
            return True
        return self._router is not None and await client.busy()

    def part(self, client: ServerClient) -> None:
        """A server has left."""
        self._members = [member for member in self._members if member.client is not client]
        self._tell()

    def fail(self, error: FapoError) -> None:
        """Raise this from every request from now on."""
        self._failure = error
        self._tell()

    async def admit(self, clients: Sequence[ServerClient]) -> None:
        """These servers hold the present weights: they may be asked."""
        for member in self._members:
            if member.client in clients and not member.ready and not member.leaving:
                if not member.resting:
                    await self._tell_router(member.client)
                member.ready = True
        self._tell()

    async def _tell_router(self, client: ServerClient) -> None:
        if self._router is None:
            return
        try:
            await self._router.add(client)
        except ServerUnreachable:
            await self._look_at_router()
            if self._router is not None:
                raise

    # Servers whose devices are lent.

    async def rest(self, clients: Sequence[ServerClient]) -> None:
        """Ask these servers nothing until `work`; what they were asked goes on at others, as `moves` says.

        Returns when they have nothing left to do, or have died.
        """
        for member in self._of(clients):
            member.resting = True
            if self._router is not None:
                await self._router.remove(member.client)
        self._tell()
        await asyncio.gather(*(self._empty(member.client) for member in self._of(clients)))

    async def _empty(self, client: ServerClient) -> None:
        while any(member.client is client for member in self._members):
            try:
                if not await self.busy(client):
                    return
                await client.abort()  # again and again: a request may still be on its way
            except ServerUnreachable:
                await self.hooks.suspect(client)
            await asyncio.sleep(_LOOK)

    async def work(self, clients: Sequence[ServerClient]) -> None:
        """These servers may be asked again, where they hold the present weights."""
        for member in self._of(clients):
            if member.ready:
                await self._tell_router(member.client)
            member.resting = False
        self._tell()

    async def level(self) -> None:
        """Let servers that were asked for more than their share end what was asked last; it goes on at the others."""
        working = [member for member in self._members if member.at_work]
        share = math.ceil(sum(member.outstanding for member in working) / max(len(working), 1))
        late = [(member, name) for member in working for name in [*member.asked][math.ceil(_BALANCE * share) :]]
        with suppress(ServerUnreachable):  # whoever waits for that server's answers sees it too
            await asyncio.gather(*(member.client.abort(name) for member, name in late))

    def rests(self, client: ServerClient) -> bool:
        """Whether this server's devices are lent."""
        return any(member.resting for member in self._of([client]))

    @property
    def at_work(self) -> int:
        """Servers that may be asked."""
        return sum(member.at_work for member in self._members)

    def _of(self, clients: Iterable[ServerClient]) -> list[Member]:
        return [member for member in self._members if member.client in clients]

    async def some(self) -> tuple[ServerClient, ...]:
        """`clients`, once there is one. Raises what is known of their end when none will come."""
        while not self.clients:
            await self._change()
        return self.clients

    def _tell(self) -> None:
        """Wake all who wait for a server."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self, error: ServerError | None = None) -> None:
        """Come back when the membership has changed; raise when nothing can be expected to change."""
        if self._failure is not None:
            raise self._failure
        if not self._coming and all((m.ready and not m.resting) or m.leaving for m in self._members):
            self.hooks.diagnose()
            raise error or ServerUnreachable("no server is left")
        await self._changed.wait()

    # Where requests go.

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Generation, None]:
        """As `Generator.generate`. Raises ServerUnreachable when no server is left to try, or past the deadline."""
        end = asyncio.get_running_loop().time() + self._deadline
        attempt = _Attempt(group_of(request.ids[0]))
        left = len(request.ids)
        self.outstanding += left
        try:
            async with aclosing(self._samples(request, attempt, end)) as samples:
                async for sample in samples:
                    left, self.outstanding = left - 1, self.outstanding - 1
                    yield sample
        finally:
            self.outstanding -= left

    async def _samples(
        self, request: GenerationRequest, attempt: _Attempt, end: float
    ) -> AsyncGenerator[Generation, None]:
        waiting = dict(zip(request.ids, request.seeds, strict=True))
        moving: list[asyncio.Task[Generation]] = []
        try:
            while waiting:
                left = replace(request, ids=tuple(waiting), seeds=tuple(waiting.values()))
                async with self._asking(attempt, left.ids, end) as (client, arrived):
                    async with aclosing(client.generate(left)) as samples:
                        while True:
                            async with asyncio.timeout_at(end):
                                sample = await anext(samples, None)
                            if sample is None:
                                break
                            if waiting.pop(sample.id, None) is None:
                                raise ServerError(
                                    f"{client.url} sent a sample twice, or one of others", request=sample.id
                                )
                            arrived(sample.id)
                            if sample.finish_reason == "abort" and self.moves != "never":
                                moving.append(asyncio.ensure_future(self._move(left, sample, end)))
                            else:
                                yield sample
                if attempt.error is not None and waiting:
                    self.hooks.retried(len(waiting))
            for moved in asyncio.as_completed(moving):
                yield await moved
        finally:
            for task in moving:
                task.cancel()
            await asyncio.gather(*moving, return_exceptions=True)

    async def _move(self, request: GenerationRequest, begun: Generation, end: float) -> Generation:
        """The whole of a sample that its server has ended early, drawn to its end at another one."""
        self.hooks.moved(1)
        drawn = len(begun.token_ids) if self.moves == "on" else 0
        left = request.sampling.max_new_tokens - drawn
        rest = replace(
            request,
            ids=(begun.id,),
            seeds=(request.seeds[request.ids.index(begun.id)],),
            token_ids=ints(np.concatenate([request.token_ids, begun.token_ids[:drawn]])),
            sampling=replace(request.sampling, max_new_tokens=left),
            drawn=request.drawn + drawn,
        )
        # Its group's server has more than its share, and the router might send it back to where it was.
        attempt = _Attempt(begun.id, routed=_ROUTED_TRIES)
        async with aclosing(self._samples(rest, attempt, end)) as samples:
            sample = await anext(samples)
        return _joined(begun, sample) if drawn else sample

    async def choices(self, rid: str, token_ids: Ints, choices: Sequence[int]) -> list[float]:
        """`ServerClient.choices`, at another server when one dies."""
        end = asyncio.get_running_loop().time() + self._deadline
        attempt = _Attempt(group_of(rid))
        while True:
            self.outstanding += 1
            try:
                async with self._asking(attempt, (rid,), end) as (client, _), asyncio.timeout_at(end):
                    return await client.choices(rid, token_ids, choices)
            finally:
                self.outstanding -= 1

    @asynccontextmanager
    async def _asking(
        self, attempt: _Attempt, names: Sequence[str], end: float
    ) -> AsyncIterator[tuple[ServerClient, Callable[[str], None]]]:
        """The server to ask for these samples; to be told of each that arrives.

        That it could not be reached ends the body, and is kept in `attempt.error` for the next one.
        """
        left = dict.fromkeys(names)
        try:
            async with asyncio.timeout_at(end):
                member = await self._choose(attempt, len(left))
            member.asked |= left

            def arrived(name: str) -> None:
                del left[name]
                member.asked.pop(name, None)

            attempt.error = None
            try:
                yield member.client, arrived
            except ServerUnreachable as error:
                attempt.error = error
                async with asyncio.timeout_at(end):
                    await self._failed(member, attempt)
            finally:
                for name in left:
                    member.asked.pop(name, None)
        except TimeoutError:
            raise ServerUnreachable(
                f"{len(left)} samples did not come within {self._deadline:g} s (deadline), retries included",
                request=attempt.key,
            ) from None

    async def _choose(self, attempt: _Attempt, samples: int) -> Member:
        """The server, or the router, that this request should try next; waits for one to come."""
        while True:
            if self._failure is not None:
                raise self._failure
            ready = [member for member in self._members if member.at_work]
            if ready and self._router is not None and attempt.routed < _ROUTED_TRIES:
                return Member(client=self._router.client)
            untried = [member for member in ready if attempt.tried[member] < _TRIES]
            if untried:
                return self._best(untried, attempt.key, samples)
            await self._change(attempt.error)

    def _best(self, members: Sequence[Member], key: str, samples: int) -> Member:
        place = self._members.index
        best = min(members, key=lambda m: (m.client.failing, m.outstanding, place(m)))
        home = self._homes.get(key)
        if home is not None and home in members and not home.client.failing:
            total = sum(member.outstanding for member in members)
            if home.outstanding + samples <= _BALANCE * (total + samples) / len(members):
                best = home
        self._homes[key] = best
        self._homes.move_to_end(key)
        if len(self._homes) > _HOMES:
            self._homes.popitem(last=False)
        return best

    async def _failed(self, member: Member, attempt: _Attempt) -> None:
        """What to do before the next attempt."""
        attempt.tried[member] += 1
        if self._router is not None and member.client is self._router.client:
            attempt.routed += 1
            await asyncio.sleep(_BACKOFF * 2 ** (attempt.routed - 1))
            await self._look_at_router()
        else:
            await self.hooks.suspect(member.client)

    async def _look_at_router(self) -> None:
        """Do without it where it does not answer."""
        router = self._router
        if router is not None and not await router.alive():
            log.warning("the router at %s is gone: requests go to the servers directly", router.client.url)
            self._router = None

    # What goes to all.

    async def close(self) -> None:
        """Close all connections."""
        await self._all(lambda client: client.close())

    async def pause(self, mode: PauseMode = "in_place") -> None:
        """`ServerClient.pause` on every server."""
        await self._all(lambda client: client.pause(mode))

    async def resume_generation(self) -> None:
        """`ServerClient.resume_generation` on every server."""
        await self._all(lambda client: client.resume_generation())

    async def abort(self, rid: str | None = None) -> None:
        """`ServerClient.abort` on every server."""
        await self._all(lambda client: client.abort(rid))

    async def flush_cache(self) -> None:
        """`ServerClient.flush_cache` on every server."""
        await self._all(lambda client: client.flush_cache())

    async def release_memory(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """`ServerClient.release_memory` on every server."""
        await self._all(lambda client: client.release_memory(tags))

    async def resume_memory(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """`ServerClient.resume_memory` on every server."""
        await self._all(lambda client: client.resume_memory(tags))

    async def load_from_disk(self, folder: str, version: int) -> None:
        """`ServerClient.load_from_disk` on every server."""
        await self._all(lambda client: client.load_from_disk(folder, version))

    async def _all(self, verb: Callable[[ServerClient], Awaitable[None]]) -> None:
        await asyncio.gather(*(verb(client) for client in self.clients))


def _joined(begun: Generation, rest: Generation) -> Generation:
    """One sample of its beginning and what another server drew after it."""
    drawn = len(begun.token_ids)
    later = [VersionSpan(start=drawn + span.start, version=span.version) for span in rest.versions]
    if begun.versions and later and later[0].version == begun.versions[-1].version:
        later = later[1:]
    return replace(
        rest,
        token_ids=ints(np.concatenate([begun.token_ids, rest.token_ids])),
        logprobs=floats(np.concatenate([begun.logprobs, rest.logprobs])),
        versions=(*begun.versions, *later),
    )
