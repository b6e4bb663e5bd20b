"""The class that Ray makes actors of; its module imports nothing, so that an actor starts fast."""

import os
from typing import Any


class RankActor:
    """One process, one rank. It forwards to `policy.rank.PolicyRank`, so the driver never imports torch."""

    def __init__(self) -> None:
        from megatron_fapo.policy.rank import PolicyRank

        self._rank = PolicyRank()

    def call(self, verb: str, *arguments: Any) -> Any:
        """Run a method of the rank."""
        return getattr(self._rank, verb)(*arguments)

    def pid(self) -> int:
        """This rank's process id."""
        return os.getpid()
