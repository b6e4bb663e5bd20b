"""Checkpoints of the policy: Megatron's distributed format, written while training or generation goes on.

`begin` copies what the next update would change and returns; a thread of each rank writes that rank's share and
takes a sum of each file; `end`, when all ranks have `written`, collects the sums into the manifest, which comes
last. Every rank calls `begin`, `end` and `load`; `written` each may ask alone.
"""

import logging
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_fapo import manifest
from megatron_fapo.batch.layout import Layout
from megatron_fapo.compat import checkpoint_files
from megatron_fapo.compat.device import Device
from megatron_fapo.compat.megatron_cpu import initialize_adam
from megatron_fapo.errors import CheckpointDamaged, PolicyError, ResumeError
from megatron_fapo.manifest import FileSum, Manifest
from megatron_fapo.policy.model import Model

log = logging.getLogger(__name__)

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""Optimizer state as one tensor a parameter, under a name that does not depend on how Megatron splits its optimizer
(experts have one of their own where they are spread): any layout can load it. Megatron's default fails on saving."""


class _Running:
    """A rank's files on their way to disk."""

    def __init__(self, request: checkpoint_files.SaveRequest, folder: Path, updates: int) -> None:
        self.request, self.folder, self.updates = request, folder, updates
        self.sums: dict[str, FileSum] = {}
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._write, name="checkpoint-writer")
        self.thread.start()

    def _write(self) -> None:
        started = time.perf_counter()
        try:
            self.request.write()
            self.sums = {file.name: manifest.file_sum(file) for file in self.request.files if file.exists()}
        except Exception as error:  # noqa: BLE001 - whatever it is, `end` raises it on every rank
            self.error = error
        log.info("%s: %d files in %.1f s", self.folder, len(self.sums), time.perf_counter() - started)


class Checkpoints:
    """Saving and loading one rank's part of the policy. At most one save runs at a time."""

    def __init__(self, model: Model, layout: Layout, device: Device) -> None:
        self._model, self._layout, self._device = model, layout, device
        self._strategy: Any = None
        self._running: _Running | None = None

    def begin(self, folder: Path, updates: int) -> None:
        """Copy everything that the next update depends on and start writing it. Collective."""
        if self._running is not None:
            raise PolicyError(f"a save into {self._running.folder} is running: end_save() comes first")
        if self._strategy is None:
            self._strategy = checkpoint_files.save_strategy(_sharers())
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.iterdir():
                file.unlink()
        dist.barrier()
        state = self._state(loading=False, randomness=True)
        request = checkpoint_files.begin_save(state, folder, self._strategy)
        self._running = _Running(request, folder, updates)

    def written(self) -> bool:
        """Whether this rank's files are on disk, or could not be written."""
        return self._running is None or not self._running.thread.is_alive()

    def end(self) -> None:
        """Wait for all ranks' files, then make the folder a checkpoint. Collective. Raises PolicyError."""
        running, self._running = self._running, None
        if running is None:
            raise PolicyError("no save is running: begin_save() comes first")
        running.thread.join()
        _raise_together(running.folder, running.error)
        try:
            running.request.finalize()
        except CheckpointException as error:
            raise PolicyError(f"{running.folder}: could not be written: {error}", rank=dist.get_rank()) from error
        everyones: list[dict[str, FileSum]] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(running.sums, everyones, dst=0)
        if everyones is not None:
            self._write_manifest(running, {name: found for sums in everyones for name, found in sums.items()})
        dist.barrier()

    def _write_manifest(self, running: _Running, sums: dict[str, FileSum]) -> None:
        """The ranks' sums, and those of the few small files that Megatron writes on rank 0."""
        for file in running.folder.iterdir():
            if file.name not in sums:
                manifest.sync_file(file)
                sums[file.name] = manifest.file_sum(file)
        found = Manifest(updates=running.updates, layout=_axes(self._layout), files=dict(sorted(sums.items())))
        manifest.write(running.folder, found)
        try:
            manifest.read(running.folder)
        except CheckpointDamaged as error:
            raise PolicyError(f"{error}; do all ranks write to a file system that they share?", rank=0) from None

    def abandon(self) -> None:
        """Forget a save that runs; its folder never becomes a checkpoint."""
        if self._running is not None:
            self._running.thread.join()
            self._running = None

    def load(self, folder: Path) -> int:
        """Put everything back and return the number of optimizer steps done. Collective.

        In another layout the random states are left as they were seeded: no operation of the model draws from them.
        """
        found = check(folder)
        same = dict(found.layout) == _axes(self._layout)
        state = self._state(loading=True, randomness=same)
        groups = [part["optimizer"] for part in _parts(state["optimizer"]) if "param_state" in part]
        strategy = checkpoint_files.load_strategy(_sharers())
        try:
            loaded = dist_checkpointing.load(state, str(folder), sharded_strategy=strategy)
        except (CheckpointingException, CheckpointException, OSError, RuntimeError, pickle.UnpicklingError) as error:
            said = " ".join(str(error).split())[-600:]
            raise ResumeError(
                f"{folder}: does not fit this model and optimizer: {said}", rank=dist.get_rank()
            ) from error
        if groups:  # only Megatron's distributed optimizer goes from one split to another
            loaded["optimizer"] = _as_split_here(loaded["optimizer"], groups)
        self._put_back(loaded)
        if same:
            torch.set_rng_state(loaded["random"]["torch"])
            get_cuda_rng_tracker().set_states(loaded["random"]["streams"])
        return found.updates

    def _state(self, loading: bool, randomness: bool) -> dict[str, Any]:
        """The sharded state that Megatron writes, or fills when `loading`."""
        model = self._model
        if self._device.fused_adam:
            initialize_adam(model.optimizer)
        state: dict[str, Any] = {key: chunk.sharded_state_dict() for key, chunk in _chunks(model).items()}
        state["optimizer"] = model.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=SHARDING)
        if randomness:
            own = {"torch": torch.get_rng_state(), "streams": get_cuda_rng_tracker().get_states()}
            state["random"] = ShardedObject("random", own, (dist.get_world_size(),), (dist.get_rank(),))
        return state

    def _put_back(self, loaded: dict[str, Any]) -> None:
        optimizer = self._model.optimizer
        for key, chunk in _chunks(self._model).items():
            chunk.load_state_dict(loaded[key])
        flags = [{key: group[key] for key in ("fused", "foreach") if key in group} for group in optimizer.param_groups]
        optimizer.load_state_dict(loaded["optimizer"])
        for group, kept in zip(optimizer.param_groups, flags, strict=True):
            group.update(kept)


