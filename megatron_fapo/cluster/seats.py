"""Which server sits where: on which node, and on which of that node's GPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fapo.errors import ConfigError
from megatron_fapo.records import Role


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


def seats(wishes: Mapping[Role, Wish], *, nodes: int, gpus: Sequence[int]) -> dict[Role, list[Seat]]:
    """Seats of all servers, role after role: the judge's slice of the GPUs is what follows the policy's.

    `gpus` are the GPUs of each of the `nodes` nodes that servers may sit on. No server reaches over two nodes, and no
    two share a GPU. Servers on CPUs take the nodes in turn. Raises ConfigError where they do not fit.
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
    return found
