"""Settings of what a run keeps on disk."""

from typing import Annotated

from pydantic import Field

from megatron_fapo.settings import Settings


class CheckpointSettings(Settings):
    """When checkpoints are written and how many stay."""

    every: Annotated[int, Field(ge=0)] = 20
    """Steps between checkpoints; 0 writes one only at the end and at SIGTERM."""
    keep: Annotated[int, Field(gt=0)] = 2
    """Newest checkpoints that stay."""
    export_hf: bool = True
    """Write the final policy as a Hugging Face folder, RUN/model."""

    def due(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` steps."""
        return self.every > 0 and step > 0 and step % self.every == 0
