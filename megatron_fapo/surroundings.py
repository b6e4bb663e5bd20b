"""What a configuration needs of the machine that it runs on: models, rows, programs, ports, keys."""

import json
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from megatron_fapo.config import Config
from megatron_fapo.errors import ConfigError
from megatron_fapo.fp8 import kept_by
from megatron_fapo.policy.layouts import check_layout
from megatron_fapo.serving.settings import EndpointSettings, ServerSettings

SHAPES = Path("configs/models")
"""Hugging Face configs of models whose weights may be elsewhere: `models/Qwen2.5-32B` is described by
`qwen2.5-32b.json` in here."""


def shape_file(folder: Path | str) -> Path | None:
    """The config.json of a model: in its folder, else the one that is shipped under its name, else None."""
    shipped = SHAPES / f"{Path(folder).name.lower()}.json"
    return next((path for path in (Path(folder) / "config.json", shipped) if path.is_file()), None)


def read_shape(folder: Path | str) -> dict[str, Any]:
    """What `shape_file` holds. Raises ConfigError when there is none, or it is not JSON."""
    path = shape_file(folder)
    if path is None:
        raise ConfigError(
            f"{folder}: no Hugging Face model there (config.json is missing), and none of its name in "
            f"{SHAPES.absolute()}; paths count from the present folder"
        )
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None


def check_surroundings(config: Config) -> None:
    """What must hold on this machine before anything starts: models and data exist and fit, fixed ports are free.

    Raises ConfigError.
    """
    for lack in lacking(config):
        raise ConfigError(lack)


def lacking(config: Config) -> list[str]:
    """What the run needs and this machine has not, each with what to do; all else of its surroundings is checked.

    A model whose weights are elsewhere is checked by the config that is shipped under its name. Raises ConfigError for
    what is wrong wherever the run takes place.
    """
    lacks = list(_model_lacks(config))
    model = read_shape(config.policy.model)
    check_layout(model, config.policy.parallel)
    if config.policy.fp8 is not None and find_spec("transformer_engine") is None:
        lacks.append(
            "policy.fp8 needs Transformer Engine, which is not installed (it needs CUDA): install "
            "transformer-engine[pytorch,core_cu13], or leave policy.fp8 out"
        )
    needed = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    if needed > model.get("max_position_embeddings", needed):
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {needed} is more than the model's "
            f"max_position_embeddings = {model['max_position_embeddings']}"
        )
    if config.judge.enabled and isinstance(config.servers.judge, EndpointSettings):
        config.servers.judge.api_key()
    for role, server in config.started_servers():
        if server.engine == "sglang" and which(server.sglang.python) is None:
            lacks.append(
                f"servers.{role}.sglang.python = {server.sglang.python}: no such program; name the Python of SGLang's "
                "own environment"
            )
        _check_form(f"servers.{role}", server)
        if server.router == "sglang" and find_spec("sglang_router") is None:
            lacks.append(
                f"servers.{role}.router = sglang: sglang-router is not installed; pip install 'megatron-fapo[router]'"
            )
        server.api_key()
        for port in config.server(role).ports():
            _check_port(f"servers.{role}.port", server.host, port)
    for key in ("train", "held_out"):
        source = getattr(config.task, key, None)
        if source is None:
            continue
        rows = Path(source).suffix in (".parquet", ".jsonl", ".json")
        if rows and not Path(source).is_file():
            lacks.append(f"task.{key} = {source}: no such file")
        elif Path(source).is_file() and not rows:
            raise ConfigError(f"task.{key} = {source}: rows are read from .parquet, .jsonl and .json files")
    return lacks


def _check_form(key: str, server: ServerSettings) -> None:
    """Raises ConfigError when the setting and the model's folder do not agree on FP8."""
    kept = kept_by(read_shape(server.model)) if server.quantization is not None or key.endswith("policy") else None
    if server.quantization is not None and kept is None:
        raise ConfigError(
            f"{key}.quantization = fp8, and {server.model} is not: `fapo convert {server.model} --to FOLDER "
            f"--quantize fp8 --tensor {server.sglang.tensor_parallel}` makes a folder that is; name it {key}.model"
        )
    if server.quantization is None and kept is not None:
        raise ConfigError(f"{key}.model = {server.model} is FP8: set {key}.quantization=fp8")


def _model_lacks(config: Config) -> Iterator[str]:
    """Models whose folders are not here. Raises ConfigError when a model is not described in `SHAPES` either."""
    keys: dict[str, list[str]] = {str(config.policy.model): ["policy.model"]}
    for role, server in config.started_servers():
        keys.setdefault(str(Path(server.model)), []).append(f"servers.{role}.model")
    for folder, named in keys.items():
        if not (Path(folder) / "config.json").is_file():
            lack = (
                f"{', '.join(named)} = {folder}: no Hugging Face model there (config.json is missing); "
                f"`hf download OWNER/NAME --local-dir {folder}` fetches one from the hub"
            )
            if shape_file(folder) is None:
                raise ConfigError(lack)
            yield lack


def _check_port(key: str, host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{key}: port {port} on {host} cannot be had ({error.strerror}); 0 picks a free one"
            ) from None
