"""Any Hugging Face causal language model, through its own forward: the general and slower `Model`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache

from megatron_fapo.errors import ConfigError
from megatron_fapo.serving.engine.cache import KVCache


class HuggingFaceModel:
    """`AutoModelForCausalLM` behind the engine's interface. Attention over all positions is required."""

    def __init__(self, folder: Path, config: dict[str, Any], dtype: torch.dtype, context_length: int) -> None:
        window = config.get("sliding_window")
        if window is not None and window < context_length:
            raise ConfigError(f"{folder}: attends to {window} positions; set context_length to at most that")
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
        self._dtype = dtype
        for parameter in self._model.parameters():
            parameter.data = parameter.data.clone()  # a mapped file's memory cannot be released
        self.parameters: dict[str, Tensor] = {name: p.data for name, p in self._model.named_parameters()}
        self.vocabulary = int(config["vocab_size"])

    def new_cache(self) -> KVCache:
        """An empty cache in the shape of the model's own, seen on a prompt of one token."""
        with torch.inference_mode():
            layers = self._run(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=DynamicCache())[1].layers
        shapes = {tuple(x.shape) for layer in layers for x in (layer.keys, layer.values)}
        if len(shapes) != 1:
            raise ConfigError(f"layers keep keys and values of different shapes {sorted(shapes)}: not supported")
        _, heads, _, dim = shapes.pop()
        return KVCache(len(layers), heads, dim, self._dtype)

    def refresh(self) -> None:
        """Nothing is derived from the parameters."""

    def prefill(self, tokens: Tensor, cache: KVCache, row: int, copies: Tensor) -> Tensor:
        """As `Model.prefill`."""
        logits, filled = self._run(input_ids=tokens, past_key_values=DynamicCache())
        for layer, held in enumerate(filled.layers):
            cache.store(layer, row, held.keys[copies], held.values[copies])
        return logits

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache, length: int) -> Tensor:
        """As `Model.decode`."""
        seen = torch.arange(length) <= positions[:, None]
        mask = torch.zeros(len(tokens), 1, 1, length, dtype=self._dtype)
        mask.masked_fill_(~seen[:, None, None], torch.finfo(self._dtype).min)
        past = _Rows(cache, positions, length)
        return self._run(
            input_ids=tokens[:, None], position_ids=positions[:, None], attention_mask=mask, past_key_values=past
        )[0]

    def _run(self, **inputs: Any) -> tuple[Tensor, Any]:
        output = self._model(**inputs, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].float(), output.past_key_values


class _Rows(Cache):  # type: ignore[misc]
    """Our cache as transformers asks for one: a row's new keys and values go to that row's position."""

    def __init__(self, cache: KVCache, positions: Tensor, length: int) -> None:
        super().__init__(layers=[])
        self._cache, self._positions, self._length = cache, positions, length
        self._rows = torch.arange(len(positions))

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [R, kv_heads, 1, head_dim] and return everything up to the longest row."""
        for held, new in ((self._cache.keys[layer], keys), (self._cache.values[layer], values)):
            held[self._rows, :, self._positions] = new[:, :, 0]
        rows = len(self._positions)
        return self._cache.keys[layer][:rows, :, : self._length], self._cache.values[layer][:rows, :, : self._length]

    def get_seq_length(self, layer: int = 0) -> int:
        """Positions before this token."""
        return self._length - 1
