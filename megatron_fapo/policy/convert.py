"""Hugging Face folders into Megatron checkpoints and back, one parameter in memory at a time.

Both ways build the whole model on the meta device, for its names and places, and move the values piece by piece. The
result appears under its name when it is complete.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fapo.compat.device import current  # before torch and megatron

import torch  # isort: skip

from megatron_fapo.errors import ConfigError, DataError
from megatron_fapo.fp8 import Fp8, Scales, Shape, plan
from megatron_fapo.policy import megatron_folder, pieces
from megatron_fapo.policy.hf_folder import SHARD_BYTES, Weights, Writer, carry_along, partial_of, put_in_place
from megatron_fapo.policy.model import assemble
from megatron_fapo.policy.quantize import allowed, quantize
from megatron_fapo.policy.settings import ParallelSettings, PolicySettings
from megatron_fapo.policy.shapes import pretending, read_config, without_memory

log = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"
"""The tensor whose dtype config.json names."""

Progress = Callable[[int, int], None]
"""Called with the bytes moved so far, and all of them."""


def _silent(done: int, total: int) -> None:
    """No progress is shown."""


def to_megatron(source: Path, target: Path, progress: Progress = _silent) -> None:
    """A Megatron checkpoint of a Hugging Face folder's weights, config and tokenizer beside it.

    `policy.model` may name it at any layout. Raises DataError for a folder that is not what its config says,
    ConfigError for a model that has no counterpart here.
    """
    weights = Weights(source)
    with pretending(0, ParallelSettings()):
        bridge, chunk = without_memory(read_config(source / "config.json"), ParallelSettings())
        weights.check(pieces.shapes(pieces.own_pieces(bridge, [chunk])), unused=pieces.tied(bridge))
        names = bridge.names(chunk)
        dtypes = {local: weights.dtype(bridge.sources(name)[0]) for local, name in names.items()}
        sizes = {local: param.numel() * dtypes[local].itemsize for local, param in chunk.named_parameters()}
        done = 0

        def convert(local: str) -> torch.Tensor:
            nonlocal done
            whole: torch.Tensor = bridge.from_hugging_face(names[local], weights.read).to(dtypes[local]).contiguous()
            done += sizes[local]
            progress(done, sum(sizes.values()))
            return whole

        partial = partial_of(target)
        megatron_folder.write(partial, chunk, dtypes, convert)
    carry_along(source, partial)
    put_in_place(partial, target)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """A model's weights under Hugging Face names, whichever kind of folder they lie in."""

    companions: Path
    """The folder with the config and all else that goes with them."""
    hf_config: Any
    shapes: dict[str, Shape]
    nbytes: int
    each: Iterator[tuple[str, torch.Tensor]]
    """Read one after the other; the one before may be forgotten."""


@contextmanager
def opened(source: Path, like: Path | None = None) -> Iterator[Tensors]:
    """The weights of a Hugging Face folder, or of a Megatron checkpoint whatever layout wrote it.

    `like` is the folder with what goes with them; None takes what lies in `source`. Raises DataError when there is
    none or when it is of another model, CheckpointDamaged.
    """
    companions = source if like is None else like
    if not (companions / "config.json").is_file():
        raise DataError(f"{companions}: config.json is missing: name the model's Hugging Face folder (--like)")
    checkpoint = megatron_folder.Checkpoint(source) if megatron_folder.is_checkpoint(source) else None
    if checkpoint is not None:
        checkpoint.check_sums()
    with pretending(0, ParallelSettings()):
        hf_config = read_config(companions / "config.json")
        bridge, chunk = without_memory(hf_config, ParallelSettings())
        shapes = pieces.shapes(pieces.own_pieces(bridge, [chunk]))
        if checkpoint is None:
            weights = Weights(source)
            weights.check(shapes, unused=pieces.tied(bridge))
            nbytes = sum(torch.Size(shape).numel() * weights.dtype(name).itemsize for name, shape in shapes.items())
            each: Iterator[tuple[str, torch.Tensor]] = (
                (name, weights.read(name).to(weights.dtype(name))) for name in weights.in_order() if name in shapes
            )
        else:
            stored = megatron_folder.entries(chunk)
            dtypes = {name: checkpoint.dtype(entry) for name, entry in stored.items()}
            nbytes = sum(param.numel() * dtypes[name].itemsize for name, param in chunk.named_parameters())
            each = _of_checkpoint(checkpoint, bridge, chunk, stored)
        yield Tensors(companions=companions, hf_config=hf_config, shapes=shapes, nbytes=nbytes, each=each)


