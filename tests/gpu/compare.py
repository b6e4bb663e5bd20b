"""How near two devices, or two precisions, must be to each other."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearness:
    """Relative differences that are allowed."""

    logits: float
    """Root mean square of the difference, over that of the logits."""
    loss: float
    grad_norm: float


FLOAT32 = Nearness(logits=1e-5, loss=1e-4, grad_norm=1e-4)
"""Float32 without TensorFloat-32: sums in another order."""
BFLOAT16 = Nearness(logits=2e-2, loss=2e-2, grad_norm=5e-2)
"""8 bits of mantissa, weights rounded too."""
FP8 = Nearness(logits=1e-1, loss=5e-2, grad_norm=2e-1)
"""Against BF16: 3 bits of mantissa in the layers' products. A padding that were not masked would be off by more
than a factor of 10 in the gradient norm."""


def assert_near(ours: dict[str, Any], theirs: dict[str, Any], allowed: Nearness) -> None:
    """Logits before the first update; loss and gradient norm of each update."""
    difference = float(np.sqrt(np.mean((ours["logits"] - theirs["logits"]) ** 2)))
    scale = float(np.sqrt(np.mean(theirs["logits"] ** 2)))
    assert difference <= allowed.logits * scale, f"logits differ by {difference / scale:.2e} of their size"
    assert len(ours["updates"]) == len(theirs["updates"]) > 0
    for step, (own, reference) in enumerate(zip(ours["updates"], theirs["updates"], strict=True)):
        assert own["loss"] == pytest.approx(reference["loss"], rel=allowed.loss, abs=allowed.loss * 1e-2), step
        assert own["grad_norm"] == pytest.approx(reference["grad_norm"], rel=allowed.grad_norm), step
        assert own["loss_tokens"] == reference["loss_tokens"], step
