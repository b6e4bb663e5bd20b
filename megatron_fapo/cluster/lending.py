"""Devices that policy and judge lend each other while the run generates: their second servers, and their lender."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from megatron_fapo.cluster.phases import Phases
from megatron_fapo.config import Config
from megatron_fapo.records import Role
from megatron_fapo.serving.bays import Bays
from megatron_fapo.serving.group import ServerGroup
from megatron_fapo.serving.lending import Bay, Lender
from megatron_fapo.trace import Stint


@asynccontextmanager
async def open_lending(
    config: Config, groups: Mapping[Role, ServerGroup], phases: Phases, told: Callable[[Stint], None]
) -> AsyncIterator[None]:
    """Put the phases in charge of the servers, and where the configuration lends devices start the others there.

    Until the end bays change hands while the run generates. Raises the ServerError of a server that does not start.
    """
    bays = Bays.of(dict(config.started_servers()))
    if not bays:
        await phases.attach(groups)
        yield
        return

    async def start_guests() -> None:
        for role, group in groups.items():
            group.resize(config.server(role).places)
        for role, group in groups.items():
            await group.settled()
            if len(group.clients) < config.server(role).places:
                group.hooks.diagnose()

    await phases.attach(groups, more=start_guests)
    for group in groups.values():
        # Drawn on from where it was, a sample's log-probs come of another arithmetic in their last digits.
        group.moves = "anew" if config.train.deterministic else "on"
    servers = {role: [client for _, client in sorted(group.hooks.seated().items())] for role, group in groups.items()}
    shared = [Bay(home=home, servers=both) for home, both in bays.grouped(servers)]
    phases.lender = Lender(bays=shared, groups=groups, size=bays.size, devices=phases, told=told)
    lending = asyncio.ensure_future(phases.lender.run())
    try:
        yield
    finally:
        lending.cancel()
        await asyncio.gather(lending, return_exceptions=True)
