"""The class that Ray makes actors of; its module imports little, so that an actor starts fast."""

import logging
from typing import Any

log = logging.getLogger(__name__)


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
        """Run a method of the rank; an error goes to this rank's log as well."""
        try:
            return getattr(self._rank, verb)(*arguments)
        except Exception:
            log.exception("%s failed", verb)
            raise
