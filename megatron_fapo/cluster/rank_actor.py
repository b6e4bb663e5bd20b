"""The class that Ray makes actors of; its module imports little, so that an actor starts fast."""

import logging
import re
from typing import Any

from megatron_fapo.errors import RankLost

log = logging.getLogger(__name__)

ALIVE = "alive"
"""Ray's concurrency group, a thread of its own, of the question whether the process is alive."""

PEER = re.compile(r"gloo/transport|ncclRemoteError|ncclSystemError|NCCL.*(timed? ?out|watchdog)|Watchdog caught")
"""What a collective says when another rank has left it or does not come."""


class RankActor:
    """One process, one rank. It forwards to `policy.rank.PolicyRank`, so the driver never imports torch."""

    def __init__(self, role: str, rank: int) -> None:
        from megatron_fapo.policy.rank import PolicyRank

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._name = f"{role}-rank-{rank}"
        self._rank = PolicyRank()

    def __repr__(self) -> str:
        """Ray marks this process's output with it."""
        return self._name

    def call(self, verb: str, *arguments: Any) -> Any:
        """Run a method of the rank; an error goes to this rank's log as well.

        Raises RankLost when a collective failed because of another rank.
        """
        try:
            return getattr(self._rank, verb)(*arguments)
        except Exception as error:
            log.exception("%s failed", verb)
            if PEER.search(str(error)):
                raise RankLost(f"a collective failed: {' '.join(str(error).split())}") from error
            raise

    def alive(self) -> None:
        """Answer, whatever `call` is doing: it is asked in the group `ALIVE`."""
