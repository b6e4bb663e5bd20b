"""The learning rate as a function of the optimizer steps done."""

import math

from megatron_fapo.policy.settings import OptimizerSettings


def learning_rate(update: int, settings: OptimizerSettings) -> float:
    """The rate of the optimizer step number `update`, counted from 0.

    Warm-up step w of n uses (w + 1) / n of the rate, so that no step is lost at rate 0.
    """
    peak = settings.learning_rate
    if update < settings.warmup_steps:
        return peak * (update + 1) / settings.warmup_steps
    if settings.schedule == "constant" or settings.decay_steps is None:
        return peak
    done = (update - settings.warmup_steps) / (settings.decay_steps - settings.warmup_steps)
    share = settings.floor + (1 - settings.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return peak * share
