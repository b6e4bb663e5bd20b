"""Hugging Face folders: weights read one tensor at a time, and written shard by shard as they come."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_fapo.errors import DataError
from megatron_fapo.fp8 import BLOCK
from megatron_fapo.policy.quantize import dequantize

INDEX = "model.safetensors.index.json"

SHARD_BYTES = 5 * 10**9
"""Largest file of weights, as most of the hub's folders have it."""

OF_WEIGHTS = (INDEX, "manifest.json", "metadata.json")
"""What describes the weights of the folder it lies in, and no others."""

COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
"""What a folder holds beside its weights: config, tokenizer, chat template, generation settings."""


DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of the dtypes that weights come in."""

FP8 = "F8_E4M3"
SCALES = ("_scale_inv", "_scale")
"""What follows a matrix's name in the name of its FP8 scales: of blocks, of the whole."""


class Weights:
    """The tensors of a folder by name; nothing is read before it is asked for.

    A matrix in FP8 and its scales are one tensor here: the float32 values that they stand for.
    """

    def __init__(self, folder: Path) -> None:
        """Raises DataError for a folder without safetensors, or whose index names a file that is not there."""
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._files: dict[str, str] = {}
        index = folder / INDEX
        try:
            if index.is_file():
                self._files = dict(json.loads(index.read_text())["weight_map"])
            else:
                for file in sorted(folder.glob("*.safetensors")):
                    self._files |= dict.fromkeys(self._file(file.name).keys(), file.name)
        except (ValueError, KeyError) as error:
            raise DataError(f"{index}: damaged: {error!r}") from error
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        if not self._files:
            raise DataError(
                f"{folder}: no *.safetensors here, so no Hugging Face model (older formats are not read), and no "
                "Megatron checkpoint; of a run name RUN/model or RUN/checkpoints/step-N"
            )
        self._scales = {
            name: name + ending for name in self._files for ending in SCALES if name + ending in self._files
        }

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._files) - frozenset(self._scales.values())

    def in_order(self) -> list[str]:
        """Names of all tensors, those of one file one after the other."""
        return sorted(self.names, key=lambda name: (self._files[name], name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, from the file's header."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype, from the file's header; BF16 for one in FP8. Raises DataError for one that no weight here has."""
        stored = self._handle(name).get_slice(name).get_dtype()
        if stored == FP8 and name in self._scales:
            return torch.bfloat16
        if stored not in DTYPES:
            raise DataError(
                f"{self.folder}: {name} is stored as {stored}; supported: {', '.join(DTYPES)}, and {FP8} with scales"
            )
        return DTYPES[stored]

    def read(self, name: str) -> torch.Tensor:
        """A tensor. Raises DataError naming the file when it is missing or damaged."""
        values, scale = self._read(name), self.scale(name)
        if scale is None:
            return values
        blocks = tuple(-(-side // BLOCK) for side in values.shape)
        if scale.numel() != 1 and tuple(scale.shape) != blocks:
            raise DataError(
                f"{self.folder}: {self._scales[name]} has shape {list(scale.shape)}; supported: one scale, or one for "
                f"each block of {BLOCK} x {BLOCK}"
            )
        return dequantize(values, scale)

    def scale(self, name: str) -> torch.Tensor | None:
        """The scales of a matrix in FP8; None for any other tensor."""
        return self._read(self._scales[name]) if name in self._scales else None

    def _read(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._handle(name).get_tensor(name)
        except SafetensorError as error:
            raise DataError(f"{self.folder / self._files[name]}: {name} cannot be read: {error}") from error
        return tensor

    def check(self, expected: Mapping[str, tuple[int, ...]], unused: Iterable[str] = ()) -> None:
        """Compare with the names and shapes that a model consists of; `unused` may be there in addition.

        Raises DataError naming the first tensor that is missing, has no place, or has another shape.
        """
        if extra := sorted(self.names - expected.keys() - set(unused)):
            raise DataError(f"{self.folder}: {len(extra)} tensors have no place in the model, the first is {extra[0]}")
        if missing := sorted(expected.keys() - self.names):
            raise DataError(f"{self.folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
        for name, shape in expected.items():
            if (found := self.shape(name)) != shape:
                raise DataError(f"{self.folder}: {name} has shape {list(found)}, its config asks for {list(shape)}")

    def _handle(self, name: str) -> Any:
        if name not in self._files:
            raise DataError(f"{self.folder}: tensor {name} is missing")
        return self._file(self._files[name])

    def _file(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise DataError(f"{self.folder / file}: cannot be read: {error}") from error
        return self._open[file]


class Writer:
    """Writes a folder beside its final place; `close` renames it, so that a folder is whole or absent.

    Holds the tensors of one file at a time. Names of files are those of transformers: one `model.safetensors`, or
    `model-00001-of-00003.safetensors` and an index.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.partial = partial_of(folder)
        self._shard_bytes = shard_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = self._total = 0
        self._shards: list[tuple[str, ...]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; it is copied, unless it is alone in its memory, and then must not change before `close`."""
        size = tensor.numel() * tensor.itemsize
        if self._held and self._held_bytes + size > self._shard_bytes:
            self._write()
        alone = tensor.is_cpu and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == size
        whole = tensor.detach()
        self._held[name] = whole if alone else torch.empty(tensor.shape, dtype=tensor.dtype).copy_(whole)
        self._held_bytes += size
        self._total += size

    def close(self, companions: Path | None = None, **config_changes: Any) -> None:
        """Write what is held, name the files, carry the other files of `companions` along, put the folder in place.

        `config_changes` replace keys of the carried config.json: `quantization_config` belongs to FP8 weights.
        """
        self._write()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._unnamed(number).rename(self.partial / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.partial / INDEX).write_text(json.dumps(index, indent=2))
        if companions is not None:
            carry_along(companions, self.partial, **config_changes)
        put_in_place(self.partial, self.folder)

    def _write(self) -> None:
        if self._held:
            self._shards.append(tuple(self._held))
            shard = self._unnamed(len(self._shards))
            save_file(self._held, shard, metadata={"format": "pt"})
            shard.chmod(self.partial.stat().st_mode & 0o666)  # safetensors lets nobody else read what it writes
            self._held, self._held_bytes = {}, 0

    def _unnamed(self, number: int) -> Path:
        return self.partial / f".shard-{number}"


def partial_of(folder: Path) -> Path:
    """A fresh folder beside `folder`, to be filled and then renamed by `put_in_place`."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def put_in_place(partial: Path, folder: Path) -> None:
    """Give a finished folder its name, replacing one of the same name."""
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def carry_along(source: Path, target: Path, **config_changes: Any) -> None:
    """Copy config, tokenizer, chat template and generation settings.

    What the config says of the source's own quantisation does not go along; it is of weights that stay behind.
    """
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in OF_WEIGHTS:
                shutil.copy(file, target / file.name)
    path = target / "config.json"
    if config_changes or path.is_file():
        config = json.loads(path.read_text())
        changed = {key: value for key, value in config.items() if key != "quantization_config"} | config_changes
        if changed != config:
            path.write_text(json.dumps(changed, indent=2) + "\n")
