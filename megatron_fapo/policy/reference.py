"""The reference policy: the weights that a run starts from, kept on the host and lent to the model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_fapo.policy.model import Model


class Reference:
    """This rank's part of the starting weights. Take it before a checkpoint replaces them.

    It costs host memory for one copy of the rank's weights, and for a second one while `in_place`.
    """

    def __init__(self, model: Model) -> None:
        self._weights = _copies(model)

    @contextmanager
    def in_place(self, model: Model) -> Iterator[None]:
        """Inside, the model computes with the reference weights; the optimizer's own are untouched."""
        current = _copies(model)
        _put(self._weights, model)
        try:
            yield
        finally:
            _put(current, model)


def _tensors(model: Model) -> list[torch.Tensor]:
    return [tensor for chunk in model.chunks for tensor in (*chunk.parameters(), *chunk.buffers())]


def _copies(model: Model) -> list[torch.Tensor]:
    return [tensor.detach().to("cpu", copy=True) for tensor in _tensors(model)]


@torch.no_grad()
def _put(weights: list[torch.Tensor], model: Model) -> None:
    for tensor, weight in zip(_tensors(model), weights, strict=True):
        tensor.copy_(weight)
