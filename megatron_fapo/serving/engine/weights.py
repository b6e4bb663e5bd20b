"""The weights of a running model: read from disk, copied from shared memory, summed, released."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_fapo.compat.memory import bytes_of
from megatron_fapo.compat.weight_group import WeightGroup
from megatron_fapo.delta import Change
from megatron_fapo.errors import BaseDiffers, DataError, RequestRejected, WeightsError
from megatron_fapo.records import Bucket, TensorSpec
from megatron_fapo.serving.engine.model import Model
from megatron_fapo.weights import Bytes, Segment, checksum, copy, digest, shared_memory_folder


def on_disk(folder: Path) -> list[Path]:
    """A folder's safetensors files. Raises DataError when there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder}: no *.safetensors file")
    return files


_COPIERS = min(2, os.cpu_count() or 1)
"""Threads that copy a bucket; nothing is computed meanwhile, and the trainer waits."""


class Weights:
    """The parameters of a model and the updates made to them."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._missing: set[str] = set()
        self._arrived: dict[str, str] = {}
        """Digests of the parameters that the open update has written, computed from the parameters."""
        self._segments: dict[str, Segment] = {}
        """What updates have mapped, two that take turns; kept, since a fresh mapping costs a fault a page."""
        self._pool = ThreadPoolExecutor(_COPIERS)
        self._backup: dict[str, Tensor] | None = None
        self.released = False
        self.usable = False
        """Whether the parameters are a whole model: false before the first load and after a release."""

    @property
    def names(self) -> list[str]:
        """Hugging Face names of all parameters."""
        return list(self._model.parameters)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._model.parameters.values())

    @property
    def resident(self) -> int:
        """Bytes of the parameters' memory now; 0 while it is released."""
        return sum(storage.nbytes() for storage in self._storages())

    def load(self, folder: Path) -> None:
        """An update by all parameters of a folder. Raises as `read` does."""
        self.read(folder)
        self.end()

    def read(self, folder: Path) -> None:
        """Open an update, or go on with the open one, and read all parameters, casting where the dtype differs.

        A folder that does not fit, or is damaged, is refused before the first byte changes. Raises DataError,
        RequestRejected.
        """
        names: dict[Path, list[str]] = {}
        with _readable(folder):
            for path in on_disk(folder):
                with _open_file(path) as file:
                    names[path] = [name for name in file.keys() if not self._is_tied_head(name)]  # noqa: SIM118
                    for name in names[path]:
                        self._target(name, tuple(file.get_slice(name).get_shape()))
            self._refuse_incomplete(set(self._model.parameters).difference(*names.values()))
            self.begin()
            for path, inside in names.items():
                with _open_file(path) as file:  # one at a time: what was read of a file stays mapped until it is closed
                    for name in inside:
                        self._model.parameters[name].copy_(file.get_tensor(name))
        self._missing.clear()

    def begin(self) -> None:
        """Open an update: from now on every parameter has to arrive before `end`."""
        if self.released:
            raise RequestRejected("the weights' memory is released: resume it (tag weights) before an update")
        self._missing = set(self._model.parameters)
        self._arrived.clear()
        self.usable = False

    def copy(self, bucket: Bucket) -> None:
        """Copy a bucket's tensors into the model, verifying each.

        Raises RequestRejected, naming the tensor, when a name, shape or dtype is not the model's, and WeightsError
        when the bucket's segment cannot be read or a tensor's bytes are not those of its digest.
        """
        memory = np.frombuffer(self._open(bucket).memory, np.uint8)
        specs = [spec for spec in bucket.tensors if not self._is_tied_head(spec.name)]
        targets = [self._target(spec.name, spec.shape) for spec in specs]
        self._missing.update(spec.name for spec in specs)
        # Each thread takes the next, the largest first: all end together, and a task a tensor would cost more.
        left = iter(sorted(zip(specs, targets, strict=True), key=lambda pair: -pair[1].nbytes))
        copying = [self._pool.submit(self._copy_each, left, memory) for _ in range(_COPIERS)]
        wait(copying)
        for done in copying:
            done.result()

    def receive(self, specs: Sequence[TensorSpec], group: WeightGroup) -> None:
        """Take broadcast tensors straight into the parameters, verifying each. Raises as `copy` does."""
        pairs = [(spec, self._like(spec)) for spec in specs]
        group.broadcast([tensor for _, tensor in pairs])
        for spec, tensor in pairs:
            if not self._is_tied_head(spec.name):
                self._arrive(spec, digest(bytes_of(tensor)))

    def apply(self, spec: TensorSpec, change: Change) -> None:
        """Overwrite what changed in one parameter, verifying it before and after.

        Raises BaseDiffers when the parameter is not the one that the change was made from, before a byte changes.
        """
        target = self._like(spec)
        if self._is_tied_head(spec.name):
            return
        if digest(bytes_of(target)) != change.base:
            raise BaseDiffers(f"tensor {spec.name!r}: is not what the change was made from; send it in full")
        self._missing.add(spec.name)
        self._arrived.pop(spec.name, None)
        change.apply(np.frombuffer(bytes_of(target), np.uint8))
        self._arrive(spec, digest(bytes_of(target)))

    def end(self) -> None:
        """Close the update. Raises RequestRejected naming parameters that did not arrive; it then stays open."""
        self._refuse_incomplete(self._missing)
        self._model.refresh()
        self.usable = True
        self._arrived.clear()

    def checksum(self) -> str:
        """Over what the model holds now, under Hugging Face names."""
        return checksum(self.digests())

    def digests(self) -> dict[str, str]:
        """{Hugging Face name: digest} of what the model holds now; nobody else writes while an update is open."""
        arrived = self._arrived
        return {
            name: arrived[name] if name in arrived else digest(bytes_of(tensor))
            for name, tensor in self._model.parameters.items()
        }

    def release(self, backup: bool) -> None:
        """Give the parameters' memory back."""
        if backup and self.usable:
            self._backup = {name: tensor.clone() for name, tensor in self._model.parameters.items()}
        for storage in self._storages():
            storage.resize_(0)
        self.released, self.usable = True, False

    def resume(self) -> None:
        """Take the memory again. Without a backup the parameters have to be loaded before they are usable."""
        if not self.released:
            return
        for tensor in self._model.parameters.values():
            needed = (int(tensor.storage_offset()) + tensor.numel()) * tensor.element_size()
            storage = tensor.untyped_storage()
            if storage.nbytes() < needed:
                storage.resize_(needed)
        self.released = False
        if self._backup is not None:
            for name, tensor in self._model.parameters.items():
                tensor.copy_(self._backup[name])
            self._backup, self.usable = None, True
            self._model.refresh()

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        seen = {tensor.untyped_storage().data_ptr(): tensor for tensor in self._model.parameters.values()}
        return (tensor.untyped_storage() for tensor in seen.values())

    def _is_tied_head(self, name: str) -> bool:
        """A tied model has no lm_head of its own; files and trainers may send it along."""
        return name == "lm_head.weight" and "lm_head.weight" not in self._model.parameters

    def _refuse_incomplete(self, missing: set[str]) -> None:
        if missing:
            names = ", ".join(sorted(missing)[:5])
            raise RequestRejected(f"{len(missing)} tensors are missing from the update: {names}")

    def _target(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._model.parameters.get(name)
        if tensor is None:
            raise RequestRejected(f"tensor {name!r}: the model has no parameter of this name")
        if tuple(tensor.shape) != tuple(shape):
            raise RequestRejected(f"tensor {name!r}: has shape {list(shape)}, the model's is {list(tensor.shape)}")
        return tensor

    def _copy_each(self, left: Iterator[tuple[TensorSpec, Tensor]], memory: Bytes) -> None:
        """One thread's share; `left` is every thread's."""
        for spec, target in left:
            self._copy_one(spec, target, memory)

    def _copy_one(self, spec: TensorSpec, target: Tensor, memory: Bytes) -> None:
        _refuse_dtype(spec, target)
        nbytes = target.numel() * target.element_size()
        if spec.offset < 0 or spec.offset % target.element_size() or spec.offset + nbytes > len(memory):
            raise RequestRejected(f"tensor {spec.name!r}: bytes {spec.offset}..{spec.offset + nbytes} leave its bucket")
        self._arrived.pop(spec.name, None)
        self._arrive(spec, copy(memory[spec.offset : spec.offset + nbytes], np.frombuffer(bytes_of(target), np.uint8)))

    def _arrive(self, spec: TensorSpec, found: str) -> None:
        """Note a parameter whose bytes now have the digest `found`."""
        if found != spec.digest:
            raise WeightsError(f"tensor {spec.name!r}: its bytes do not have the digest that its sender computed")
        self._arrived[spec.name] = found
        self._missing.discard(spec.name)

    def _like(self, spec: TensorSpec) -> Tensor:
        """The parameter that a tensor fills; for the head of a tied model, memory that is thrown away."""
        if self._is_tied_head(spec.name):
            return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        target = self._target(spec.name, spec.shape)
        _refuse_dtype(spec, target)
        return target

    def _open(self, bucket: Bucket) -> Segment:
        """The mapped segment of a bucket. A path outside the shared-memory folder is refused."""
        path, folder = Path(bucket.segment), shared_memory_folder()
        if path.parent != folder or not path.name.startswith("fapo-"):
            raise RequestRejected(f"segment {bucket.segment!r}: must be a file named fapo-* in {folder}")
        known = self._segments.get(bucket.segment)
        if known is None or not known.is_still(bucket.nbytes):
            known = self._segments[bucket.segment] = Segment.open(path, bucket.nbytes, whole=True)
        return known


def _refuse_dtype(spec: TensorSpec, target: Tensor) -> None:
    dtype = str(target.dtype).removeprefix("torch.")
    if spec.dtype != dtype:
        raise RequestRejected(f"tensor {spec.name!r}: is {spec.dtype}, the model's is {dtype}")


@contextmanager
def _readable(place: Path) -> Iterator[None]:
    """What cannot be read in here becomes a DataError that names the place."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise DataError(f"{place}: cannot be read: {error}") from None


def _open_file(path: Path) -> safe_open:
    with _readable(path):
        return safe_open(path, framework="pt")
