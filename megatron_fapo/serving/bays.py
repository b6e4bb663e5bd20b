"""How roles lend their devices to each other (`servers.ROLE.lend`): in *bays*, sets of devices with servers of both.

A bay is as many devices as one server of the role with the larger servers has. Light: no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_fapo.records import Role
from megatron_fapo.serving.settings import ServerSettings

T = TypeVar("T")

OTHER: Mapping[Role, Role] = {"policy": "judge", "judge": "policy"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bays:
    """The bays of a run.

    Example: four policy servers of 4 GPUs, two of which lend their devices to judge servers of 1 GPU, are
    `Bays(size={"policy": 1, "judge": 4}, lent={"policy": 2, "judge": 0})`.
    """

    size: Mapping[Role, int]
    """Servers of a role that one bay has room for."""
    lent: Mapping[Role, int]
    """Bays on the devices of a role."""

    def guests(self, role: Role) -> int:
        """Servers of a role on devices of the other."""
        return self.lent.get(OTHER[role], 0) * self.size[role]

    def __bool__(self) -> bool:
        return any(self.lent.values())

    def grouped(self, servers: Mapping[Role, Sequence[T]]) -> Iterator[tuple[Role, dict[Role, Sequence[T]]]]:
        """(whose devices, the servers on them) of each bay, from all servers of each role: its guests come last."""
        for home, count in self.lent.items():
            guest = OTHER[home]
            first = len(servers[guest]) - self.guests(guest)
            own, other = self.size[home], self.size[guest]
            for bay in range(count):
                guests = servers[guest][first + bay * other : first + (bay + 1) * other]
                yield home, {home: servers[home][bay * own : (bay + 1) * own], guest: guests}

    @classmethod
    def of(cls, servers: Mapping[Role, ServerSettings]) -> "Bays":
        """Those of the servers that a run starts."""
        wide = max(server.gpus for server in servers.values())
        size = {role: wide // server.gpus if server.gpus else 1 for role, server in servers.items()}
        return cls(size=size, lent={role: server.lend // size[role] for role, server in servers.items()})


def lending_problem(servers: Mapping[Role, ServerSettings], *, colocated: bool) -> str:
    """What is wrong with `servers.ROLE.lend`; empty where nothing is."""
    lenders = {role: server for role, server in servers.items() if server.lend}
    for role, server in lenders.items():
        key = f"servers.{role}.lend = {server.lend}"
        other = servers.get(OTHER[role])
        if other is None:
            return f"{key} lends devices to servers of the {OTHER[role]}, and the run starts none"
        if not colocated:
            return (
                f"{key} needs cluster.placement = colocated: with split a server that is started again would take the "
                "memory of devices that are lent"
            )
        if server.lend > server.count:
            return f"{key} is more than servers.{role}.count = {server.count}"
        for whose, settings in servers.items():
            if settings.max_count not in (None, settings.count):
                return f"{key} needs a fixed number of servers: leave servers.{whose}.max_count out"
            if settings.sglang.first_gpu is not None:
                return f"{key} says itself which GPUs are shared: leave servers.{whose}.sglang.first_gpu out"
        if bool(server.gpus) != bool(other.gpus):
            return f"{key}: servers of one role are on GPUs and those of the other on CPUs, so they share no device"
        if server.gpus and max(server.gpus, other.gpus) % min(server.gpus, other.gpus):
            return (
                f"{key}: servers of {server.gpus} and {other.gpus} GPUs (sglang.tensor_parallel) cannot share their "
                "devices evenly"
            )
        size = Bays.of(servers).size[role]
        if server.lend % size:
            return f"{key} must be a multiple of {size}: a server of the {OTHER[role]} takes the devices of so many"
    return ""
