"""The policy's weights on its servers: brought to all of them between two steps, and to one that came again within."""

import asyncio
import logging

from megatron_fapo.algorithm.settings import LossSettings
from megatron_fapo.cluster.model import MegatronModel
from megatron_fapo.errors import RankLost, ServerUnreachable
from megatron_fapo.publish.interface import WeightTransport
from megatron_fapo.publish.publisher import publish
from megatron_fapo.records import StepBatch, StepReport, WeightVersion
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.group import ServerGroup

log = logging.getLogger(__name__)


class PolicyWeights:
    """Who holds which version. Only the ranks hold the weights that are published, so a server that was started again
    gets them from there, at any time but during an update; then the publication after it includes that server.
    """

    def __init__(
        self, model: MegatronModel, servers: ServerGroup, transport: WeightTransport, *, at_any_time: bool = True
    ) -> None:
        self._model, self._servers, self._transport = model, servers, transport
        self._published: WeightVersion | None = None
        self._busy = asyncio.Lock()
        servers.hooks.catch_up = self.catch_up if at_any_time else self._later

    @staticmethod
    async def _later(server: ServerClient) -> bool:
        """Where ranks and servers share devices, the ranks hold no weights while the servers generate."""
        return False

    async def publish(self, version: int) -> WeightVersion:
        """The ranks' present weights to every server that lives, confirmed by checksum; at least one is waited for.

        A server that dies meanwhile is left to be started again, and the others get everything once more.
        """
        async with self._busy:
            while True:
                servers = await self._servers.some()
                try:
                    self._published = await publish(self._model, servers, self._transport, version)
                except ServerUnreachable as error:
                    lost = [await self._servers.hooks.suspect(server) for server in servers if server.failing]
                    if not any(lost):
                        raise
                    log.warning("publishing version %d again, without the server that died: %s", version, error)
                else:
                    await self._servers.admit(servers)
                    return self._published

    async def catch_up(self, server: ServerClient) -> bool:
        """As `Hooks.catch_up`: the same weights as the others have, confirmed by what the server holds.

        False where the ranks have moved on: what they hold now is not what the others generate with.
        """
        async with self._busy:
            published = self._published
            if published is None or self._servers.may_ask(server):  # in the second case a publication was faster
                return published is not None
            try:
                held = await publish(self._model, [server], self._transport, published.step)
            except RankLost as loss:  # the run says so itself, and publishes what the ranks hold when they are back
                log.warning("%s has no weights yet: %s", server.url, loss)
                return False
            log.warning("%s holds version %d again, checksum %s", server.url, held.step, held.checksum)
            return held.checksum == published.checksum

    def forget(self) -> None:
        """The ranks are started again: what they hold is nobody's until it is published."""
        self._published = None

    async def update(self, batch: StepBatch, loss: LossSettings) -> StepReport:
        """The step's updates on the ranks, whose weights are from here on nobody's until they are published."""
        async with self._busy:
            self._published = None
            return await self._model.update(batch, loss)
