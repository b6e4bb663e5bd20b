"""Megatron's checkpoint writer, made to run in a thread of the rank, and to save every optimizer state as it is.

- P11: `write_preloaded_data_multiproc` writes in the calling thread. 0.16.1 forks a writer for each file, out of a
  process that has the threads of gloo, NCCL and OpenMP, and waits for it without end: a writer that dies (a full disk,
  a missing psutil) leaves the rank waiting for ever. 0.18.2 writes in threads itself.
- P13: the queue of write results is a plain one. 0.16.1 and 0.18.2 spawn a manager process for a queue that never
  leaves this process.
- P14: optimizer state is gathered with the padding of its buffer. In 0.16.1 and 0.18.2 `fully_reshardable` joins a
  buffer's buckets without the padding between them, but looks parameters up by offsets that include it: with several
  buckets (embeddings tied across pipeline stages have one of their own) all states behind a padding are saved shifted,
  master weights too, and a resumed run trains on garbage. Upstream warns of "data corruption" ("issue #504") only
  where the shift runs over the end. What is written here also copies each state once rather than four times, which is
  most of what a training loop waits for a checkpoint.

On CPU and CUDA alike. `tests/compat/test_checkpoint_files.py` fails once upstream needs neither.
"""

import queue
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import save
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_fapo.compat.versions import MEGATRON


def install() -> None:
    """Install P11 to P14."""
    DistributedOptimizer.get_parameter_state_dp_zero = _gather_states
    results: queue.Queue[Any] = queue.Queue()
    writer = filesystem_async.FileSystemWriterAsync
    if MEGATRON.forks_checkpoint_writers:
        writer.write_preloaded_data_multiproc = staticmethod(_write_here)
        filesystem_async._get_write_results_queue = lambda: results
    else:
        filesystem_async.get_write_results_queue = lambda mp_mode="spawn": results


STATES = ("param", "exp_avg", "exp_avg_sq")


def _gather_states(
    self: Any, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
) -> dict[Any, Any]:
    """P14: {buffer: {dtype: {state: [buffer.numel] on the CPU}}} on all ranks of the buffers; padding is undefined."""
    gathered: dict[Any, Any] = {"buckets_coalesced": True}
    group = self.data_parallel_group
    for number, (buffer, by_dtype) in enumerate(zip(self.buffers, self.gbuf_ranges, strict=True)):
        ((dtype, ranges),) = by_dtype.items()
        make = torch.zeros if empty_data else torch.empty  # a loaded tensor may be smaller than its place
        states = {key: make(buffer.numel, dtype=torch.float32, device="cpu") for key in STATES}
        gathered[number] = {dtype: {**states, "numel_unpadded": buffer.numel_unpadded}}
        for bucket, in_bucket in zip(buffer.buckets, ranges, strict=True):
            if empty_data:
                continue
            numel = bucket.grad_data.numel()
            whole = {key: states[key][bucket.offset : bucket.offset + numel] for key in STATES}
            own = {key: shards.chunk(group.size())[group.rank()] for key, shards in whole.items()}
            for param, places in in_bucket["param_map"].items():
                held, place = self._get_main_param_and_optimizer_states(param), places["gbuf_local"]
                for key in STATES:
                    own[key][place.start : place.end].copy_(held[key].detach())
            if group.size() > 1:
                for key in STATES:
                    _all_gather(whole[key], own[key], group)
    return gathered


def _all_gather(whole: torch.Tensor, own: torch.Tensor, group: Any) -> None:
    """Fill the other ranks' parts of `whole`, by way of the device that the group's backend knows."""
    device = torch.cuda.current_device()
    parts = [torch.empty_like(part, device=device) for part in whole.chunk(group.size())]
    dist.all_gather(parts, own.to(device), group=group)
    for target, part in zip(whole.chunk(group.size()), parts, strict=True):
        target.copy_(part)


def _write_here(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], results_queue: Any) -> None:
    """P11: one file after the other; the first failure ends it and becomes the result."""
    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        answers: queue.Queue[Any] = queue.Queue()
        pending: queue.Queue[int] = queue.Queue()
        pending.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, answers, pending, True, use_msc=use_msc
        )
        _, outcome = answers.get()
        if isinstance(outcome, Exception):
            results_queue.put(outcome)
            return
        written[number] = outcome
    results_queue.put(written)


class SaveRequest:
    """A rank's part of a save: its tensors copied, to be written by `write` and settled by `finalize`."""

    def __init__(self, request: Any, state: ShardedStateDict) -> None:
        self._write = request.async_fn
        self._finalize = list(request.finalize_fns)
        self._arguments = list(request.async_fn_args)
        self.files: list[Path] = []
        if self._write is None:  # this rank has nothing to write
            return
        buckets = self._arguments[1]
        # the writer holds the same list: changed in place, so that nothing holds on to the originals
        held = {tensor.untyped_storage().data_ptr() for tensor in _tensors(state)}
        buckets[:] = [_copied(bucket, held) for bucket in request.preload_fn()]
        self.files = [Path(file) for file, _, _ in buckets]

    def write(self) -> None:
        """Write and sync this rank's files. Touches neither the model nor the other ranks: any thread may do it."""
        if self._write is None:
            return
        self._write(*self._arguments)
        buckets = self._arguments[1]
        buckets[:] = [(file, key, ([], [])) for file, key, _ in buckets]

    def finalize(self) -> None:
        """Gather what was written where, and write it down. Collective; raises where a rank failed to write."""
        for function in self._finalize:
            function()


def _copied(bucket: Any, held: Collection[int]) -> Any:
    """A bucket without the very memory that is trained: on a CPU "moved to the host" means just that.

    Upstream has copied what is a part of a buffer; `held` are the storages of the state, of which the rest is.
    """
    file, key, (objects, tensors) = bucket
    own = [(item, t.clone() if t.untyped_storage().data_ptr() in held else t) for item, t in tensors]
    return file, key, (objects, own)


def _tensors(state: ShardedStateDict) -> Iterator[torch.Tensor]:
    for found in nested_values(state):
        if (isinstance(found, ShardedTensor) and found.data is not None) or isinstance(found, ShardedTensorFactory):
            yield found.data


def save_strategy(group: Any) -> Any:
    """Every rank of `group` writes an equal share of what they all hold; who writes what is settled once."""
    files = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    return FullyParallelSaveStrategyWrapper(files, group, do_cache_distribution=True)


def load_strategy(group: Any) -> Any:
    """Every rank of `group` reads an equal share, and they pass it on."""
    return FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group)


def begin_save(state: ShardedStateDict, folder: Path, strategy: Any) -> SaveRequest:
    """Plan a save and copy this rank's share of it. Collective. `folder` is empty."""
    begin: Callable[..., Any] = partial(save, **MEGATRON.save_flags)
    # the writer takes tensors out of the state that it is given
    held = dict(state)
    return SaveRequest(begin(state, str(folder), sharded_strategy=strategy, async_sharded_save=True), held)
