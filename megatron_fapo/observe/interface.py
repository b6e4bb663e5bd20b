"""What a sink is, and the record that all of them take."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_fapo.errors import DataError
from megatron_fapo.observe.metrics import Metrics
from megatron_fapo.records import Group
from megatron_fapo.trace import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """All that is shown and recorded of one step.

    A step that only has a held-out evaluation (the one after the last update) has no groups.
    """

    step: int
    metrics: Metrics
    """{declared name: finite value}"""
    groups: tuple[Group, ...] = ()
    rewards: Mapping[str, float]
    """{rollout id: reward}; a rollout of a dropped group has none."""
    advantages: Mapping[str, float]
    """{rollout id: mean advantage over its tokens}; a rollout of a dropped group has none."""
    spans: tuple[Span, ...] = ()
    """The step and its phases, in seconds since 1970."""


class Sink(Protocol):
    """Something that keeps or shows steps.

    Contract: `write` comes once a step, steps rising; when it returns, a killed process loses nothing of that step
    (wandb, which writes in the background, may). A sink opened with `resume_step` forgets what it holds of that step
    and later ones (wandb logs them again), and repairs what a killed process left half written. `close` may come at
    any time and twice, and nothing is written after it. Errors are DataErrors that name the file.
    """

    def write(self, record: StepRecord) -> None:
        """Take in one step."""

    def close(self) -> None:
        """Release files and threads."""


@contextmanager
def files_of(path: Path) -> Iterator[None]:
    """Foreign errors about files become DataErrors that name `path`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
