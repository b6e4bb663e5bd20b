"""Runs sorted into arms: which runs belong together, how they are called and which colour they have."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from megatron_fapo.observe.runs import RunRecord

COLOURS = ("fapo", "grpo", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
"""CSS classes; an arm called as one of them has its colour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """All runs of one method."""

    name: str
    colour: str
    runs: tuple[RunRecord, ...]

    @property
    def title(self) -> str:
        """The name as people write it."""
        return self.name.upper() if self.name in ("fapo", "grpo") else self.name

    def values(self, metric: str) -> list[float]:
        """Each run's mean over its last ten steps, of the runs that have it."""
        found = [run.last(metric) for run in self.runs]
        return [value for value in found if value is not None]

    def mean(self, metric: str) -> float | None:
        """Mean of `values`; None when there are none."""
        values = self.values(metric)
        return fsum(values) / len(values) if values else None


def arms_of(runs: Sequence[RunRecord]) -> tuple[Arm, ...]:
    """The arms, plain GRPO (the baseline) last; runs of an arm by their seed."""
    names = sorted({run.info.arm for run in runs}, key=lambda name: (name == "grpo", name != "fapo", name))
    free = [colour for colour in COLOURS if colour not in names]
    return tuple(
        Arm(
            name=name,
            colour=name if name in COLOURS else free.pop(0) if free else COLOURS[-1],
            runs=tuple(sorted((run for run in runs if run.info.arm == name), key=lambda run: run.info.seed)),
        )
        for name in names
    )


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """A name for each run, with the folder's name where arm and seed do not tell runs apart."""
    plain = [run.info.label for run in runs]
    return [
        f"{label} ({run.path.name})" if plain.count(label) > 1 else label
        for label, run in zip(plain, runs, strict=True)
    ]
