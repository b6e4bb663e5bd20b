"""The run folder: where everything of a run lies, and how a checkpoint becomes complete.

    RUN/config.yaml            the resolved configuration
    RUN/run.json               arm, seed, versions, start
    RUN/metrics.jsonl          one line a step
    RUN/rollouts/              one parquet file a step
    RUN/checkpoints/step-N/    state.json (written last) and the model's own files
    RUN/logs/                  servers and ranks
    RUN/model/                 the final policy for Hugging Face

A checkpoint is written under a hidden name and renamed when all of it is on disk, so what looks finished is.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from megatron_fapo.errors import ResumeError
from megatron_fapo.records import RunState

STATE = "state.json"


class RunFolder:
    """Paths of a run, and its checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.logs = self.path / "logs"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.config = self.path / "config.yaml"

    def create(self) -> None:
        """Make the folders."""
        for folder in (self.logs, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)

    def started(self) -> bool:
        """Whether a run was started here before."""
        return self.config.exists()

    def open_checkpoint(self, step: int) -> Path:
        """An empty folder for the model to write into."""
        folder = self.checkpoints / f".step-{step:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def close_checkpoint(self, state: RunState, keep: int) -> Path:
        """Write the run's state beside the model, give the checkpoint its name, remove the oldest."""
        hidden = self.checkpoints / f".step-{state.step:06d}"
        write_durably(hidden / STATE, json.dumps(asdict(state)))
        final = self.checkpoints / f"step-{state.step:06d}"
        shutil.rmtree(final, ignore_errors=True)
        hidden.rename(final)
        for old in self._finished()[:-keep]:
            shutil.rmtree(old)
        return final

    def newest_checkpoint(self) -> tuple[Path, RunState] | None:
        """The last complete checkpoint and its state; None when there is none."""
        finished = self._finished()
        if not finished:
            return None
        try:
            return finished[-1], RunState(**json.loads((finished[-1] / STATE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ResumeError(
                f"{finished[-1]}: {STATE} cannot be read ({error}); move this folder away to resume from the one before"
            ) from None

    def _finished(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*"))


def write_durably(path: Path, text: str) -> None:
    """Write a file so that it is either whole or absent, also after a power cut."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
