"""A model in numbers, from its config.json alone: parameters of every rank, bytes of KV cache, operations a token.

Closed forms of what Megatron builds; tests hold them equal to the build on the meta device (`policy.shapes`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_fapo.batch.balance import crossover
from megatron_fapo.errors import ConfigError
from megatron_fapo.policy.settings import ParallelSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a decoder, named as in its config."""

    layers: int
    hidden: int
    heads: int
    groups: int
    """Key-value heads."""
    head_dim: int
    mlp: int
    """Width of the gated MLP, or of one expert."""
    vocabulary: int
    tied: bool
    experts: int = 0
    chosen: int = 1
    """Experts that a token takes."""
    qkv_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """From the content of a config.json. Raises ConfigError where a size is missing."""
        kind, experts = config.get("model_type"), config.get("num_experts") or config.get("num_local_experts") or 0
        try:
            heads = config["num_attention_heads"]
            return cls(
                layers=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                heads=heads,
                groups=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                mlp=config["moe_intermediate_size"] if experts else config["intermediate_size"],
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
                experts=experts,
                chosen=config["num_experts_per_tok"] if experts else 1,
                qkv_bias=kind == "qwen2",
                qk_norm=kind in ("qwen3", "qwen3_moe"),
            )
        except KeyError as error:
            raise ConfigError(f"the model's config.json has no {error}") from None

    @property
    def parameters(self) -> int:
        """Of the whole model, as its checkpoint has them."""
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * (self._attention(1) + self._norms + self._mlp_dense(1) + self._experts(1, 1)) + (
            embeddings + self.hidden
        )

    @property
    def active(self) -> int:
        """Parameters of the matrices that a token meets, without the embedding's table and the output layer."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.groups)
        router = self.hidden * self.experts
        return self.layers * (attention + router + 3 * self.hidden * self.mlp * self.chosen)

    @property
    def cache(self) -> int:
        """Bytes of keys and values of one token in BF16, over all ranks."""
        return 2 * 2 * self.layers * self.groups * self.head_dim

    @property
    def crossover(self) -> float:
        """Length at which attention costs as much as everything else (`batch.balance`)."""
        return crossover(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            groups=self.groups,
            head_dim=self.head_dim,
            mlp=self.mlp * self.chosen,
            vocabulary=self.vocabulary,
        )

    def forward(self, tokens: float, square: float) -> float:
        """Floating-point operations of a forward pass over sequences of `tokens` in all, `square` in sum of squares."""
        linear = 2 * self.active + 2 * self.hidden * self.vocabulary
        return linear * tokens + 2 * self.layers * self.heads * self.head_dim * square

    def weights_met(self, batch: float) -> float:
        """Parameters that a decode step of `batch` samples reads: of experts, those that at least one of them takes."""
        dense = (
            self.parameters - self.layers * self._experts_alone - (0 if self.tied else self.vocabulary * self.hidden)
        )
        if not self.experts:
            return float(dense)
        met: float = 1 - (1 - self.chosen / self.experts) ** batch
        return dense + met * self.layers * self._experts_alone

    @property
    def _experts_alone(self) -> int:
        return self.experts * 3 * self.hidden * self.mlp

    def _attention(self, tensor: int) -> int:
        qkv = (self.heads + 2 * self.groups) * self.head_dim // tensor
        return (
            qkv * (self.hidden + (1 if self.qkv_bias else 0))
            + self.hidden * self.heads * self.head_dim // tensor
            + (2 * self.head_dim if self.qk_norm else 0)
        )

    @property
    def _norms(self) -> int:
        return 2 * self.hidden

    def _mlp_dense(self, tensor: int) -> int:
        """The MLP's matrices, or the router of the experts."""
        return self.experts * self.hidden if self.experts else 3 * self.hidden * self.mlp // tensor

    def _experts(self, expert: int, expert_tensor: int) -> int:
        return self._experts_alone // expert // expert_tensor

    def rows(self, tensor: int) -> int:
        """Rows of the vocabulary on one of `tensor` ranks, padding included."""
        return math.ceil(self.vocabulary / tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The parameters of one rank."""

    dense: int
    """Those with a copy on every data- and context-parallel rank."""
    experts: int
    """Those of its experts."""

    @property
    def parameters(self) -> int:
        """All."""
        return self.dense + self.experts


def part(shape: Shape, parallel: ParallelSettings, stage: int) -> Part:
    """What a rank of pipeline stage `stage` holds; all ranks of a stage hold equally many."""
    layers = shape.layers // parallel.pipeline
    ends = shape.rows(parallel.tensor) * shape.hidden
    last = stage == parallel.pipeline - 1
    dense = layers * (shape._attention(parallel.tensor) + shape._norms + shape._mlp_dense(parallel.tensor))
    if stage == 0:
        dense += ends
    if last:
        dense += shape.hidden
        if not shape.tied or parallel.pipeline > 1:
            dense += ends
    experts = layers * shape._experts(parallel.expert, parallel.expert_tensor) if shape.experts else 0
    return Part(dense=dense, experts=experts)