def _of_checkpoint(
    checkpoint: megatron_folder.Checkpoint, bridge: Any, chunk: Any, stored: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    names = bridge.names(chunk)
    for local, param in chunk.named_parameters():
        values = torch.empty(param.shape, dtype=checkpoint.dtype(stored[local]))
        checkpoint.read(stored[local], values)
        yield from bridge.to_hugging_face(names[local], [values], None)


@torch.no_grad()
def to_hugging_face(
    source: Path,
    target: Path,
    like: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = _silent,
    scales: Scales | None = None,
    served_by: int = 1,
) -> Fp8 | None:
    """A Hugging Face folder of the weights of a Megatron checkpoint, or of another Hugging Face folder; see `opened`.

    `scales` asks for FP8 as SGLang serves it on `served_by` ranks, and for BF16 in what stays; returned is what was
    quantised. Raises ConfigError when nothing of the model can be.
    """
    done = 0
    with opened(source, like) as weights:
        heads = weights.hf_config.num_key_value_heads
        fp8 = None if scales is None else plan(weights.shapes, scales, served_by, heads)
        if fp8 is not None and not fp8.matrices:
            raise ConfigError(f"{source}: no matrix has a size that SGLang takes in FP8 ({scales}, {served_by} ranks)")
        writer = Writer(target, shard_bytes)
        dtype = torch.bfloat16
        for name, tensor in weights.each:
            for part in [(name, tensor)] if fp8 is None else quantize(fp8, name, tensor):
                writer.add(*part)
            if name == EMBEDDING and fp8 is None:
                dtype = tensor.dtype
            done += tensor.nbytes
            progress(done, weights.nbytes)
    changes: dict[str, Any] = {} if fp8 is None else {"quantization_config": fp8.config()}
    writer.close(weights.companions, dtype=str(dtype).removeprefix("torch."), **changes)
    return fp8


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Error:
    """What FP8 made of a model's weights."""

    root_mean_square: float
    """Of the differences of all quantised values, relative to that of the values."""
    worst: float
    """The largest difference of a value, relative to the largest that e4m3's rounding allows it."""
    logits: float
    """The largest difference of logits on fixed prompts, both models in float32."""
    largest_logit: float


@torch.no_grad()
def fp8_error(source: Path, folder: Path, like: Path | None = None) -> Fp8Error:
    """Compare an FP8 folder with the weights that it was made of: value by value, and by logits.

    One tensor is in memory at a time for the first, one model for the second. Raises DataError for a tensor that was
    not to be quantised and is not its BF16 rounding.
    """
    quantized = Weights(folder)
    worst = errors = values = 0.0
    with opened(source, like) as weights:
        for name, tensor in weights.each:
            expected, found, scale = tensor.float(), quantized.read(name), quantized.scale(name)
            if scale is None:
                if not torch.equal(found, tensor.to(found.dtype)):
                    raise DataError(f"{folder}: {name} is not what it is in {source}")
                continue
            error = (found - expected).abs()
            worst = max(worst, float((error / allowed(expected, scale)).max()))
            errors += float(error.double().square().sum())
            values += float(expected.double().square().sum())
    tokens = _prompts(weights.hf_config)
    before, after = (_by_megatron(weights.hf_config, place, tokens) for place in (source, folder))
    return Fp8Error(
        root_mean_square=(errors / values) ** 0.5,
        worst=worst,
        logits=float((after - before).abs().max()),
        largest_logit=float(before.abs().max()),
    )


def difference(folder: Path, checkpoint: Path) -> tuple[float, float]:
    """Largest difference of two models' logits on fixed prompts in float32, and the largest logit.

    The model of a Hugging Face folder by transformers, that of a Megatron checkpoint by Megatron; both in memory, one
    after the other.
    """
    from transformers import AutoModelForCausalLM

    hf_config = read_config(folder / "config.json")
    tokens = _prompts(hf_config)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    found = _by_megatron(hf_config, checkpoint, tokens)
    return float((found - expected).abs().max()), float(expected.abs().max())


def _prompts(hf_config: Any) -> torch.Tensor:
    return torch.randint(hf_config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _by_megatron(hf_config: Any, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [prompts, tokens, vocabulary] in float32 of the weights of either kind of folder."""
    device = current()
    device.install()
    settings = PolicySettings(model=folder, dtype="float32")
    with pretending(0, ParallelSettings()), device.active():
        bridge, (chunk,) = assemble(hf_config, settings, device)
        chunk.to(device.torch_device())
        if megatron_folder.is_checkpoint(folder):
            megatron_folder.Checkpoint(folder).load([chunk])
        else:
            pieces.load(bridge, [chunk], Weights(folder))
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        found: Any = chunk(tokens.to(device.torch_device()), places.to(device.torch_device()), None)
    return torch.as_tensor(found.cpu()[..., : hf_config.vocab_size])
