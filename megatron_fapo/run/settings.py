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
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints after a multiple of this many steps stay for good; 0 keeps none for good."""
    asynchronous: bool = True
    """Write while the next step generates; the loop waits only until the weights and the optimizer are copied."""
    export_hf: bool = True
    """Write the final policy as a Hugging Face folder, RUN/model."""

    def stays(self, step: int) -> bool:
        """Whether the checkpoint after `step` steps stays for good."""
        return self.keep_every > 0 and step % self.keep_every == 0

    def due(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` steps."""
        return self.every > 0 and step > 0 and step % self.every == 0
