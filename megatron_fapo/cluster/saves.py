"""Checkpoints of a run: written in the background, one at a time, named when all of it is on disk."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from megatron_fapo.records import RunState
from megatron_fapo.run.folder import RunFolder
from megatron_fapo.run.settings import CheckpointSettings

log = logging.getLogger(__name__)

FIRST_LOOK, LONGEST_LOOK = 0.05, 2.0
"""Seconds between two looks at whether the ranks have written: a fifth of the time so far, within these."""


class Savable(Protocol):
    """What is saved: ranks that write while other verbs run."""

    async def begin_save(self, folder: Path) -> None:
        """Copy the state and begin to write it."""

    async def save_written(self) -> bool:
        """Whether all of it is on disk."""

    async def end_save(self) -> None:
        """Complete the checkpoint."""


class Saves:
    """The checkpoints of a run.

    Consumes: states of the run. `start` waits for the save that still runs, and for the ranks to copy what they
    hold; a task then waits for the files and moves the run's pointer. A save that fails ends the ranks, so the next
    verb of theirs raises its error; so does the next `start`, and the end of the run.
    """

    def __init__(self, model: Savable, folder: RunFolder, settings: CheckpointSettings) -> None:
        self._model, self._folder, self._settings = model, folder, settings
        self._running: asyncio.Task[None] | None = None

    async def start(self, state: RunState) -> None:
        """Begin a checkpoint of `state`; when saving is not asynchronous, complete it."""
        await self.finish()
        started = time.perf_counter()
        await self._model.begin_save(self._folder.open_checkpoint(state.step))
        self._running = asyncio.create_task(self._complete(state, started), name=f"checkpoint-{state.step}")
        if not self._settings.asynchronous:
            await self.finish()
        log.info("checkpoint of step %d: the loop waited %.2f s", state.step, time.perf_counter() - started)

    async def finish(self) -> None:
        """Wait for the save that runs, if any; raises what it raised."""
        running, self._running = self._running, None
        if running is not None:
            await running

    async def settle(self) -> None:
        """Wait for the save that runs, if any, after its ranks were lost: it fails at once, or needs them no more."""
        try:
            await self.finish()
        except Exception:
            log.warning("the running checkpoint was not completed", exc_info=True)

    async def _complete(self, state: RunState, started: float) -> None:
        while not await self._model.save_written():
            waited = time.perf_counter() - started
            await asyncio.sleep(min(max(0.2 * waited, FIRST_LOOK), LONGEST_LOOK))
        await self._model.end_save()
        folder = await asyncio.to_thread(self._folder.close_checkpoint, state, self._settings)
        log.info("%s: on disk after %.2f s", folder, time.perf_counter() - started)


@asynccontextmanager
async def open_saves(model: Savable, folder: RunFolder, settings: CheckpointSettings) -> AsyncIterator[Saves]:
    """The saves of a run; at its end, whatever happened, the one that runs is waited for.

    After a failure of the run a failure of the save as well is only logged: it is the consequence, or the lesser one.
    """
    saves = Saves(model, folder, settings)
    try:
        yield saves
    except BaseException:
        await saves.settle()
        raise
    await saves.finish()
