"""Memory of a CUDA device that other processes on the machine can open, by the driver's own calls.

Torch can export what its allocator gave out, but it counts who has opened that and has freed it, through files that
the two processes share; expandable segments and the memory saver of SGLang break it. Memory of our own has one owner
and one rule: whoever opened it has closed it before it answers.

Stands alone, torch and the standard library: SGLang's processes load this file too.
"""

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PREFIX = "cuda-ipc:"
"""How the text that stands for a block begins."""
_PEER = 1
"""CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS: the reader may compute on another device."""


class _Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class Block:
    """Bytes on this process's current device, from the driver rather than from torch's allocator."""

    def __init__(self, nbytes: int) -> None:
        """Raises RuntimeError without a device, or where it has no room or shares no memory between processes."""
        if not torch.cuda.is_available():
            raise RuntimeError("this process has no CUDA device")
        device = torch.cuda.current_device()
        torch.cuda.synchronize(device)  # the device's context is this thread's from here on
        pointer, handle = ctypes.c_uint64(), _Handle()
        _call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(nbytes))
        self._free = weakref.finalize(self, _call, "cuMemFree_v2", pointer)
        _call("cuIpcGetMemHandle", ctypes.byref(handle), pointer)
        self.nbytes = nbytes
        self.tensor = _tensor(pointer.value or 0, nbytes, device)
        """[nbytes] uint8."""
        self.handle = f"{PREFIX}{_uuid(device)}:{bytes(handle.reserved).hex()}"
        """What another process opens it by."""

    def close(self) -> None:
        """Give the memory back; nobody may use it any more."""
        torch.cuda.synchronize()
        del self.tensor
        self._free()


@contextmanager
def opened(handle: str, nbytes: int) -> Iterator[torch.Tensor]:
    """The [nbytes] uint8 of another process's block, until the end of the body; what reads it has ended by then.

    Raises ValueError for a block on a device that this process does not see, RuntimeError for one that is gone.
    """
    uuid, _, digits = handle.removeprefix(PREFIX).rpartition(":")
    visible = [_uuid(device) for device in range(torch.cuda.device_count())]
    if uuid not in visible:
        raise ValueError(
            f"memory on GPU {uuid} cannot be opened here: this process sees {', '.join(visible) or 'none'}"
        )
    device = visible.index(uuid)
    pointer, found = ctypes.c_uint64(), _Handle((ctypes.c_ubyte * 64)(*bytes.fromhex(digits)))
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), found, ctypes.c_uint(_PEER))
        try:
            yield _tensor(pointer.value or 0, nbytes, device)
        finally:
            for each in range(torch.cuda.device_count()):
                torch.cuda.synchronize(each)
            _call("cuIpcCloseMemHandle", pointer)


def _call(name: str, *arguments: Any) -> None:
    driver = ctypes.CDLL("libcuda.so.1")
    status = getattr(driver, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown').decode()} (CUDA error {status})")


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _tensor(pointer: int, nbytes: int, device: int) -> torch.Tensor:
    """A view of device memory; whoever owns that must outlive it."""

    class Memory:
        __cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (pointer, False), "version": 3}  # noqa: RUF012

    return torch.as_tensor(Memory(), device=torch.device("cuda", device))
