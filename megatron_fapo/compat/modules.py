"""Layer modules on plain torch, for Megatron's specs where Transformer Engine is absent.

Megatron's own local modules refuse sequence parallelism (norm) and are slow (attention materialises the scores).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build


class _RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight with its backward written out.

    torch's own backward on a CPU is a chain of a dozen elementwise operations, which in a small model shows.
    With n = x / rms and g the gradient, dx = (g w - n mean(g w n)) / rms.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean.add_(eps).rsqrt_()
        normal = wide * scale
        ctx.save_for_backward(normal, scale, weight)
        out: torch.Tensor = normal.to(x.dtype) * weight
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normal, scale, weight = ctx.saved_tensors
        gradient = gradients[0].to(normal.dtype)
        for_weight = (gradient * normal).reshape(-1, normal.shape[-1]).sum(0).to(weight.dtype)
        scaled = gradient * weight
        mean = torch.linalg.vecdot(scaled, normal).unsqueeze(-1) / normal.shape[-1]
        return torch.addcmul(scaled, normal, mean, value=-1).mul_(scale).to(gradients[0].dtype), for_weight, None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm with a weight; marks its weight for sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] in and out."""
        normal: torch.Tensor = _RMSNormFunction.apply(hidden, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normal


class CausalAttention(MegatronModule):  # type: ignore[misc]
    """Causal core attention on torch's scaled dot product.

    Rows are sequences padded at their end. A token sees only what precedes it, so no token of a sequence ever sees
    padding, and no mask is needed; what is computed at padded positions is never read.
    """

    def __init__(self, config: Any, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__(config)
        self.scale = softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d]."""
        s, b, heads, d = query.shape
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=key.shape[2] != heads
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """It has no state."""
        return {}


def local_block_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The spec of this pipeline stage's layers, of the modules above."""
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )
