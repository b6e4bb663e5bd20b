"""Settings of the batch: how a step's groups are cut into optimizer steps and microbatches."""

from typing import Annotated

from pydantic import Field

from megatron_fapo.settings import Settings


class BatchSettings(Settings):
    """How a step's groups are cut into optimizer steps and microbatches."""

    updates: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps of one step; its prompts are split among them as evenly as possible."""
    tokens_per_microbatch: Annotated[int, Field(ge=1)] = 16384
    """Most token positions, padding included, that a rank computes at once; a longer sequence is computed alone."""
    skip_zero_advantage: bool = True
    """Leave sequences whose advantages are all zero out of forward and backward. Their gradient is exactly zero and
    their tokens still count in the mean, so the update is the same."""
