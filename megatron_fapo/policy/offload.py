"""Parameters, gradients and optimizer state out of the device's memory, and back.

Where trainer and servers share devices, each phase wants the memory for itself. Tensors stay the objects that they are:
their storage is emptied and later filled again, so that every view of it (Megatron's flat buffers, the shards of the
distributed optimizer) is whole again without being told. On CUDA the bytes go to pinned host memory, on a CPU to a file
without a name; gradients go nowhere, as the next update begins with zeros.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from megatron_fapo.compat.device import Device
from megatron_fapo.compat.memory import Refill
from megatron_fapo.errors import PolicyError
from megatron_fapo.policy.model import Model
from megatron_fapo.trace import KINDS, Kind

Freed = dict[Kind, int]
"""Bytes by kind."""


class Offload:
    """What of a model is away, and how it comes back."""

    def __init__(self, model: Model, device: Device) -> None:
        self._model = model
        self._device = device.torch_device()
        self._memory = device.memory
        self._away: dict[Kind, list[tuple[torch.UntypedStorage, int, Refill]]] = {}

    def out(self, kinds: Sequence[Kind] = KINDS) -> Freed:
        """Free the storage of these kinds; bytes freed of each, 0 for one that is away already."""
        freed: Freed = {}
        for kind in kinds:
            if kind in self._away:
                freed[kind] = 0
                continue
            held = []
            for storage in _STORAGES[kind](self._model, self._device):
                nbytes, data = storage.nbytes(), _bytes(storage, self._device)
                refill: Refill = torch.Tensor.zero_ if kind == "gradients" else self._memory.put_away(data)
                held.append((storage, nbytes, refill))
            self._memory.synchronize()
            for storage, _, _ in held:
                storage.resize_(0)
            self._away[kind] = held
            freed[kind] = sum(nbytes for _, nbytes, _ in held)
        self._memory.release()
        return freed

    def back(self, kinds: Sequence[Kind] = KINDS) -> Freed:
        """Fill the storage of these kinds again; bytes of each, 0 for one that was not away. Gradients are zero."""
        filled: Freed = {}
        for kind in kinds:
            held = self._away.pop(kind, [])
            for storage, nbytes, refill in held:
                storage.resize_(nbytes)
                refill(_bytes(storage, self._device))
            filled[kind] = sum(nbytes for _, nbytes, _ in held)
        self._memory.synchronize()
        return filled

    def resident(self) -> Freed:
        """Bytes of each kind that are in the device's memory now, read from the storages themselves."""
        return {kind: sum(storage.nbytes() for storage in _STORAGES[kind](self._model, self._device)) for kind in KINDS}

    def need(self, *kinds: Kind) -> None:
        """Raises PolicyError where one of these is away: its tensors have no memory."""
        missing = [kind for kind in kinds if kind in self._away]
        if missing:
            raise PolicyError(f"{' and '.join(missing)} are offloaded; call onload() first")


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    """A storage as one tensor of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _parameters(model: Model, device: torch.device) -> list[torch.UntypedStorage]:
    return _distinct((param.data for chunk in model.chunks for param in chunk.parameters()), device)


def _gradients(model: Model, device: torch.device) -> list[torch.UntypedStorage]:
    buffers = (buffer for part in model.parallel for buffer in part.buffers + part.expert_parallel_buffers)
    return _distinct((buffer.grad_data for buffer in buffers), device)


def _optimizer(model: Model, device: torch.device) -> list[torch.UntypedStorage]:
    """Moments and master weights; in float32 the weights are their own masters, and count as parameters."""
    parameters = {storage._cdata for storage in _parameters(model, device)}
    return [s for s in _distinct(_optimizer_tensors(model.optimizer), device) if s._cdata not in parameters]


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:  # a rank without parameters of its own
            continue
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            # the count of steps is read by the host, and is no weight
            yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim())


def _distinct(tensors: Iterable[torch.Tensor], device: torch.device) -> list[torch.UntypedStorage]:
    """The storages behind tensors of this device, each once."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device == device)
    return list({storage._cdata: storage for storage in storages if storage.nbytes()}.values())


_STORAGES: dict[Kind, Callable[[Model, torch.device], list[torch.UntypedStorage]]] = {
    "parameters": _parameters,
    "gradients": _gradients,
    "optimizer": _optimizer,
}
