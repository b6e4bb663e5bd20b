"""The run folder: where everything of a run lies, and how a checkpoint becomes complete.

    RUN/config.yaml            the resolved configuration
    RUN/run.json               arm, seed, versions, start
    RUN/metrics.jsonl          one line a step
    RUN/rollouts/              one parquet file a step
    RUN/checkpoints/step-N/    the model's files, their manifest.json, and state.json, written last
    RUN/checkpoints/latest     a link to the newest of them
    RUN/logs/                  servers and ranks
    RUN/servers.json           {role: servers wanted from the next step on}, until the run has read it
    RUN/model/                 the final policy for Hugging Face

A checkpoint is written under a hidden name and renamed when all of it is on disk, so what looks finished is.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from megatron_fapo import manifest
from megatron_fapo.errors import CheckpointDamaged, ResumeError
from megatron_fapo.records import Role, RunState
from megatron_fapo.run.settings import CheckpointSettings

log = logging.getLogger(__name__)

STATE = "state.json"
LATEST = "latest"


class RunFolder:
    """Paths of a run, and its checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.logs = self.path / "logs"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.config = self.path / "config.yaml"
        self.wanted = self.path / "servers.json"

    def create(self) -> None:
        """Make the folders."""
        for folder in (self.logs, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)

    def started(self) -> bool:
        """Whether a run was started here before."""
        return self.config.exists()

    def ask_for_servers(self, counts: Mapping[Role, int]) -> None:
        """Tell the run that goes on here how many servers each of these roles shall have."""
        manifest.write_durably(self.wanted, json.dumps(counts))

    def servers_asked_for(self) -> dict[Role, int]:
        """What was asked since the last call."""
        try:
            asked = self.wanted.read_text()
        except FileNotFoundError:
            return {}
        self.wanted.unlink()
        return dict(json.loads(asked))

    def open_checkpoint(self, step: int) -> Path:
        """An empty folder for the model to write into; what interrupted saves left behind goes."""
        for left in self.checkpoints.glob(".step-*"):
            shutil.rmtree(left)
        folder = self.checkpoints / f".step-{step:06d}"
        folder.mkdir(parents=True)
        return folder

    def close_checkpoint(self, state: RunState, settings: CheckpointSettings) -> Path:
        """Write the run's state beside the model, name the checkpoint, move `latest` to it, remove old ones."""
        hidden = self.checkpoints / f".step-{state.step:06d}"
        manifest.write_durably(hidden / STATE, json.dumps(asdict(state)))
        final = self.checkpoints / f"step-{state.step:06d}"
        shutil.rmtree(final, ignore_errors=True)
        hidden.rename(final)
        link = self.checkpoints / f".{LATEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(self.checkpoints / LATEST)
        manifest.sync_folder(self.checkpoints)
        for old in self._finished()[: -settings.keep]:
            if not settings.stays(_step(old)):
                shutil.rmtree(old)
        return final

    def resumable(self) -> list[tuple[Path, RunState]]:
        """The complete checkpoints and their states, newest first; empty where none was ever written.

        One with a file that is missing or of another size is named in a warning and left out. Raises ResumeError
        when that leaves none.
        """
        found, damages = [], []
        for folder in reversed(self._finished()):
            try:
                found.append((folder, _read(folder)))
            except CheckpointDamaged as damage:
                log.warning("%s; passing over this checkpoint", damage)
                damages.append(str(damage))
        if damages and not found:
            raise ResumeError(f"no checkpoint can be used: {'; '.join(damages)}")
        return found

    def _finished(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*"), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _read(folder: Path) -> RunState:
    """The state of a checkpoint whose files are all there, in full size. Raises CheckpointDamaged."""
    manifest.read(folder)
    try:
        return RunState(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointDamaged(f"{folder / STATE}: cannot be read: {error}") from None
