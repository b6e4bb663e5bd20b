"""Runs inside SGLang's processes: copies a bucket from shared memory, or a GPU's memory, into SGLang's model.

SGLang calls `load` as its `--custom-weight-loader` for every /update_weights_from_tensor with
`load_format: "fapo_weights.load"`, once on each tensor-parallel rank; each takes its own shard. SGLang's environment
does not have this package, so the module stands alone: torch, the standard library, and the one file of the package
that stands alone as well, by its path.

Nothing is verified here. What arrived is proven afterwards, by SGLang's own checker over its own parameters.
"""

import importlib.util
import json
import mmap
import os
import stat
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch


def load(model: Any, named: list[tuple[str, Any]]) -> None:
    """Load each table of contents (`records.Bucket` as JSON) that travels as the name of an empty tensor."""
    for table, _ in named:
        bucket = json.loads(table)
        segment, nbytes = bucket["segment"], bucket["nbytes"]
        if segment.startswith(cuda_ipc.PREFIX):
            with cuda_ipc.opened(segment, nbytes) as memory:
                model.load_weights(_tensors(bucket, memory))
        else:
            model.load_weights(_tensors(bucket, torch.frombuffer(_mapped(Path(segment), nbytes), dtype=torch.uint8)))


def _tensors(bucket: dict[str, Any], memory: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in bucket["tensors"]:
        dtype, shape, offset = getattr(torch, spec["dtype"]), spec["shape"], spec["offset"]
        yield spec["name"], memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _load_cuda_ipc() -> Any:
    path = Path(__file__).parents[3] / "compat" / "cuda_ipc.py"
    spec = importlib.util.spec_from_file_location("fapo_cuda_ipc", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_ipc = _load_cuda_ipc()


def _mapped(path: Path, nbytes: int) -> mmap.mmap:
    """A segment; only regular files of this user that are named as segments are."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and path.name.startswith("fapo-")
        if not own or status.st_size < nbytes:
            raise ValueError(f"segment {path}: not a segment of this user with {nbytes} bytes")
        return mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)
