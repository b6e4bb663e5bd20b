"""Weights in Megatron's checkpoint format, parameter by parameter: written from anywhere, read at any layout.

`dist_checkpointing` saves what is in memory and loads it through all ranks together. Here one parameter is in memory
at a time: Megatron says under which key and at which place of the whole it stores a parameter, and torch's planner
interface moves just that. A checkpoint that a run saved reads the same way; its optimizer is passed over.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_fapo import manifest
from megatron_fapo.errors import CheckpointDamaged, DataError

Convert = Callable[[str], torch.Tensor]
"""From a parameter's name in the module to its values."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a parameter and its place in the checkpoint."""

    key: str
    data: torch.Tensor
    """A view of the parameter, with an axis of 1 for each axis that Megatron puts in front (layers)."""
    offset: tuple[int, ...]
    whole: tuple[int, ...]
    """Shape of the tensor under `key`."""
    may_differ: bool
    """Whether the checkpoint's tensor may have another size: the padded vocabulary."""

    @property
    def place(self) -> ChunkStorageMetadata:
        """As torch describes it."""
        return ChunkStorageMetadata(offsets=torch.Size(self.offset), sizes=self.data.shape)


def entries(chunk: Any) -> dict[str, Any]:
    """How Megatron stores each parameter of a module, by its name there."""
    state = chunk.sharded_state_dict()
    return {name: state[name] for name, _ in chunk.named_parameters()}


def parts(entry: Any, data: torch.Tensor) -> list[Part]:
    """The stretches that a parameter with these values consists of: two where gate and up are stored apart."""
    if isinstance(entry, ShardedTensorFactory):
        tensors = list(nested_values(entry.build_fn(entry.key, data, entry.replica_id, entry.flattened_range)))
    else:
        tensors = [replace(entry, data=data, dtype=data.dtype)]  # the entry outlives the values
    found = []
    for tensor in tensors:
        assert isinstance(tensor, ShardedTensor)
        view = tensor.data.detach()
        found.append(
            Part(
                key=tensor.key,
                data=view.view((1,) * tensor.prepend_axis_num + view.shape),
                offset=tuple(tensor.global_offset),
                whole=tuple(tensor.global_shape),
                may_differ=bool(tensor.allow_shape_mismatch),
            )
        )
    return found


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a Megatron checkpoint."""
    return (folder / ".metadata").is_file() and (folder / COMMON_STATE_FNAME).is_file()


# --- writing ------------------------------------------------------------------------------------------------


class _Stream(DefaultSavePlanner):
    """Plans from names and shapes, and asks for a parameter's values when its turn comes."""

    def __init__(self, chunk: Any, dtypes: Mapping[str, torch.dtype], convert: Convert) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._entries = entries(chunk)
        self._convert = convert
        self._held: tuple[str, list[Part]] = ("", [])
        self._sources: dict[MetadataIndex, tuple[str, int]] = {}
        self._items: list[WriteItem] = []
        for name, param in chunk.named_parameters():
            meta = torch.empty(param.shape, dtype=dtypes[name], device="meta")
            for number, part in enumerate(parts(self._entries[name], meta)):
                index = MetadataIndex(part.key, part.place.offsets)
                self._sources[index] = (name, number)
                properties = TensorProperties(dtype=part.data.dtype)
                data = TensorWriteData(chunk=part.place, properties=properties, size=torch.Size(part.whole))
                self._items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))

    def create_local_plan(self) -> SavePlan:
        """All parameters in the order of the module."""
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The values of one stretch; the parameter before is forgotten."""
        name, number = self._sources[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        if self._held[0] != name:
            self._held = ("", [])
            self._held = (name, parts(self._entries[name], self._convert(name)))
        return self._held[1][number].data


def write(folder: Path, chunk: Any, dtypes: Mapping[str, torch.dtype], convert: Convert) -> None:
    """Write the parameters of a whole model's module, taking each from `convert` in its turn.

    `folder` exists; the manifest comes last. The module may have no memory (meta device).
    """
    save({}, storage_writer=FileSystemWriter(folder), planner=_Stream(chunk, dtypes, convert), no_dist=True)
    torch.save({}, folder / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    files = {file.name: manifest.file_sum(file) for file in sorted(folder.iterdir()) if file.name != manifest.MANIFEST}
    manifest.write(folder, manifest.Manifest(updates=0, layout={}, files=files))


# --- reading ------------------------------------------------------------------------------------------------


class _Fetch(DefaultLoadPlanner):
    """Reads the stretches of one parameter into its memory."""

    def __init__(self, wanted: Sequence[Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._wanted = {(part.key, part.place.offsets): part for part in wanted}

    def create_local_plan(self) -> LoadPlan:
        """What the checkpoint has of them."""
        assert self.metadata is not None
        items = []
        for part in self._wanted.values():
            stored = self.metadata.state_dict_metadata[part.key]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(part.key, stored, [part.place])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        """Where one stored piece goes."""
        part = self._wanted[read_item.dest_index.fqn, read_item.dest_index.offset]
        target = part.data
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        """It was read into place."""


class Checkpoint:
    """The weights of a checkpoint, whatever the layout that wrote it."""

    def __init__(self, folder: Path) -> None:
        """Compares the sizes of all files. Raises CheckpointDamaged."""
        self.folder = folder
        manifest.read(folder)
        try:
            self._reader = FileSystemReader(folder)
            self._metadata: Metadata = self._reader.read_metadata()
        except Exception as error:  # unpickling a damaged file raises whatever it happens to meet
            raise CheckpointDamaged(f"{folder / '.metadata'}: cannot be read: {error}") from error

    def check_sums(self, rank: int = 0, world: int = 1) -> None:
        """Compare the sums of this rank's share of the files. Raises CheckpointDamaged."""
        found = manifest.read(self.folder)
        manifest.compare_sums(self.folder, found, sorted(found.files)[rank::world])

    def dtype(self, entry: Any) -> torch.dtype:
        """The dtype that a parameter is stored in."""
        dtype: torch.dtype = self._stored(entry.key).properties.dtype
        return dtype

    def read(self, entry: Any, data: torch.Tensor) -> None:
        """Fill a parameter's memory. Raises DataError when the checkpoint is of another model."""
        wanted = parts(entry, data)
        for part in wanted:
            if part.data.untyped_storage().data_ptr() != data.untyped_storage().data_ptr():
                raise DataError(f"{part.key}: Megatron stores a copy of it, which cannot be read in place")
            stored = tuple(self._stored(part.key).size)
            if stored != part.whole and not (part.may_differ and stored[1:] == part.whole[1:]):
                raise DataError(
                    f"{self.folder}: {part.key} has shape {list(stored)}, the model asks for {list(part.whole)}"
                )
            if part.may_differ:
                part.data.zero_()
        load({}, storage_reader=self._reader, planner=_Fetch(wanted), no_dist=True)

    def _stored(self, key: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise DataError(f"{self.folder}: the checkpoint has no tensor {key}: is it of another model?")
        return stored

    @torch.no_grad()
    def load(self, chunks: Sequence[Any]) -> None:
        """Fill this rank's modules, each parameter with what this rank holds of it."""
        self.check_sums(dist.get_rank(), dist.get_world_size())
        for param, entry in each(chunks):
            self.read(entry, param.detach())


def each(chunks: Sequence[Any]) -> Iterator[tuple[torch.Tensor, Any]]:
    """Parameters of modules, with how Megatron stores them."""
    for chunk in chunks:
        stored = entries(chunk)
        for name, param in chunk.named_parameters():
            yield param, stored[name]
