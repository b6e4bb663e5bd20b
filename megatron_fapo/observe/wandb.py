"""Weights & Biases. The only file that imports wandb, and only when a run uses it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_fapo.errors import DataError
from megatron_fapo.observe.glossary import METRICS
from megatron_fapo.observe.interface import StepRecord


class WandbSink:
    """Logs every metric over `step`.

    A resumed run continues under the same id. Steps that are done again are logged again: their points lie at the
    same `step`, and the later ones are the run's.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: Literal["offline", "online"],
        project: str,
        run_id: str,
        name: str,
        group: str,
        config: Mapping[str, Any],
    ) -> None:
        import wandb

        try:
            self._run: wandb.Run | None = wandb.init(
                dir=str(folder),
                mode=mode,
                project=project,
                id=run_id,
                name=name,
                group=group,
                config=dict(config),
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
        except (wandb.errors.Error, OSError) as error:
            raise DataError(
                f"{folder}: wandb does not start ({error}); observe.wandb=offline needs no network"
            ) from error
        for prefix in sorted({metric.name.partition("/")[0] for metric in METRICS}):
            self._run.define_metric(f"{prefix}/*", step_metric="step")

    def write(self, record: StepRecord) -> None:
        """Log the step's metrics."""
        if self._run is None:
            raise ValueError("closed")
        self._run.log({"step": record.step, **record.metrics})

    def close(self) -> None:
        """Finish the run; online it waits for what is still to be sent."""
        if self._run is not None:
            import wandb

            self._run.finish()
            self._run = None
            wandb.teardown()  # only when its background process has ended are the files surely whole
