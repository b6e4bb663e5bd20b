"""From settings to a loaded engine."""

from pathlib import Path
from typing import Any

import torch

from megatron_fapo.errors import ConfigError
from megatron_fapo.serving.engine import decoder
from megatron_fapo.serving.engine.engine import Engine
from megatron_fapo.serving.engine.model import Model
from megatron_fapo.serving.engine.protocol import Limits
from megatron_fapo.serving.engine.text import Text
from megatron_fapo.serving.engine.weights import Weights, read_config
from megatron_fapo.serving.settings import ServerSettings


def context_length(settings: ServerSettings, config: dict[str, Any]) -> int:
    """Tokens that prompt and answer may have together."""
    return min(settings.context_length, config.get("max_position_embeddings", settings.context_length))


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
        raise ConfigError(f"{folder}: architecture {config.get('architectures')} is not supported")
    weights = Weights(model)
    weights.load(folder)
    granularity = 16 if settings.deterministic else 1
    return Engine(model, weights, settings.max_running, granularity, text.find_stop)


def limits(settings: ServerSettings) -> Limits:
    """What requests may ask for."""
    config = read_config(Path(settings.model))
    return Limits(
        context_length=context_length(settings, config),
        vocabulary=config["vocab_size"],
        deterministic=settings.deterministic,
    )
