"""Who owns the devices' memory when training ranks and servers share them.

    PUBLISH ──► GENERATE ──► TRAIN ──► PUBLISH ...

| phase | ranks hold | policy servers hold | judge servers hold |
|---|---|---|---|
| publish | parameters | weights | – |
| generate | – | weights, KV cache; no cache where devices are lent | weights, KV cache; the same |
| train | parameters, gradients, optimizer | – | – |

Every change of phase is the same: first all that the next phase has no use for is given back, by everyone, and read
back as gone; only then is taken what it needs. A device thus never holds two phases at once, and an allocator that
failed to let go is named before another one runs out of memory.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from megatron_fapo.errors import MemoryHeld, WeightsError
from megatron_fapo.held import differing
from megatron_fapo.records import Role
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.group import ServerGroup
from megatron_fapo.serving.lending import Lender
from megatron_fapo.serving.memory import TAGS, ServerMemory, Tag
from megatron_fapo.trace import KINDS, Kind, Phase, Switch

GIB = 2**30
MAY_BE_EMPTY = {"ranks_optimizer", "policy_kv_cache", "judge_kv_cache"}
"""Moments before the first update and the embedded engine's cache take memory when they are used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What each owner holds in a phase."""

    ranks: tuple[Kind, ...] = ()
    policy: tuple[Tag, ...] = ()
    judge: tuple[Tag, ...] = ()

    def of(self, role: Role) -> tuple[Tag, ...]:
        """What the servers of a role hold."""
        return self.policy if role == "policy" else self.judge


NEEDS: Mapping[Phase, Needs] = {
    "publish": Needs(ranks=("parameters",), policy=("weights",)),
    "generate": Needs(policy=TAGS, judge=TAGS),
    "train": Needs(ranks=KINDS),
}


class Ranks(Protocol):
    """The training ranks, as owners of memory; every answer has a place for each rank."""

    async def offload(self, kinds: Sequence[Kind]) -> None:
        """Free these kinds."""

    async def onload(self, kinds: Sequence[Kind]) -> None:
        """Fill these kinds again."""

    async def resident(self) -> list[dict[Kind, int]]:
        """Bytes of each kind in device memory, read from the storages."""

    async def device_free(self) -> list[int | None]:
        """Free bytes of each rank's device; None on a CPU."""


