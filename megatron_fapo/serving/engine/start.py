"""From settings to a loaded engine."""

from pathlib import Path
from typing import Any

import torch

from megatron_fapo.serving.engine import decoder
from megatron_fapo.serving.engine.engine import Engine
from megatron_fapo.serving.engine.folder import read_config
from megatron_fapo.serving.engine.invariance import find_granularity
from megatron_fapo.serving.engine.model import Model
from megatron_fapo.serving.engine.protocol import Limits
from megatron_fapo.serving.engine.text import Text
from megatron_fapo.serving.engine.weights import Weights
from megatron_fapo.serving.settings import ServerSettings


def context_length(settings: ServerSettings, config: dict[str, Any]) -> int:
    """Tokens that prompt and answer may have together."""
    return min(settings.context_length, int(config.get("max_position_embeddings", settings.context_length)))


def build_engine(settings: ServerSettings, text: Text) -> Engine:
    """Load the model and make an engine around it. Raises ConfigError, DataError."""
    torch.set_num_threads(settings.threads)
    folder = Path(settings.model)
    config = read_config(folder)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    model: Model
    if decoder.supports(config):
        model = decoder.Decoder(decoder.Shape.read(config), dtype, context_length(settings, config))
    else:
        # Transformers takes seconds to import; most models do without.
        from megatron_fapo.serving.engine.hugging_face import HuggingFaceModel

        model = HuggingFaceModel(folder, config, dtype, context_length(settings, config))
    weights = Weights(model)
    weights.load(folder)
    return Engine(
        model,
        weights,
        max_running=settings.max_running,
        threads=settings.threads,
        granularity=find_granularity(model, settings.max_running) if settings.deterministic else 1,
        find_stop=text.find_stop,
    )


def limits(settings: ServerSettings) -> Limits:
    """What requests may ask for."""
    config = read_config(Path(settings.model))
    return Limits(
        context_length=context_length(settings, config),
        vocabulary=config["vocab_size"],
        deterministic=settings.deterministic,
    )
