"""Settings of the tasks: which problems, and how the answers are checked."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_fapo.settings import Settings

Share = Annotated[float, Field(ge=0, le=1)]


class ClockSettings(Settings):
    """Arithmetic on a clock: the demo world, small enough for a laptop, with an oracle for every step."""

    name: Literal["clock"] = "clock"
    """Selects this task."""
    hours: Annotated[int, Field(ge=10, le=60)] = 20
    """Hours on the clock: all arithmetic is modulo this."""
    modulus: Annotated[int, Field(ge=2)] = 5
    """A coarse question asks for the result modulo this, so a slip by a multiple of it leaves the answer right."""
    chain: Annotated[tuple[int, ...], Field(min_length=1)] = (3, 4, 5)
    """Numbers of operations, each as likely as the others."""
    coarse: Share = 0.98
    """Share of coarse questions; the others are exact and ask for the result itself."""
    slip: Share = 0.3
    """Share of the teacher's solutions with one step off by a multiple of `modulus`, carried on from there."""
    jump: Share = 0.1
    """Share of the teacher's solutions that leave out the last step."""

    @model_validator(mode="after")
    def _consistent(self) -> "ClockSettings":
        if self.hours % self.modulus or self.hours == self.modulus:
            raise ValueError(f"modulus {self.modulus} must divide hours {self.hours} and be smaller")
        if self.slip + self.jump > 1:
            raise ValueError(f"slip {self.slip} and jump {self.jump} are shares of one whole: together at most 1")
        if not all(1 <= steps <= 10 for steps in self.chain):
            raise ValueError(f"chain {self.chain} must hold numbers of operations in 1..10")
        return self


class MathSettings(Settings):
    """Mathematics with a final answer, checked by math-verify."""

    name: Literal["math"] = "math"
    """Selects this task."""
    train: str = "open-r1/DAPO-Math-17k-Processed"
    """Training problems: a .parquet or .jsonl file, or the name of a dataset on the Hugging Face hub."""
    train_config: str = "all"
    """Which configuration of a hub dataset."""
    held_out: str | None = None
    """Problems for evaluation, named as `train` is. When null, the last `held_out_rows` training rows, unshuffled."""
    held_out_config: str = "all"
    """Which configuration of a held-out hub dataset."""
    held_out_rows: Annotated[int, Field(ge=1)] = 256
    """Rows taken off the training problems when `held_out` is null."""
    check_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Deadline of one comparison; past it the checker process is replaced and the answer counts as wrong."""
    check_workers: Annotated[int, Field(ge=1)] = 2
    """Checker processes; each compares one answer at a time."""


class CritiqueSettings(Settings):
    """The judge's own task: find the first wrong paragraph (rows of the FAPO-Critic format)."""

    name: Literal["critique"] = "critique"
    """Selects this task."""
    train: Path
    """Training rows, .parquet or .jsonl."""
    held_out: Path | None = None
    """Rows for evaluation. When null, the last `held_out_rows` training rows."""
    held_out_rows: Annotated[int, Field(ge=1)] = 256
    """Rows taken off the training rows when `held_out` is null."""


TaskSettings = Annotated[ClockSettings | MathSettings | CritiqueSettings, Field(discriminator="name")]
"""One of the tasks, chosen by its `name`."""