class Phases:
    """Moves a run from phase to phase.

    Consumes: the memory verbs of ranks and servers. `enter` waits until everyone has given back and taken what the
    phase says; nothing else may run on ranks or servers meanwhile.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._groups: dict[Role, ServerGroup] = {}
        self._memories: dict[ServerClient, ServerMemory] = {}
        self._judge: dict[str, str] = {}
        """Digests of the judge's parameters when it started."""
        self._sizes: list[dict[Kind, int]] = []
        """Of each rank, what it held of each kind before it gave that back."""
        self.phase: Phase | None = None
        """Where the run is; None until the servers have come up beside ranks that hold nothing."""
        self.lender: Lender | None = None
        """Who lets devices change hands while the run is in `generate`."""
        self._switches: list[Switch] = []
        self._turn = asyncio.Lock()
        """Held by a change of phase, and by a server that is started again."""
        self._serving = asyncio.Event()

    async def make_room(self) -> None:
        """Let the ranks hold nothing, so that servers can start on their devices."""
        self._sizes = await self._ranks.resident()
        await self._ranks.offload(KINDS)
        _refuse_held(_by_rank(await self._ranks.resident()), (), "start")

    async def make_way(self) -> None:
        """Let the servers hold nothing, so that ranks can start on their devices."""
        async with self._turn:
            self._serving.clear()
            if self.lender is not None and self.phase == "generate":
                self.lender.end()
            await asyncio.gather(*(memory.give(TAGS) for _, memory in self._each()))
            self.phase = None

    async def attach(
        self, groups: Mapping[Role, ServerGroup], more: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Take charge of servers that have just started, and remember which weights the judge has.

        `more` starts others on their devices, which find them empty and leave them so.
        """
        self._groups = dict(groups)
        for sums in await self._judge_sums():
            self._judge = sums
        if more is not None:
            await self.make_way()
            _refuse_held(await self._resident(), (), "start")
            await more()
            await self.make_way()
        for group in groups.values():
            group.hooks.room = self.room

    @asynccontextmanager
    async def room(self) -> AsyncIterator[None]:
        """While the devices are the servers'; they stay so until the body ends."""
        while True:
            await self._serving.wait()
            async with self._turn:
                if self._serving.is_set():
                    yield
                    return

    async def enter(self, phase: Phase) -> None:
        """Go to a phase; nothing happens where the run is there already.

        Raises MemoryHeld when something that was to go is still held, or when something did not come back, and
        WeightsError when a judge comes back with other weights than it had.
        """
        if phase == self.phase:
            return
        async with self._turn:
            self._serving.clear()
            await self._change(phase)
            if phase == "generate":
                self._serving.set()

    async def hand_over(self, givers: Sequence[ServerClient], takers: Sequence[ServerClient]) -> int:
        """As `serving.lending.Devices`. What engines do not tell, the ranks' devices do: they must have more room."""
        memories = {memory.client: memory for _, memory in self._each()}
        giving, taking = ([memories[client] for client in clients] for clients in (givers, takers))
        before = await _cache(giving)
        room = await self._ranks.device_free() if None in before else []
        await asyncio.gather(*(memory.give(("kv_cache",)) for memory in giving))
        after = await _cache(giving)
        for memory, held in zip(giving, after, strict=True):
            if held:
                raise MemoryHeld(
                    f"{memory.client.url} lends its devices and still holds {held / GIB:.3f} GiB of KV cache",
                    phase="generate",
                )
        freed = sum(size or 0 for size in before)
        if room and None not in room:
            freed = sum(free or 0 for free in await self._ranks.device_free()) - sum(free or 0 for free in room)
            if freed <= 0:
                told = ", ".join(memory.client.url for memory in giving)
                raise MemoryHeld(f"{told}: lends its devices, and they have no more room than before", phase="generate")
        await asyncio.gather(*(memory.take(("kv_cache",)) for memory in taking))
        return freed

    async def _change(self, phase: Phase) -> None:
        started, needs = time.perf_counter(), NEEDS[phase]
        if self.lender is not None and self.phase == "generate":
            self.lender.end()
        if self.lender is not None and phase == "generate":
            await self.lender.begin()
        before = await self._resident()
        await asyncio.gather(
            self._ranks.offload([kind for kind in KINDS if kind not in needs.ranks]),
            *(m.give([tag for tag in TAGS if tag not in self._due(needs, role, m)]) for role, m in self._each()),
        )
        between = await self._resident()
        wanted = {f"ranks_{kind}" for kind in needs.ranks} | {
            f"{role}_{tag}" for role in self._groups for tag in needs.of(role)
        }
        _refuse_held(between, wanted, phase)
        await self._refuse_full(needs, phase)
        taking = (m.take(self._due(needs, role, m)) for role, m in self._each())
        await asyncio.gather(self._ranks.onload(needs.ranks), *taking)
        after = await self._resident()
        _refuse_absent(after, wanted - MAY_BE_EMPTY, phase)
        if needs.judge:
            self._refuse_other_judge(await self._judge_sums())
        self._switches.append(
            Switch(
                phase=phase,
                seconds=time.perf_counter() - started,
                freed=sum(max(0, size - between[owner]) for owner, size in before.items()),
                taken=sum(max(0, size - between[owner]) for owner, size in after.items()),
                resident=after,
            )
        )
        self.phase = phase

    def _due(self, needs: Needs, role: Role, memory: ServerMemory) -> tuple[Tag, ...]:
        """What a server holds: where its devices are lent, no KV cache."""
        due = needs.of(role)
        return tuple(tag for tag in due if tag == "weights") if self._groups[role].rests(memory.client) else due

    def switches(self) -> list[Switch]:
        """What the changes of phase since the last call did."""
        done, self._switches = self._switches, []
        return done

    def _each(self) -> list[tuple[Role, ServerMemory]]:
        """All servers that live now; one that was started again has all of its memory."""
        clients = [(role, client) for role, group in self._groups.items() for client in group.clients]
        self._memories = {client: self._memories.get(client) or ServerMemory(client) for _, client in clients}
        return [(role, self._memories[client]) for role, client in clients]

    async def _resident(self) -> dict[str, int]:
        """Bytes by owner, each counted by the owner itself; of SGLang's servers nothing is known."""
        ranks = await self._ranks.resident()
        for kept, now in zip(self._sizes, ranks, strict=True):
            kept |= {kind: size for kind, size in now.items() if size}
        found = _by_rank(ranks)
        for role, memory in self._each():
            for tag, size in (await memory.held() or {}).items():
                owner = f"{role}_{tag}"
                found[owner] = found.get(owner, 0) + size
        return found

    async def _refuse_full(self, needs: Needs, phase: Phase) -> None:
        """What engines do not tell, the device does: it must have room for what its rank is about to take."""
        free, there = await self._ranks.device_free(), await self._ranks.resident()
        for rank, (room, sizes, now) in enumerate(zip(free, self._sizes, there, strict=True)):
            due = sum(sizes[kind] - now[kind] for kind in needs.ranks if sizes[kind] > now[kind])
            if room is not None and room < due:
                raise MemoryHeld(
                    f"the device of rank {rank} has {room / GIB:.2f} GiB free and the rank needs {due / GIB:.2f} GiB: "
                    "a server did not give its memory back; look at its log, and for other programs on the device",
                    phase=phase,
                )

    async def _judge_sums(self) -> list[dict[str, str]]:
        clients = self._groups["judge"].clients if "judge" in self._groups else ()
        return list(await asyncio.gather(*(client.held() for client in clients)))

    def _refuse_other_judge(self, sums: Sequence[dict[str, str]]) -> None:
        for place, found in enumerate(sums):
            if wrong := differing(self._judge, found):
                raise WeightsError(
                    f"judge server {place} came back from its sleep with other weights: {len(wrong)} of "
                    f"{len(self._judge)} parameters differ, the first is {wrong[0]}; is its backup on "
                    "(servers.judge.weights_cpu_backup)?"
                )


async def _cache(memories: Sequence[ServerMemory]) -> list[int | None]:
    """Bytes of KV cache of each server; None where it does not say."""
    found = await asyncio.gather(*(memory.held() for memory in memories))
    return [None if held is None else held["kv_cache"] for held in found]


def _by_rank(ranks: Sequence[Mapping[Kind, int]]) -> dict[str, int]:
    return {f"ranks_{kind}": sum(sizes[kind] for sizes in ranks) for kind in KINDS}


def _refuse_held(resident: Mapping[str, int], wanted: Collection[str], phase: str) -> None:
    held = {owner: size for owner, size in resident.items() if size and owner not in wanted}
    if held:
        told = ", ".join(f"{owner} {size / GIB:.3f} GiB" for owner, size in held.items())
        raise MemoryHeld(f"memory that was given back is still held: {told}", phase=phase)


def _refuse_absent(resident: Mapping[str, int], wanted: Collection[str], phase: str) -> None:
    absent = sorted(owner for owner in wanted if resident.get(owner) == 0)
    if absent:
        raise MemoryHeld(f"memory that was taken again is not there: {', '.join(absent)}", phase=phase)
