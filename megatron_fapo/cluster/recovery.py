"""A run goes on when it loses a rank: others are started from the last checkpoint, the servers stay as they are."""

import logging
import time
from pathlib import Path
from typing import Protocol

from megatron_fapo.errors import CheckpointDamaged, RankLost
from megatron_fapo.records import Recovered, RunState
from megatron_fapo.run.folder import RunFolder

log = logging.getLogger(__name__)


class Respawning(Protocol):
    """Ranks that can be started again."""

    async def respawn(self) -> None:
        """Start the ranks again, with the weights that training began from."""

    async def load(self, folder: Path) -> None:
        """Read a checkpoint. Raises CheckpointDamaged, after which the ranks are gone."""


class Recovery:
    """Brings the ranks back to the last checkpoint, at the start of a resumed run and after a loss.

    The servers may then hold weights that are newer than the ranks': the loop begins every step by publishing, whole
    and confirmed, so what they generate with is the checkpoint's again.
    """

    def __init__(self, folder: RunFolder, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._from, self._in_a_row = -1, 0
        self._count = self._steps = 0

    async def restore(self, ranks: Respawning) -> RunState:
        """Load the newest whole checkpoint into fresh ranks; step 0 where none was ever written.

        One that the ranks find damaged is named in a warning, and the one before it is taken.
        """
        checkpoints = self._folder.resumable()
        for folder, state in checkpoints[:-1]:
            try:
                await ranks.load(folder)
                return state
            except CheckpointDamaged as damage:
                log.warning("%s; going on from the checkpoint before it", damage)
                await ranks.respawn()
        if not checkpoints:
            return RunState(step=0, cursor=0)
        folder, state = checkpoints[-1]
        await ranks.load(folder)
        return state

    async def after(self, ranks: Respawning, loss: RankLost, step: int) -> tuple[RunState, Recovered]:
        """Start the ranks again after a loss in `step`; the state to go on from.

        Raises the loss when the ranks were lost more than `cluster.recoveries` times since the last checkpoint.
        """
        started = time.perf_counter()
        while True:
            self._count_towards_limit(loss)
            try:
                await ranks.respawn()
                state = await self.restore(ranks)
                break
            except RankLost as again:
                loss = again
        self._steps += step - state.step
        seconds = time.perf_counter() - started
        log.warning("the ranks are back at step %d after %.1f s", state.step, seconds)
        return state, Recovered(count=self._count, steps=self._steps, seconds=seconds)

    def _count_towards_limit(self, loss: RankLost) -> None:
        newest = max((state.step for _, state in self._folder.resumable()), default=0)
        self._in_a_row = self._in_a_row + 1 if newest == self._from else 1
        self._from = newest
        if self._in_a_row > self._limit:
            raise loss
        self._count += 1
        log.warning("%s; starting all ranks again from step %d", loss, newest)
