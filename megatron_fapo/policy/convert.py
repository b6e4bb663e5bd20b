"""Hugging Face folders into Megatron checkpoints and back, one parameter in memory at a time.

Both ways build the whole model on the meta device, for its names and places, and move the values piece by piece. The
result appears under its name when it is complete.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fapo.compat.device import current  # before torch and megatron

import torch  # isort: skip

from megatron_fapo.errors import DataError
from megatron_fapo.policy import megatron_folder, pieces
from megatron_fapo.policy.hf_folder import SHARD_BYTES, Weights, Writer, carry_along, partial_of, put_in_place
from megatron_fapo.policy.model import assemble
from megatron_fapo.policy.settings import ParallelSettings, PolicySettings
from megatron_fapo.policy.shapes import pretending, read_config, without_memory

log = logging.getLogger(__name__)

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
            whole: torch.Tensor = bridge.from_hugging_face(names[local], weights.read).contiguous()
            done += sizes[local]
            progress(done, sum(sizes.values()))
            return whole

        partial = partial_of(target)
        megatron_folder.write(partial, chunk, dtypes, convert)
    carry_along(source, partial)
    put_in_place(partial, target)


@torch.no_grad()
def to_hugging_face(
    source: Path, target: Path, like: Path | None = None, shard_bytes: int = SHARD_BYTES, progress: Progress = _silent
) -> None:
    """A Hugging Face folder of a Megatron checkpoint's weights, whatever layout wrote them.

    `like` is the folder whose config, tokenizer, chat template and generation settings go with them; None takes those
    that lie in `source`. Raises DataError when there are none or when they are of another model, CheckpointDamaged.
    """
    companions = source if like is None else like
    if not (companions / "config.json").is_file():
        raise DataError(f"{companions}: config.json is missing: name the model's Hugging Face folder (--like)")
    checkpoint = megatron_folder.Checkpoint(source)
    checkpoint.check_sums()
    writer = Writer(target, shard_bytes)
    with pretending(0, ParallelSettings()):
        bridge, chunk = without_memory(read_config(companions / "config.json"), ParallelSettings())
        names, stored = bridge.names(chunk), megatron_folder.entries(chunk)
        dtypes = {local: checkpoint.dtype(stored[local]) for local in names}
        total = sum(param.numel() * dtypes[local].itemsize for local, param in chunk.named_parameters())
        done = 0
        for local, param in chunk.named_parameters():
            values = torch.empty(param.shape, dtype=dtypes[local])
            checkpoint.read(stored[local], values)
            for name, tensor in bridge.to_hugging_face(names[local], [values], None):
                writer.add(name, tensor)
            done += values.numel() * values.itemsize
            progress(done, total)
    writer.close(companions, dtype=str(dtypes["embedding.word_embeddings.weight"]).removeprefix("torch."))


@torch.no_grad()
def difference(folder: Path, checkpoint: Path) -> tuple[float, float]:
    """Largest difference of two models' logits on fixed prompts in float32, and the largest logit.

    The model of a Hugging Face folder by transformers, that of a Megatron checkpoint by Megatron; both in memory, one
    after the other.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(folder / "config.json")
    tokens = torch.randint(config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    device = current()
    device.install()
    settings = PolicySettings(model=folder, dtype="float32")
    with pretending(0, ParallelSettings()), device.active():
        _, (chunk,) = assemble(config, settings, device)
        chunk.to(device.torch_device())
        megatron_folder.Checkpoint(checkpoint).load([chunk])
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        found: Any = chunk(tokens.to(device.torch_device()), places.to(device.torch_device()), None)
    found = found.cpu()[..., : config.vocab_size]
    return float((found - expected).abs().max()), float(expected.abs().max())
