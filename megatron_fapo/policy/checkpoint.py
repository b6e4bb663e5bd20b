"""Checkpoints of the policy: Megatron's distributed format, a manifest with a sum for every file beside it."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_fapo.batch.layout import Layout
from megatron_fapo.compat.device import Device
from megatron_fapo.compat.megatron_cpu import prepare_adam_for_loading
from megatron_fapo.errors import ResumeError
from megatron_fapo.policy.model import Model

MANIFEST = "manifest.json"
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Optimizer state as one tensor a parameter; Megatron's default for it fails on saving."""


def save(model: Model, folder: Path, updates: int, layout: Layout) -> None:
    """Write everything that the next update depends on. Collective. The manifest comes last."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
    dist.barrier()
    dist_checkpointing.save(_state(model, loading=False, randomness=True), str(folder))
    dist.barrier()
    if dist.get_rank() == 0:
        manifest = {"updates": updates, "layout": _axes(layout), "sums": sums(folder)}
        partial = folder / f".{MANIFEST}"
        partial.write_text(json.dumps(manifest, indent=1))
        partial.rename(folder / MANIFEST)
    dist.barrier()


def load(model: Model, folder: Path, layout: Layout, device: Device) -> int:
    """Put everything back and return the number of optimizer steps done. Collective.

    In another layout the random states are left as they were seeded: no operation of the model draws from them.
    """
    manifest = _together(lambda: check(folder))
    if device.fused_adam:
        prepare_adam_for_loading(model.optimizer)
    same = manifest["layout"] == _axes(layout)
    try:
        found = dist_checkpointing.load(_state(model, loading=True, randomness=same), str(folder))
    except (CheckpointingException, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ResumeError(f"{folder}: cannot be loaded: {error}", rank=dist.get_rank()) from error
    for key, chunk in _chunks(model).items():
        chunk.load_state_dict(found[key])
    flags = [
        {key: group[key] for key in ("fused", "foreach") if key in group} for group in model.optimizer.param_groups
    ]
    model.optimizer.load_state_dict(found["optimizer"])
    for group, kept in zip(model.optimizer.param_groups, flags, strict=True):
        group.update(kept)
    if same:
        torch.set_rng_state(found["random"]["torch"])
        get_cuda_rng_tracker().set_states(found["random"]["streams"])
    return int(manifest["updates"])


def check(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after every file has been read and its sum compared. Raises ResumeError."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        expected = manifest["sums"]
    except FileNotFoundError:
        raise ResumeError(f"{folder}: no complete checkpoint here, {MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{folder / MANIFEST}: damaged: {error!r}") from None
    found = sums(folder)
    for name, value in expected.items():
        if name not in found:
            raise ResumeError(f"{folder / name}: missing; use an earlier checkpoint")
        if found[name] != value:
            raise ResumeError(f"{folder / name}: damaged, its checksum differs; use an earlier checkpoint")
    return manifest


def sums(folder: Path) -> dict[str, str]:
    """xxh3-128 of every file in `folder` but the manifest."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.endswith(MANIFEST))
    return {file.name: _sum(file) for file in files}


def _sum(file: Path) -> str:
    whole = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            whole.update(chunk)
    return str(whole.hexdigest())


def _state(model: Model, loading: bool, randomness: bool) -> dict[str, Any]:
    """The sharded state that Megatron writes, or fills when `loading`."""
    state: dict[str, Any] = {key: chunk.sharded_state_dict() for key, chunk in _chunks(model).items()}
    state["optimizer"] = model.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=SHARDING)
    if randomness:
        own = {"torch": torch.get_rng_state(), "streams": get_cuda_rng_tracker().get_states()}
        state["random"] = ShardedObject("random", own, (dist.get_world_size(),), (dist.get_rank(),))
    return state


def _chunks(model: Model) -> dict[str, Any]:
    """The groups of layers under the keys that Megatron looks for."""
    if len(model.chunks) == 1:
        return {"model": model.chunks[0]}
    return {f"model{place}": chunk for place, chunk in enumerate(model.chunks)}


def _axes(layout: Layout) -> dict[str, int]:
    return {"tp": layout.tp, "pp": layout.pp, "cp": layout.cp, "dp": layout.dp}


def _together(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Let rank 0 look, and hand its answer or its ResumeError to every rank."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [look()]
        except ResumeError as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], ResumeError):
        raise answer[0]
    found: dict[str, Any] = answer[0]
    return found
