"""Runs inside SGLang's processes: copies a bucket from shared memory into SGLang's model.

SGLang calls `load` as its `--custom-weight-loader` for every /update_weights_from_tensor with
`load_format: "fapo_weights.load"`, once on each tensor-parallel rank; each takes its own shard. SGLang's environment
does not have this package, so the module stands alone: torch and the standard library.

Nothing is verified here. What arrived is proven afterwards, by SGLang's own checker over its own parameters.
"""

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
        model.load_weights(_tensors(json.loads(table)))


def _tensors(bucket: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    memory = _mapped(Path(bucket["segment"]), bucket["nbytes"])
    for spec in bucket["tensors"]:
        dtype, shape = getattr(torch, spec["dtype"]), spec["shape"]
        flat = torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=spec["offset"])
        yield spec["name"], flat.view(shape)


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
