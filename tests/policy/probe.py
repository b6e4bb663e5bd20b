"""A rank whose gradients can be looked at through the export of its weights."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_fapo.batch.layout import Layout
from megatron_fapo.policy.rank import PolicyRank
from megatron_fapo.policy.settings import PolicySettings
from tests.policy.mutations import MUTATIONS, Mutation

Gradients = list[dict[str, torch.Tensor]]
"""Of each group of layers, by the local name of the parameter."""


class ProbedRank(PolicyRank):
    """Keeps the gradients that the optimizer got at each update, as Megatron's buffers held them."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[Gradients] = []
        self._weights: Gradients = []
        self._mutation: Mutation | None = None
        self._patch = pytest.MonkeyPatch()

    def mutate(self, name: str) -> None:
        """Plant a bug in the next setup, until its shutdown."""
        self._mutation = MUTATIONS[name]

    def shutdown(self) -> None:
        self._patch.undo()
        self._mutation = None
        super().shutdown()

    def setup(self, rank: int, world: int, address: str, port: int, settings: PolicySettings, seed: int) -> Layout:
        if self._mutation is not None:
            self._mutation.before(self._patch)
        layout = super().setup(rank, world, address, port, settings, seed)
        if self._mutation is not None:
            self._mutation.after(self)
        self._seen = []
        step = self.model.optimizer.step

        def seen() -> Any:
            self._seen.append([_gradients(chunk) for chunk in self.model.parallel])
            return step()

        self.model.optimizer.step = seen
        return layout

    def dtypes(self) -> dict[str, set[torch.dtype]]:
        """What weights, their gradients' buffers and the optimizer's copies are kept in."""
        params = [param for chunk in self.model.chunks for param in chunk.parameters()]
        return {
            "weights": {param.dtype for param in params},
            "gradients": {param.main_grad.dtype for param in params},
            "masters": {held.dtype for group in self.model.optimizer.param_groups for held in group["params"]},
        }

    def show_gradients(self, update: int) -> None:
        """Put the gradients of an update where the weights are, for an export. Collective."""
        self._weights = [
            {name: param.detach().clone() for name, param in chunk.named_parameters()} for chunk in self.model.chunks
        ]
        self._place(self._seen[update])

    def show_weights(self) -> None:
        """Put the weights back."""
        self._place(self._weights)

    @torch.no_grad()
    def _place(self, values: Gradients) -> None:
        for chunk, tensors in zip(self.model.chunks, values, strict=True):
            for name, param in chunk.named_parameters():
                param.copy_(tensors[name])


def _gradients(parallel: Any) -> dict[str, torch.Tensor]:
    """The summed gradients in Megatron's buffers: whole, or with the distributed optimizer one part on each rank."""
    found: dict[torch.nn.Parameter, torch.Tensor] = {}
    for group in parallel.bucket_groups + parallel.expert_parallel_bucket_groups:
        for bucket in group.buckets:
            flat = bucket.grad_data.clone()
            if group.ddp_config.use_distributed_optimizer:
                ranks = group.intra_distributed_optimizer_instance_group
                own = flat.chunk(ranks.size())[ranks.rank()].clone()
                dist.all_gather_into_tensor(flat, own, group=ranks)
            for param in bucket.params_list:
                start = param.main_grad.storage_offset() - bucket.grad_data.storage_offset()
                found[param] = flat[start : start + param.numel()].view(param.shape)
    bare = parallel.module.module if hasattr(parallel.module, "module") else parallel.module
    return {name: found[param] for name, param in bare.named_parameters()}
