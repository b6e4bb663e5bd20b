"""Devices that work for one role and then for another, while rollouts and verdicts are drawn.

A *bay* is a set of devices with servers of both roles. All of them hold their weights; those of one role are at work
and hold KV cache too. When that role has less to do than the other, they stop, what they were asked goes on at other
servers of their role, their cache's memory is given back, and the other role's servers take theirs.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from megatron_fapo.errors import FapoError, RankLost, ServerError, ServerUnreachable
from megatron_fapo.records import Role
from megatron_fapo.serving.bays import OTHER
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.group import ServerGroup
from megatron_fapo.trace import Clock, Stint, SystemClock

log = logging.getLogger(__name__)

_LOOK = 0.1
"""Seconds between two looks at what there is to do."""
_STAYS = 10.0
"""A bay stays where it is for so many times what its last change took."""
_CROWDED = 8
"""With fewer samples a server than this a role has no use for more servers: each token would take about as long."""
_SPARE = 4
"""A role that has no more samples than this for each server that would be left can do without the rest."""
_TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a role has to do."""

    outstanding: int
    """Samples that somebody waits for."""
    servers: int
    """At work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """A bay, as far as the choice needs it."""

    home: Role
    at_work: Role
    servers: Mapping[Role, int]
    """Of each role."""
    alive: Mapping[Role, bool]
    """Whether it has servers of each role that live."""
    settled: bool
    """Whether it has been where it is for long enough."""


def choose(bays: Sequence[Chance], loads: Mapping[Role, Load]) -> int | None:
    """Which bay should change hands now, if any.

    A role with work and no server gets a bay at once; where that would leave the other, which has work too, without
    one, they take turns. Else a bay that has stayed for long enough goes to a role that is crowded: from one that can
    do without it, or, where it is lent, back to its own. Of several bays, one that goes home is first.
    """
    found: list[tuple[bool, bool, int]] = []
    for number, bay in enumerate(bays):
        has, wants = loads[bay.at_work], loads[OTHER[bay.at_work]]
        if not bay.alive[OTHER[bay.at_work]] or not wants.outstanding:
            continue
        dead, left = not bay.alive[bay.at_work], has.servers - bay.servers[bay.at_work]
        at_home = bay.at_work == bay.home
        urgent = dead or not wants.servers
        if urgent:
            goes = dead or left > 0 or not has.outstanding or bay.settled
        else:
            crowded = bay.settled and wants.outstanding > _CROWDED * wants.servers
            goes = crowded and (has.outstanding <= _SPARE * left or (left > 0 and not at_home))
        if goes:
            found.append((not urgent, at_home, number))
    return min(found)[2] if found else None


def moves(bays: Sequence[Chance], loads: Mapping[Role, Load]) -> list[int]:
    """Which bays should change hands now: each as `choose` says, once those before it have."""
    found: list[int] = []
    bays, servers = list(bays), {role: load.servers for role, load in loads.items()}
    while True:
        now = {role: replace(load, servers=servers[role]) for role, load in loads.items()}
        number = choose(bays, now)
        if number is None:
            return found
        found.append(number)
        bay, role = bays[number], OTHER[bays[number].at_work]
        servers[role] += bay.servers[role]
        servers[bay.at_work] -= bay.servers[bay.at_work] * bay.alive[bay.at_work]
        bays[number] = replace(bay, at_work=role, alive={role: True, bay.at_work: False})  # it goes once


class Devices(Protocol):
    """Who owns the memory of the devices."""

    def room(self) -> AbstractAsyncContextManager[None]:
        """While rollouts and verdicts are drawn; that goes on until the body ends."""

    async def hand_over(self, givers: Sequence[ServerClient], takers: Sequence[ServerClient]) -> int:
        """The KV cache's memory from servers that are at rest to others; how many bytes were given back.

        Raises MemoryHeld when some is still held, ServerUnreachable when a server has died.
        """


@dataclass(slots=True, kw_only=True, eq=False)
class Bay:
    """Devices with servers of both roles."""

    home: Role
    """Whose devices they are when nobody lends any."""
    servers: Mapping[Role, Sequence[ServerClient]]
    at_work: Role = "policy"
    since: float = 0.0
    """When those at work began, seconds of the lender's clock."""
    stays: float = 0.0
    """Seconds that they stay at least."""


