"""Layer modules on plain torch, for Megatron's specs where Transformer Engine is absent.

Megatron's own local modules refuse sequence parallelism (norm) and are slow (attention materialises the scores).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset


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

    Under context parallelism a row is cut into 2 c chunks, and rank r of c holds chunks r and 2 c - 1 - r, so that
    all ranks have the same number of pairs to compute. Keys and values of the whole row are gathered (their
    gradients summed and scattered back), and each of the two chunks attends to what precedes its end.
    """

    def __init__(self, config: Any, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__(config)
        self.scale = softmax_scale
        self.ranks: Any = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        packed_seq_params: Any = None,
        **__: Any,
    ) -> torch.Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d]; s is this rank's share.

        Sequences that are packed, [t, heads, d] and [t, groups, d], attend each to itself -> [t, heads * d].
        """
        if packed_seq_params is not None:
            sizes = packed_seq_params.cu_seqlens_q.diff().tolist()
            parts = (torch.split(tensor.unsqueeze(1), sizes) for tensor in (query, key, value))
            return torch.cat([self._attend(*part) for part in zip(*parts, strict=True)]).flatten(1)
        s, b, heads, d = query.shape
        if self.ranks.size() == 1:
            out = self._attend(query, key, value)
        else:
            keys, values = (
                in_order(gather_from_sequence_parallel_region(part, group=self.ranks), self.ranks.size())
                for part in (key, value)
            )
            out = torch.cat(
                [
                    self._attend(chunk, keys[:end], values[:end])
                    for chunk, end in zip(query.chunk(2), _ends(s // 2, self.ranks), strict=True)
                ]
            )
        return out.reshape(s, b, heads * d)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of the last positions of a row, [s, b, heads, d], to all of it, [S, b, groups, d]."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        last = len(query) < len(key)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_seen(len(query), len(key), query.device) if last else None,
            is_causal=not last,
            scale=self.scale,
            enable_gqa=key.shape[2] != query.shape[2],
        )
        return out.permute(2, 0, 1, 3)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """It has no state."""
        return {}


def _ends(chunk: int, ranks: Any) -> tuple[int, int]:
    """Where this rank's two chunks end in the row."""
    return (ranks.rank() + 1) * chunk, (2 * ranks.size() - ranks.rank()) * chunk


def _seen(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """[queries, keys] what each of the last positions sees: everything up to itself."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def in_order(gathered: torch.Tensor, ranks: int) -> torch.Tensor:
    """Chunks in the order of a row, from chunks in the order of ranks (0, 2 c - 1, 1, 2 c - 2, ...); dim 0 is cut."""
    chunks = gathered.chunk(2 * ranks)
    return torch.cat([*chunks[::2], *chunks[::-2]])


def local_block_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The spec of this pipeline stage's layers, of the modules above; experts where the config has them."""
    first, count = get_transformer_layer_offset(config, vp_stage), get_num_layers_to_build(config, vp_stage)
    frequency = config.moe_layer_freq
    layers = []
    for number in range(first, first + count):
        sparse = frequency[number] if isinstance(frequency, list) else number % frequency == 0
        layers.append(_layer_spec(config, config.num_moe_experts if sparse else None))
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _layer_spec(config: Any, experts: int | None) -> Any:
    layer = get_gpt_layer_local_spec(
        num_experts=experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer
