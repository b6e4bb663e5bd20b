"""The Llama-shaped decoder (Llama, Qwen2, Qwen3) as few operations as a token needs.

Its parameters carry their Hugging Face names and are what the model computes with: query, key and value projections
are row slices of one matrix, so are gate and up. Equal to the Hugging Face modules up to rounding; tested.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fapo.serving.engine.cache import KVCache

ARCHITECTURES = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}

_MOST_PADDING = 1024
"""A deterministic engine computes some positions more than the context is long."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries [N, heads, dim], keys [N, kv_heads, dim], values [N, kv_heads, dim]) -> [N, heads * dim]"""


def supports(config: dict[str, Any]) -> bool:
    """Whether a config.json describes a model that `Decoder` computes exactly."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return (
        bool(ARCHITECTURES & set(config.get("architectures") or ()))
        and config.get("hidden_act", "silu") == "silu"
        and not config.get("use_sliding_window", False)
        and not config.get("mlp_bias", False)
        and not (config.get("attention_bias", False) and "Qwen2ForCausalLM" not in config["architectures"])
        and rope.get("rope_type", rope.get("type", "default")) == "default"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a decoder."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    epsilon: float
    rope_theta: float
    positions: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    @classmethod
    def read(cls, config: dict[str, Any]) -> "Shape":
        """The sizes that a config.json states."""
        heads = config["num_attention_heads"]
        rope = config.get("rope_parameters") or {}
        return cls(
            vocabulary=config["vocab_size"],
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            mlp=config["intermediate_size"],
            epsilon=config["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
            positions=config["max_position_embeddings"],
            tied=config.get("tie_word_embeddings", False),
            qkv_bias="Qwen2ForCausalLM" in config["architectures"],
            qk_norm="Qwen3ForCausalLM" in config["architectures"],
        )


@dataclass(slots=True)
class _Layer:
    norm_in: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    norm_mlp: Tensor
    gate_up: Tensor
    down: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qk_norm: Tensor | None = None
    """[heads + kv_heads, head_dim] both norms' weights, laid out as the heads are; made by `Decoder.refresh`."""


class Decoder:
    """Weights and arithmetic of one model."""

    def __init__(self, shape: Shape, dtype: torch.dtype, context_length: int) -> None:
        self.shape = shape
        self.vocabulary = shape.vocabulary
        self.dtype = dtype
        self.parameters: dict[str, Tensor] = {}
        """Hugging Face name -> the tensor that the model computes with; a tied lm_head is not listed twice."""
        s = shape
        self._embedding = self._new("model.embed_tokens.weight", s.vocabulary, s.hidden)
        self._layers = [self._new_layer(f"model.layers.{i}.") for i in range(s.layers)]
        self._norm = self._new("model.norm.weight", s.hidden)
        self._head = self._embedding if s.tied else self._new("lm_head.weight", s.vocabulary, s.hidden)
        self._cos, self._sin = _rotary_tables(s, context_length, dtype)
        self._ages = torch.arange(context_length + _MOST_PADDING)

    def new_cache(self) -> KVCache:
        """An empty cache for this model's keys and values."""
        return KVCache(self.shape.layers, self.shape.kv_heads, self.shape.head_dim, self.dtype)

    def refresh(self) -> None:
        """Recompute what is derived from the parameters; call it after they changed."""
        s = self.shape
        for layer in self._layers:
            if layer.q_norm is not None and layer.k_norm is not None:
                layer.qk_norm = torch.cat([layer.q_norm.expand(s.heads, -1), layer.k_norm.expand(s.kv_heads, -1)])

    def prefill(self, tokens: Tensor, cache: KVCache, row: int, copies: Tensor) -> Tensor:
        """Run prompts of one length and fill the cache.

        `tokens` [B, P]; sample `row + i` is a copy of prompt `copies[i]` [n]. Returns [B, vocabulary] logits after
        the last token.
        """
        batch, length = tokens.shape
        group = self.shape.heads // self.shape.kv_heads

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.view(batch, length, -1, self.shape.head_dim).transpose(1, 2) for x in (q, k, v))
            cache.store(layer, row, k[copies], v[copies])
            out = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, enable_gqa=group > 1)
            return out.transpose(1, 2).reshape(batch * length, -1)

        hidden = self._forward(tokens.flatten(), torch.arange(length).repeat(batch), attend)
        return self._logits(hidden.view(batch, length, -1)[:, -1])

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache, length: int) -> Tensor:
        """One token further for rows 0..R: `tokens` [R] stand at `positions` [R], all below `length`.

        Returns [R, vocabulary] logits.
        """
        rows, s = len(tokens), self.shape
        group = s.heads // s.kv_heads
        # Where each (row, kv head) writes in a cache seen as [rows * kv_heads * length, head_dim].
        slots = (torch.arange(rows * s.kv_heads).view(rows, s.kv_heads) * cache.length + positions[:, None]).flatten()
        unseen = self._ages[:length] > positions[:, None]
        bias = torch.zeros(rows, 1, 1, length, dtype=self.dtype).masked_fill_(unseen[:, None, None], float("-inf"))
        bias = bias.expand(rows, s.kv_heads, group, length).reshape(rows * s.kv_heads, group, length)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            keys.view(-1, s.head_dim).index_copy_(0, slots, k.reshape(-1, s.head_dim))
            values.view(-1, s.head_dim).index_copy_(0, slots, v.reshape(-1, s.head_dim))
            seen = (rows * s.kv_heads, cache.length, s.head_dim)
            keys, values = keys[:rows].view(seen)[:, :length], values[:rows].view(seen)[:, :length]
            queries = q.reshape(rows * s.kv_heads, group, s.head_dim)
            scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=s.head_dim**-0.5)
            return torch.bmm(scores.softmax(-1), values).view(rows, -1)

        return self._logits(self._forward(tokens, positions, attend))

    def _forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """[N] tokens -> [N, hidden], before the last norm."""
        s, n = self.shape, len(tokens)
        cos, sin = self._cos[positions], self._sin[positions]
        x = F.embedding(tokens, self._embedding)
        for index, layer in enumerate(self._layers):
            normed = F.rms_norm(x, (s.hidden,), layer.norm_in, s.epsilon)
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(n, s.heads + 2 * s.kv_heads, s.head_dim)
            qk, v = qkv[:, : s.heads + s.kv_heads], qkv[:, s.heads + s.kv_heads :]
            if layer.qk_norm is not None:
                qk = F.rms_norm(qk, (s.head_dim,), None, s.epsilon) * layer.qk_norm
            halves = qk.reshape(n, -1, 2, s.head_dim // 2).flip(-2).view(qk.shape)
            qk = torch.addcmul(qk * cos, halves, sin)
            attended = attend(index, qk[:, : s.heads], qk[:, s.heads :], v)
            x = torch.addmm(x, attended, layer.out.t())
            normed = F.rms_norm(x, (s.hidden,), layer.norm_mlp, s.epsilon)
            gate, up = F.linear(normed, layer.gate_up).chunk(2, -1)
            x = torch.addmm(x, F.silu(gate) * up, layer.down.t())
        return x

    def _logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocabulary], float32."""
        normed = F.rms_norm(hidden, (self.shape.hidden,), self._norm, self.shape.epsilon)
        return F.linear(normed, self._head).float()

    def _new(self, name: str, *size: int) -> Tensor:
        self.parameters[name] = torch.empty(size, dtype=self.dtype)
        return self.parameters[name]

    def _new_fused(self, names: list[str], rows: list[int], *rest: int) -> Tensor:
        """One tensor whose consecutive rows are the named parameters."""
        whole = torch.empty(sum(rows), *rest, dtype=self.dtype)
        self.parameters.update(zip(names, torch.split(whole, rows), strict=True))
        return whole

    def _new_layer(self, prefix: str) -> _Layer:
        s = self.shape
        qkv = [f"{prefix}self_attn.{x}_proj" for x in "qkv"]
        rows = [s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim]
        mlp = [f"{prefix}mlp.{x}_proj.weight" for x in ("gate", "up")]
        return _Layer(
            norm_in=self._new(f"{prefix}input_layernorm.weight", s.hidden),
            qkv=self._new_fused([f"{name}.weight" for name in qkv], rows, s.hidden),
            qkv_bias=self._new_fused([f"{name}.bias" for name in qkv], rows) if s.qkv_bias else None,
            out=self._new(f"{prefix}self_attn.o_proj.weight", s.hidden, s.heads * s.head_dim),
            norm_mlp=self._new(f"{prefix}post_attention_layernorm.weight", s.hidden),
            gate_up=self._new_fused(mlp, [s.mlp, s.mlp], s.hidden),
            down=self._new(f"{prefix}mlp.down_proj.weight", s.hidden, s.mlp),
            q_norm=self._new(f"{prefix}self_attn.q_norm.weight", s.head_dim) if s.qk_norm else None,
            k_norm=self._new(f"{prefix}self_attn.k_norm.weight", s.head_dim) if s.qk_norm else None,
        )


def _rotary_tables(shape: Shape, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin, each [length, 1, head_dim]: rotated = x * cos + swap_halves(x) * sin."""
    frequencies = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1)[:, None].to(dtype), torch.cat([-sin, sin], -1)[:, None].to(dtype)
