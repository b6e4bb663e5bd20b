"""Megatron's checkpoint writer, made to run in a thread of the rank, and to save every optimizer state as it is.

- P11: `write_preloaded_data_multiproc` writes in the calling thread. 0.16.1 forks a writer for each file, out of a
  process that has the threads of gloo, NCCL and OpenMP, and waits for it without end: a writer that dies (a full disk,
  a missing psutil) leaves the rank waiting for ever. 0.18.2 writes in threads itself.
- P13: the queue of write results is a plain one. 0.16.1 and 0.18.2 spawn a manager process for a queue that never
  leaves this process.
- P14: optimizer state is read from the right place of its buffer. In 0.16.1 and 0.18.2 `fully_reshardable` joins a
  buffer's buckets without the padding between them, but looks parameters up by offsets that include it: with several
  buckets (embeddings tied across pipeline stages have one of their own) all states behind a padding are saved shifted,
  master weights too, and a resumed run trains on garbage. Upstream warns of "data corruption" ("issue #504") only
  where the shift runs over the end.

On CPU and CUDA alike. `tests/compat/test_checkpoint_files.py` fails once upstream needs neither.
"""

import queue
from collections.abc import Callable
from functools import partial, wraps
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
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
    _states_from_the_right_place()
    results: queue.Queue[Any] = queue.Queue()
    writer = filesystem_async.FileSystemWriterAsync
    if MEGATRON.forks_checkpoint_writers:
        writer.write_preloaded_data_multiproc = staticmethod(_write_here)
        filesystem_async._get_write_results_queue = lambda: results
    else:
        filesystem_async.get_write_results_queue = lambda mp_mode="spawn": results


def _states_from_the_right_place() -> None:
    """P14: while states are cut out of the joined buckets, parameters are looked up by offsets without padding."""
    upstream = DistributedOptimizer.sharded_param_state_fully_reshardable
    if hasattr(upstream, "__wrapped__"):
        return

    @wraps(upstream)
    def sharded(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = offsets_without_padding(buffer)
            return upstream(self, *args, **kwargs)
        finally:
            for buffer, offsets in zip(self.buffers, kept, strict=True):
                buffer.param_index_map = offsets

    DistributedOptimizer.sharded_param_state_fully_reshardable = sharded


def offsets_without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """{parameter: (start, end, bucket)} in the buffer's buckets joined without the padding at their ends."""
    lengths = [bucket.numel_unpadded for bucket in buffer.buckets]
    joined = [0, *accumulate(lengths)]
    moved = [joined[number] - start for number, (start, _) in enumerate(buffer.bucket_indices)]
    return {
        param: (start + moved[bucket], end + moved[bucket], bucket)
        for param, (start, end, bucket) in buffer.param_index_map.items()
    }


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

    def __init__(self, request: Any) -> None:
        self._write = request.async_fn
        self._finalize = list(request.finalize_fns)
        self._arguments = list(request.async_fn_args)
        self.files: list[Path] = []
        if self._write is None:  # this rank has nothing to write
            return
        buckets = self._arguments[1]
        # the writer holds the same list: changed in place, so that nothing holds on to the originals
        buckets[:] = [_copied(bucket) for bucket in request.preload_fn()]
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


def _copied(bucket: Any) -> Any:
    """A bucket whose tensors are its own: on a CPU "moved to the host" means the very memory that is trained."""
    file, key, (objects, tensors) = bucket
    return file, key, (objects, [(item, tensor.clone()) for item, tensor in tensors])


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
    return SaveRequest(begin(state, str(folder), sharded_strategy=strategy, async_sharded_save=True))
