"""A model at its true size without its weights: every rank's part, built on the meta device in this one process.

The process groups are torch's fake ones, which answer for a world of any size and send nothing. So what is built is
the real model at the real layout, and takes milliseconds a rank.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from megatron_fapo.compat.device import NO_FUSIONS, current  # before torch and megatron

import torch  # isort: skip
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from megatron_fapo.errors import DataError
from megatron_fapo.policy.model import assemble, make_groups
from megatron_fapo.policy.pieces import is_copy, leads, own_pieces
from megatron_fapo.policy.settings import ParallelSettings, PolicySettings

Shapes = dict[str, tuple[int, ...]]


def _leave(tensor: torch.Tensor) -> None:
    """No initial weights."""


UNDRAWN = {"init_method": _leave, "output_layer_init_method": _leave, "embedding_init_method": _leave}
"""Drawing initial weights takes longer than building a model, even where there is nothing to fill."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankPart:
    """What one rank holds."""

    rank: int
    stage: int
    """Of the pipeline."""
    layers: int
    parameters: int
    alone: int
    """Parameters that it counts for in the whole: its shards, without what other ranks count, and without padding."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """A model at a layout against its Hugging Face checkpoint."""

    expected: Shapes
    """Names and shapes as a saved checkpoint has them."""
    produced: tuple[tuple[str, tuple[int, ...]], ...]
    """What all ranks together export."""
    ranks: tuple[RankPart, ...]

    @property
    def parameters(self) -> int:
        """Of the checkpoint."""
        return sum(prod(shape) for shape in self.expected.values())

    def problems(self) -> list[str]:
        """What is wrong, empty when every tensor is produced exactly once with its shape and the counts add up."""
        times = Counter(name for name, _ in self.produced)
        shapes = dict(self.produced)
        found = [f"{name} is produced {times[name]} times" for name in times if times[name] > 1]
        found += [f"{name} is not in the checkpoint" for name in sorted(times.keys() - self.expected.keys())]
        found += [f"{name} is not produced" for name in sorted(self.expected.keys() - times.keys())]
        for name, shape in self.expected.items():
            if name in shapes and shapes[name] != shape:
                found.append(f"{name} has shape {list(shapes[name])}, the checkpoint {list(shape)}")
        if (held := sum(part.alone for part in self.ranks)) != self.parameters:
            found.append(f"the ranks hold {held} parameters, the checkpoint {self.parameters}")
        return found


def read_config(file: Path) -> Any:
    """A Hugging Face config from a folder or a JSON file of any name. Raises DataError."""
    try:
        return AutoConfig.from_pretrained(file)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file}: not a config.json that transformers reads: {error}") from error


def checkpoint_shapes(hf_config: Any) -> Shapes:
    """Names and shapes of a model's tensors as transformers saves them: experts one by one, tied weights once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    state = {name: param.detach() for name, param in model.named_parameters()}  # names a tied parameter once
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def survey(hf_config: Any, parallel: ParallelSettings) -> Survey:
    """Build all ranks' parts of a model without memory, one after the other. Raises ConfigError.

    Needs a process without process groups, and leaves it so.
    """
    produced, parts = [], []
    for rank in range(parallel.world):
        with pretending(rank, parallel):
            bridge, *chunks = without_memory(hf_config, parallel)
            part, tensors = _look(rank, bridge, chunks)
        parts.append(part)
        produced += tensors
    return Survey(expected=checkpoint_shapes(hf_config), produced=tuple(produced), ranks=tuple(parts))


def without_memory(hf_config: Any, parallel: ParallelSettings) -> tuple[Any, ...]:
    """The bridge and then this rank's modules, on the meta device. Raises ConfigError."""
    settings = PolicySettings(model=Path(), parallel=parallel, dtype="bfloat16")
    flags = {**NO_FUSIONS, "use_cpu_initialization": True}
    device = dataclasses.replace(current(), spec="local", transformer_flags=flags)
    device.install()
    with device.active(), torch.device("meta"):
        bridge, chunks = assemble(hf_config, settings, device, **UNDRAWN)
    return bridge, *chunks


def _look(rank: int, bridge: Any, chunks: Any) -> tuple[RankPart, list[tuple[str, tuple[int, ...]]]]:
    """What this rank holds, and the tensors that it would export."""
    tensors: list[tuple[str, tuple[int, ...]]] = []
    alone = 0
    params = [dict(chunk.named_parameters()) for chunk in chunks]
    for piece in own_pieces(bridge, chunks):
        if not _first_copy(piece) or is_copy(bridge, piece):
            continue
        if leads(piece):
            tensors += piece.tensors
        whole = sum(prod(shape) for _, shape in piece.tensors)
        held = params[piece.chunk][piece.local_name].numel()
        if piece.partition is None:
            alone += held if leads(piece) else 0
        elif held * len(piece.ranks) == whole:
            alone += held
        else:  # rows of the vocabulary that fill up the last ranks' shards do not count
            width = piece.tensors[0][1][1]
            before = piece.ranks.index(rank) * held
            alone += max(0, min(held, whole - before)) // width * width
    part = RankPart(
        rank=rank,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        layers=sum(len(chunk.decoder.layers) for chunk in chunks),
        parameters=sum(param.numel() for chunk in params for param in chunk.values()),
        alone=alone,
    )
    return part, tensors


def _first_copy(piece: Any) -> bool:
    if piece.expert:
        return bool(parallel_state.get_expert_data_parallel_rank() == 0)
    return bool(parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0)


@contextmanager
def pretending(rank: int, parallel: ParallelSettings) -> Iterator[None]:
    """To be one rank of many, among groups that send nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world)
    try:
        make_groups(parallel)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
