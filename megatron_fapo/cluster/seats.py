"""Which server sits where: on which node, and on which of that node's GPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fapo.config import Config
from megatron_fapo.errors import ConfigError
from megatron_fapo.records import Role
from megatron_fapo.serving.bays import OTHER, Bays


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """The place of one server."""

    node: int
    """Among the nodes that serve; 0 is the first."""
    gpu: int | None = None
    """The first of its GPUs on that node; None on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """The servers of a role: how many, with how many GPUs each (0 on a CPU)."""

    count: int
    gpus: int


def wishes_of(config: Config) -> tuple[dict[Role, Wish], Bays]:
    """What the servers of a run need, and which devices they lend to each other."""
    servers = dict(config.started_servers())
    wishes = {role: Wish(count=server.places, gpus=server.gpus) for role, server in servers.items()}
    return wishes, Bays.of(servers)


def seats(
    wishes: Mapping[Role, Wish], *, nodes: int, gpus: Sequence[int], bays: Bays | None = None
) -> dict[Role, list[Seat]]:
    """Seats of all servers, role after role: the judge's slice of the GPUs is what follows the policy's.

    `gpus` are the GPUs of each of the `nodes` nodes that servers may sit on. No server reaches over two nodes, and no
    two share a GPU, but those of `bays`: they come last, on the devices of the other role's first servers. Servers on
    CPUs take the nodes in turn. Raises ConfigError where they do not fit.
    """
    free = [(node, gpu) for node in range(nodes) for gpu in range(gpus[node])]
    found: dict[Role, list[Seat]] = {}
    for role, wish in wishes.items():
        found[role] = []
        for place in range(wish.count):
            if not wish.gpus:
                found[role].append(Seat(node=place % nodes))
                continue
            while len(free) >= wish.gpus and free[wish.gpus - 1][0] != free[0][0]:
                free = [(node, gpu) for node, gpu in free if node != free[0][0]]  # the node's rest is too small
            if len(free) < wish.gpus:
                raise ConfigError(
                    f"servers.{role}: {place} of {wish.count} servers with {wish.gpus} GPUs each fit on {nodes} "
                    f"node(s) with {', '.join(map(str, gpus))} GPUs for servers; lower servers.{role}.count or "
                    f"servers.{role}.sglang.tensor_parallel, or give the run more nodes"
                )
            node, gpu = free[0]
            found[role].append(Seat(node=node, gpu=gpu))
            free = free[wish.gpus :]
    if bays:
        guests = {role: _guests(role, wishes[role].gpus, found[OTHER[role]], bays) for role in wishes}
        found = {role: own + guests[role] for role, own in found.items()}
    return found


def _guests(role: Role, gpus: int, hosts: Sequence[Seat], bays: Bays) -> list[Seat]:
    """Seats of a role's servers on the devices of the other's, which are on `hosts`."""
    home, found = OTHER[role], []
    for bay in range(bays.lent[home]):
        lent = hosts[bay * bays.size[home] : (bay + 1) * bays.size[home]]
        first = lent[0]
        if first.gpu is None:
            found.append(first)
            continue
        side_by_side = [Seat(node=first.node, gpu=first.gpu + place) for place in range(len(lent))]
        if len(lent) > 1 and lent != side_by_side:
            raise ConfigError(
                f"servers.{home}.lend: a server of the {role} takes the devices of {len(lent)} of them, which are not "
                f"side by side on one node; choose servers.{home}.count and servers.{role}.count so that they are"
            )
        found += [Seat(node=first.node, gpu=first.gpu + gpus * place) for place in range(bays.size[role])]
    return found
