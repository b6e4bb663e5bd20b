"""A rank on CUDA does what a rank on the CPU does."""

from pathlib import Path

import pytest

from tests.policy.lives import save_tiny
from tests.policy.under_torchrun import run


@pytest.mark.gpu
def test_losses_and_gradient_norms_on_cuda_are_those_on_the_cpu(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is false")
    model = save_tiny("Qwen3", tmp_path, head_dim=16)
    on_gpu, on_cpu = run(model, 1), run(model, 1, CUDA_VISIBLE_DEVICES="")
    assert (on_gpu["device"], on_cpu["device"]) == ("cuda", "cpu")
    for ours, reference in zip(on_gpu["updates"], on_cpu["updates"], strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
