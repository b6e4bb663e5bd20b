"""Reading run folders back: for the report, for summary.json, for whoever compares runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

import yaml

from megatron_fapo.errors import DataError
from megatron_fapo.observe import jsonl
from megatron_fapo.observe.interface import files_of
from megatron_fapo.observe.jsonl import StepMetrics, read_metrics
from megatron_fapo.observe.rollouts import RolloutRow, read_rollouts, rollout_files
from megatron_fapo.observe.run_info import RunInfo, read_run_info

LAST = 10
"""Steps that a run is summed up by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a run left behind."""

    path: Path
    info: RunInfo
    config: dict[str, Any]
    """config.yaml, as plain values."""
    lines: tuple[StepMetrics, ...]
    """All lines of metrics.jsonl; the last may hold an evaluation alone."""
    rollouts: dict[int, Path]
    """{step: parquet file}; empty when the run kept none."""

    @property
    def steps(self) -> tuple[StepMetrics, ...]:
        """The training steps."""
        return tuple((step, metrics) for step, metrics in self.lines if "rollout/right_share" in metrics)

    @property
    def seconds(self) -> float:
        """All steps together."""
        return fsum(metrics.get("time/step", 0.0) for _, metrics in self.steps)

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, for the steps that have it."""
        return [(step, metrics[name]) for step, metrics in self.lines if name in metrics]

    def last(self, name: str, steps: int = LAST) -> float | None:
        """Mean of a metric over the last training steps, of those that have it; None when none has."""
        values = [metrics[name] for _, metrics in self.steps[-steps:] if name in metrics]
        return fsum(values) / len(values) if values else None

    def rows(self, step: int) -> list[RolloutRow]:
        """The rollouts of a step. Raises DataError."""
        if step not in self.rollouts:
            raise DataError(f"{self.path}: no rollouts of step {step} here")
        return read_rollouts(self.rollouts[step])


def read_run(path: Path) -> RunRecord:
    """The run in a folder; it may still be going on.

    Raises DataError that names the missing or damaged part.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such run folder")
    if not (path / jsonl.NAME).is_file():
        raise DataError(f"{path}: no run folder ({jsonl.NAME} is missing)")
    lines = read_metrics(path / jsonl.NAME)
    if not lines:
        raise DataError(f"{path / jsonl.NAME}: no step is finished yet")
    return RunRecord(
        path=path,
        info=read_run_info(path),
        config=_read_config(path / "config.yaml"),
        lines=tuple(lines),
        rollouts=rollout_files(path),
    )


def summarise(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """What summary.json holds: each run's averages over its last ten steps; None where a share is not defined."""
    return {
        "arms": [
            {
                "arm": run.info.arm,
                "seed": run.info.seed,
                "steps": len(run.steps),
                "right_share": run.last("rollout/right_share"),
                "flawed_share_oracle": run.last("flawed/oracle"),
                "flawed_share_judge": run.last("flawed/judge"),
                "seconds": run.seconds,
            }
            for run in runs
        ]
    }


def _read_config(path: Path) -> dict[str, Any]:
    with files_of(path):
        text = path.read_text()
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML ({error})") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: must be a mapping of sections, found {type(config).__name__}")
    return config
