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

INDEX = "model.safetensors.index.json"

SHARD_BYTES = 5 * 10**9
"""Largest file of weights, as most of the hub's folders have it."""

OF_WEIGHTS = (INDEX, "manifest.json", "metadata.json")
"""What describes the weights of the folder it lies in, and no others."""

COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
"""What a folder holds beside its weights: config, tokenizer, chat template, generation settings."""


DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of the dtypes that weights come in; FP8 weights have scales beside them, which are not read."""


class Weights:
    """The tensors of a folder by name; nothing is read before it is asked for."""

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
        if not self._files:
            raise DataError(f"{folder}: no *.safetensors here; older formats are not read")

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, from the file's header."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype, from the file's header. Raises DataError for one that no weight here has."""
        stored = self._handle(name).get_slice(name).get_dtype()
        if stored not in DTYPES:
            raise DataError(f"{self.folder}: {name} is stored as {stored}; supported: {', '.join(DTYPES)}")
        return DTYPES[stored]

    def read(self, name: str) -> torch.Tensor:
        """A tensor. Raises DataError naming the file when it is missing or damaged."""
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
        """Take a tensor; it is copied."""
        size = tensor.numel() * tensor.itemsize
        if self._held and self._held_bytes + size > self._shard_bytes:
            self._write()
        self._held[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        self._held_bytes += size
        self._total += size

    def close(self, companions: Path | None = None, **config_changes: Any) -> None:
        """Write what is held, name the files, carry the other files of `companions` along, put the folder in place.

        `config_changes` replace keys of the carried config.json.
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
            save_file(self._held, self._unnamed(len(self._shards)), metadata={"format": "pt"})
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
    """Copy config, tokenizer, chat template and generation settings."""
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in OF_WEIGHTS:
                shutil.copy(file, target / file.name)
    if config_changes:
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | config_changes, indent=2) + "\n")