def check(folder: Path) -> Manifest:
    """The manifest, after every file's sum was compared: each rank reads a share, all hear of the first damage.

    Collective where ranks are connected. Raises CheckpointDamaged.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found, damage = None, None
    try:
        found = manifest.read(folder)
        manifest.compare_sums(folder, found, sorted(found.files)[rank::world])
    except CheckpointDamaged as error:
        damage = error
    damages = [damage]
    if world > 1:
        damages = [None] * world
        dist.all_gather_object(damages, damage)
    for damage in damages:
        if damage is not None:
            raise damage
    assert found is not None
    return found


def _parts(state: dict[Any, Any]) -> list[dict[Any, Any]]:
    """The states of the optimizers that Megatron chains; one where it chains none."""
    return [state[number] for number in sorted(state)] if 0 in state else [state]


def _as_split_here(loaded: dict[Any, Any], groups: list[dict[str, Any]]) -> dict[Any, Any]:
    """Optimizer state that another number of chained optimizers saved, for those of this layout.

    States are found by their parameters' names, and are in their places already. Saved beside them, once for each
    optimizer, are the parameter groups: this layout's own `groups` are taken, with the steps done of the saved ones.
    """
    saved = loaded if "optimizer" in loaded else loaded[0]
    split = [part for part in loaded.values() if isinstance(part, dict) and "optimizer" in part]
    count = 1 if "optimizer" in loaded else len(split)
    if count == len(groups):
        return loaded
    common = {key: value for key, value in saved.items() if isinstance(key, str) and key != "param_state"}
    step = saved["optimizer"]["param_groups"][0]["step"]
    parts = []
    for number, own in enumerate(groups):
        held = loaded if len(groups) == 1 else loaded[number]
        own = {**own, "param_groups": [{**group, "step": step} for group in own["param_groups"]]}
        parts.append({**common, "param_state": held["param_state"], "optimizer": own})
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def _chunks(model: Model) -> dict[str, Any]:
    """The groups of layers under the keys that Megatron looks for."""
    if len(model.chunks) == 1:
        return {"model": model.chunks[0]}
    return {f"model{place}": chunk for place, chunk in enumerate(model.chunks)}


def _sharers() -> Any:
    """The ranks that hold the same parameters."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _axes(layout: Layout) -> dict[str, int]:
    return {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp, "dp": layout.dp}


def _raise_together(folder: Path, error: Exception | None) -> None:
    """When a rank could not write, raise on every rank, with that rank's number and reason."""
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if error is None else f"{type(error).__name__}: {error}")
    for rank, text in enumerate(texts):
        if text is not None:
            raise PolicyError(f"{folder}: could not be written: {text}", rank=rank)
