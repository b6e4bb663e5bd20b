"""Which rank runs on which node.

Rank 0 is always on the driver's node: weights leave it through that node's shared memory, where the servers read them.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from megatron_fapo.errors import PolicyError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Nodes that Ray holds for the ranks of a model."""

    group: Any
    """Ray's placement group: one bundle a node."""
    address: str
    """Where the ranks meet: the driver's node, as the others reach it."""
    per_node: int
    gpus: int
    """0 or 1, for each rank."""

    def options(self, rank: int) -> dict[str, Any]:
        """The actor options of a rank. Neighbours share a node, so tensor parallelism stays inside of it."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self.group, placement_group_bundle_index=rank // self.per_node
        )
        return {"scheduling_strategy": strategy, "num_cpus": 1, "num_gpus": self.gpus}

    def nodes(self) -> list[str]:
        """Ray's ids of the nodes, the first rank's first."""
        from ray.util import placement_group_table

        of_bundle = placement_group_table(self.group)["bundles_to_node_id"]
        return [of_bundle[bundle] for bundle in sorted(of_bundle)]

    def release(self) -> None:
        """Give the nodes back."""
        from ray.util import remove_placement_group

        remove_placement_group(self.group)


async def reserve(ranks: int, nodes: int, deadline: float) -> Placement:
    """Hold `nodes` nodes for `ranks` ranks, equally many on each; waits for nodes that have not joined yet.

    Ranks get a GPU each where the driver's node has enough of them. Raises PolicyError after `deadline` seconds.
    """
    import ray
    from ray.util import placement_group

    own = ray.get_runtime_context().get_node_id()
    here = next(node for node in ray.nodes() if node["NodeID"] == own)
    per_node = ranks // nodes
    found = here["Resources"].get("GPU", 0)
    if 0 < found < per_node:
        log.warning("this node has %g GPUs for %d ranks: the ranks train on the CPU", found, per_node)
    gpus = int(found >= per_node)
    address = here["NodeManagerAddress"]
    bundle = {"CPU": float(per_node), "GPU": float(per_node * gpus)}
    first = {**bundle, f"node:{address}": 0.001}  # only this node has it
    group = placement_group([first] + [bundle] * (nodes - 1), strategy="STRICT_SPREAD" if nodes > 1 else "PACK")
    placement = Placement(group=group, address=address if nodes > 1 else "127.0.0.1", per_node=per_node, gpus=gpus)
    try:
        await asyncio.wait_for(asyncio.wrap_future(group.ready().future()), deadline)
    except TimeoutError:
        joined = ", ".join(
            f"{node['NodeManagerHostname']} ({node['Resources'].get('CPU', 0):g} CPUs, "
            f"{node['Resources'].get('GPU', 0):g} GPUs)"
            for node in ray.nodes()
            if node["Alive"]
        )
        placement.release()
        raise PolicyError(
            f"{nodes} nodes with {per_node} CPUs and {per_node * gpus} GPUs each (cluster.nodes, policy.parallel) were "
            f"not there within {deadline:g} s (cluster.setup_deadline); Ray has {joined}"
        ) from None
    except BaseException:
        placement.release()
        raise
    return placement
