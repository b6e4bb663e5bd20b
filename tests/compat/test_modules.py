"""Our layer modules against torch's own."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_fapo.compat.modules import RMSNorm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("shape", [(7, 3, 16), (5, 2, 4, 8)])
def test_rms_norm_and_its_gradients_equal_torchs(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), shape[-1], eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    gradient = torch.randn(shape).to(dtype)
    results = []
    for function in (norm, lambda x: F.rms_norm(x, norm.weight.shape, norm.weight, 1e-3)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        norm.weight.grad = None
        out = function(x)
        out.backward(gradient)
        assert x.grad is not None
        assert norm.weight.grad is not None
        results.append((out.detach(), x.grad, norm.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
