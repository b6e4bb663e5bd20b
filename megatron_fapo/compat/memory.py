"""Where bytes go that a device's memory shall not hold for a while."""

import ctypes
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Refill = Callable[[torch.Tensor], Any]
"""Fills a tensor of bytes with what was put away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """How a device's memory is emptied."""

    apart: bool
    """Whether it is other memory than the host's."""
    put_away: Callable[[torch.Tensor], Refill]
    """Copy a tensor of bytes to where it costs no memory of the device; complete after `synchronize`."""
    synchronize: Callable[[], None]
    release: Callable[[], None]
    """Give what was freed back to the system."""
    free: Callable[[], int | None]
    """Bytes of the device that no process uses; None where it is the host's memory."""


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; they are there as long as the tensor is.

    By address: a storage that `numpy()` has looked at can no longer be freed.
    """
    nbytes = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())).cast("B")


def _to_file(data: torch.Tensor) -> Refill:
    """Into a file without a name in the system's temporary folder (TMPDIR), which ends with the process."""
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it lives as long as the bytes are away
    view, written = bytes_of(data), 0
    while written < len(view):
        written += file.write(view[written:])

    def refill(target: torch.Tensor) -> None:
        with file:
            file.seek(0)
            view, read = bytes_of(target), 0
            while read < len(view):
                count = file.readinto(view[read:])
                if not count:
                    raise OSError(f"an offloaded tensor's file ended after {read} of {len(view)} bytes")
                read += count

    return refill


def _to_pinned(data: torch.Tensor) -> Refill:
    """Into pinned host memory, on the current stream."""
    held = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
    held.copy_(data, non_blocking=True)
    return lambda target: target.copy_(held, non_blocking=True)


def _trim() -> None:
    """glibc keeps freed pieces below its threshold; other libraries have no such call and keep less."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _nothing() -> None:
    """A CPU has no stream to wait for, and no memory of its own to ask about."""


def _cuda_free() -> int:
    return int(torch.cuda.mem_get_info()[0])


CPU = Memory(apart=False, put_away=_to_file, synchronize=_nothing, release=_trim, free=_nothing)
CUDA = Memory(
    apart=True,
    put_away=_to_pinned,
    synchronize=torch.cuda.synchronize,
    release=torch.cuda.empty_cache,
    free=_cuda_free,
)