@dataclass(slots=True, kw_only=True)
class Lender:
    """Looks at what both roles have to do, and lets bays change hands."""

    bays: Sequence[Bay]
    groups: Mapping[Role, ServerGroup]
    size: Mapping[Role, int]
    """Servers of each role in a bay."""
    devices: Devices
    told: Callable[[Stint], None] = lambda stint: None
    """Servers of a role have worked in a bay, until just now."""
    clock: Clock = field(default_factory=SystemClock)

    async def run(self) -> None:
        """Until cancelled. What goes wrong is raised by every request from then on."""
        while True:
            try:
                async with self.devices.room():
                    await self._look()
            except RankLost as loss:  # the run says so itself, and begins to generate anew
                log.warning("devices were not handed over: %s", loss)
            except FapoError as error:
                for group in self.groups.values():
                    group.fail(error)
                return
            await self.clock.sleep(_LOOK)

    async def _look(self) -> None:
        due = moves([self._chance(bay) for bay in self.bays], self._loads())
        await asyncio.gather(*(self._change(self.bays[number]) for number in due))
        for role in {self.bays[number].at_work for number in due}:
            await self.groups[role].level()

    async def begin(self) -> None:
        """Generation begins: nothing is to be judged yet, so all bays are the policy's."""
        for bay in self.bays:
            bay.at_work = "policy" if self._alive(bay, "policy") else "judge"
            bay.since, bay.stays = self.clock.now(), 0.0
            await self.groups[OTHER[bay.at_work]].rest(bay.servers[OTHER[bay.at_work]])
            await self.groups[bay.at_work].work(bay.servers[bay.at_work])

    def end(self) -> None:
        """Generation is over."""
        for bay in self.bays:
            self._tell(bay)

    def _alive(self, bay: Bay, role: Role) -> list[ServerClient]:
        return [client for client in bay.servers[role] if client in self.groups[role].clients]

    def _chance(self, bay: Bay) -> Chance:
        return Chance(
            home=bay.home,
            at_work=bay.at_work,
            servers=self.size,
            alive={role: bool(self._alive(bay, role)) for role in bay.servers},
            settled=self.clock.now() - bay.since >= bay.stays,
        )

    def _loads(self) -> dict[Role, Load]:
        return {role: Load(outstanding=group.outstanding, servers=group.at_work) for role, group in self.groups.items()}

    async def _change(self, bay: Bay) -> None:
        """From the role at work to the other one."""
        begun, before, role = self.clock.now(), bay.at_work, OTHER[bay.at_work]
        await self.groups[before].rest(bay.servers[before])
        nbytes = await self._hand_over(bay, role)
        now = self.clock.now()
        self._tell(bay, handed_over=True, nbytes=nbytes)
        bay.at_work, bay.since, bay.stays = role, now, _STAYS * (now - begun)
        await self.groups[role].work(bay.servers[role])
        log.info("%s servers work on devices of the %s", role, bay.home)

    async def _hand_over(self, bay: Bay, role: Role) -> int:
        for _ in range(_TRIES):
            givers, takers = self._alive(bay, OTHER[role]), self._alive(bay, role)
            try:
                return await self.devices.hand_over(givers, takers)
            except ServerUnreachable:
                for whose, clients in ((OTHER[role], givers), (role, takers)):
                    for client in clients:
                        if client.failing:
                            await self.groups[whose].hooks.suspect(client)
        raise ServerError(f"devices did not go from one server to another in {_TRIES} attempts")

    def _tell(self, bay: Bay, *, handed_over: bool = False, nbytes: int = 0) -> None:
        stint = Stint(
            role=bay.at_work,
            lent=bay.at_work != bay.home,
            seconds=self.clock.now() - bay.since,
            handed_over=handed_over,
            nbytes=nbytes,
        )
        self.told(stint)
