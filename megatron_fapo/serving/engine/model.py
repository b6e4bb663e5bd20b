"""What the engine needs of a model; `decoder.Decoder` is the fast one, `hugging_face.HuggingFaceModel` the general."""

from typing import Protocol

from torch import Tensor

from megatron_fapo.serving.engine.cache import KVCache


class Model(Protocol):
    """Weights and arithmetic."""

    parameters: dict[str, Tensor]
    """Hugging Face name -> the tensor that the model computes with; tied weights once."""
    vocabulary: int

    def new_cache(self) -> KVCache:
        """An empty cache for this model's keys and values."""

    def refresh(self) -> None:
        """Recompute what is derived from the parameters; called after they changed."""

    def prefill(self, tokens: Tensor, cache: KVCache, row: int, copies: Tensor) -> Tensor:
        """Run prompts [B, P] and fill the cache: sample `row + i` is a copy of prompt `copies[i]` [n].

        Returns [B, vocabulary] float32 logits after the last token.
        """

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache, length: int) -> Tensor:
        """One token further for rows 0..R: `tokens` [R] stand at `positions` [R], all below `length`.

        Returns [R, vocabulary] float32 logits.
        """
