"""The run folder: where everything of a run lies, and how a checkpoint becomes complete.

    RUN/config.yaml            the resolved configuration
    RUN/run.json               arm, seed, versions, start
    RUN/metrics.jsonl          one line a step
    RUN/rollouts/              one parquet file a step
    RUN/checkpoints/step-N/    the model's files, their manifest.json, and state.json, written last
    RUN/checkpoints/latest     a link to the newest of them
    RUN/logs/                  servers and ranks
    RUN/servers.json           {role: servers that `fapo servers` asked for}, which a resumed run begins with as well
    RUN/model/                 the final policy for Hugging Face

A checkpoint is written under a hidden name and renamed when all of it is on disk, so what looks finished is.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_fapo import manifest
from megatron_fapo.errors import CheckpointDamaged, ResumeError
from megatron_fapo.records import Role, RunState
from megatron_fapo.run.settings import CheckpointSettings

log = logging.getLogger(__name__)

STATE = "state.json"
LATEST = "latest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How many servers of a role were asked for."""

    count: int
    configured: int
    """What `servers.ROLE.count` was then: once it is another number, that one counts."""


class RunFolder:
    """Paths of a run, and its checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.logs = self.path / "logs"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.config = self.path / "config.yaml"
        self._wanted = self.path / "servers.json"
        self._asked_at = 0

    def create(self) -> None:
        """Make the folders."""
        for folder in (self.logs, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)

    def started(self) -> bool:
        """Whether a run was started here before."""
        return self.config.exists()

    def ask_for_servers(self, wanted: Mapping[Role, Wanted]) -> None:
        """Tell the run that goes on here how many servers it shall have; roles that are left out stay as asked."""
        self._write_wanted({**self.servers_wanted(), **wanted})

    def servers_asked_for(self) -> dict[Role, int]:
        """What is wanted, where somebody has asked since the last call."""
        at = self._wanted.stat().st_mtime_ns if self._wanted.exists() else 0
        if at == self._asked_at:
            return {}
        self._asked_at = at
        return {role: wanted.count for role, wanted in self.servers_wanted().items()}

    def servers_wanted(self) -> dict[Role, Wanted]:
        """What was asked last for each role, whenever that was."""
        if not self._wanted.exists():
            return {}
        return {role: Wanted(**values) for role, values in json.loads(self._wanted.read_text()).items()}

    def begin_with_servers(self, configured: Mapping[Role, int]) -> dict[Role, int]:
        """Of the servers that a run starts, {role: number}: what was asked last, unless its configuration says another
        number than it said then. What was overruled is forgotten."""
        holds = {role: one for role, one in self.servers_wanted().items() if configured.get(role) == one.configured}
        if self._wanted.exists():
            self._write_wanted(holds)
        self.servers_asked_for()
        return {**configured, **{role: wanted.count for role, wanted in holds.items()}}

    def _write_wanted(self, wanted: Mapping[Role, Wanted]) -> None:
        manifest.write_durably(self._wanted, json.dumps({role: asdict(one) for role, one in wanted.items()}))

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
