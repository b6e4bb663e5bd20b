"""A process group in which one trainer rank sends weights to servers, as SGLang forms it.

SGLang's side (`srt/utils/common.py`, init_custom_process_group) calls torch's own helper, which needs a default group
that the embedded engine does not have. So the group is made here of its parts: the same store, under the same
prefixes, and the backend itself.
"""

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore


class WeightGroup:
    """Rank 0 sends, the others receive. Constructing it waits until all ranks are there."""

    def __init__(self, store: Store, rank: int, world: int, name: str, backend: str, seconds: float) -> None:
        """`store` is that of `meet`. Raises RuntimeError (torch) when the ranks do not meet in time."""
        timeout = datetime.timedelta(seconds=seconds)
        device = "cuda" if backend == "nccl" else "cpu"
        inner = PrefixStore(f"{device}/", PrefixStore(f"{name}/", PrefixStore(name, store)))
        self._store = store
        self._device = torch.device(device)
        self._group: Any  # the two have no common base that broadcasts
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(inner, rank, world, options)
        else:
            self._group = dist.ProcessGroupGloo(inner, rank, world, timeout)

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """From rank 0 into the tensors of all others, in order. Raises RuntimeError (torch) when a rank is gone."""
        there = [tensor.to(self._device) for tensor in tensors]
        for work in [self._group.broadcast(tensor, 0) for tensor in there]:
            work.wait()
        for tensor, received in zip(tensors, there, strict=True):
            if received is not tensor:
                tensor.copy_(received)


def meet(host: str, port: int, world: int, seconds: float, *, first: bool) -> TCPStore:
    """The store at an address. Rank 0 (`first`) opens it: with port 0, at a free one, its `port`."""
    timeout = datetime.timedelta(seconds=seconds)
    return TCPStore(host, port, None if first else world, first, timeout, wait_for_workers=False)
