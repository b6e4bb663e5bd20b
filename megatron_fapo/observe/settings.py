"""Settings of what is shown and recorded. Light: no torch, no wandb."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_fapo.settings import Settings

# YAML reads a bare `off` as false.
_OffIsAWord = BeforeValidator(lambda value: "off" if value is False else value)


class ObserveSettings(Settings):
    """What is shown and recorded. `metrics.jsonl` is always written."""

    console: Annotated[Literal["auto", "live", "plain", "off"], _OffIsAWord] = "auto"
    """What stands on the terminal: `live` a table that is drawn anew, `plain` one line a step; `auto` takes `live` on a
    terminal and `plain` elsewhere (CI, Slurm logs)."""
    rollouts: bool = True
    """Keep every rollout with its verdict, `rollouts/step-N.parquet`."""
    report: bool = True
    """Write `report.html` into the run folder when the run ends."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Dense peak of one rank's device in TFLOP/s at the precision of training (H100 SXM: 989 in BF16). With it
    `time/mfu` is measured; null leaves it out."""
    tensorboard: bool = False
    """Write TensorBoard event files into `tensorboard/`."""
    wandb: Annotated[Literal["off", "offline", "online"], _OffIsAWord] = "off"
    """Weights & Biases; `offline` only writes files, which `wandb sync` sends later."""
    wandb_project: str = "megatron-fapo"
    """Project of the run at Weights & Biases."""
