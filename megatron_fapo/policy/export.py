"""Weights out of Megatron's shards, streamed under Hugging Face names.

One data-parallel copy takes part. A piece is one Megatron parameter and the Hugging Face tensors it becomes:
tensor-parallel shards are gathered, the owning stage converts and sends the result to rank 0. Every rank knows
the whole plan from the start, so all ranks cut it into the same buckets without asking each other.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file

from megatron_fapo.errors import DataError, PolicyError
from megatron_fapo.policy.model import Model
from megatron_fapo.records import Bucket, TensorSpec
from megatron_fapo.weights import Segment, aligned, digest

Tensors = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One Megatron parameter on its pipeline stage."""

    stage: int
    chunk: int
    """Which of that stage's groups of layers holds it."""
    local_name: str
    """Its name in that group's module."""
    name: str
    """Its name with the layer counted over all stages."""
    sharded: bool
    """Whether tensor-parallel ranks hold parts of it."""
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    """Hugging Face names and shapes that it becomes."""
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in a bucket, alignment included."""
        return sum(aligned(prod(shape) * self.dtype.itemsize) for _, shape in self.tensors)


def plan(model: Model) -> tuple[Piece, ...]:
    """All pieces of the model in the order of export, the same on every rank. Collective.

    Tied output weights, which the last stage holds as a copy of the embedding, are exported once.
    """
    mine = []
    for place, chunk in enumerate(model.chunks):
        names = model.bridge._weight_name_mapping_mcore_local_to_global(chunk)
        mine += [_piece(model, place, local, names[local], param) for local, param in chunk.named_parameters()]
    stages: list[list[Piece]] = [[] for _ in range(parallel_state.get_pipeline_model_parallel_world_size())]
    if len(stages) > 1:
        dist.all_gather_object(stages, mine, group=parallel_state.get_pipeline_model_parallel_group())
    else:
        stages = [mine]
    planned: dict[str, Piece] = {}
    for piece in (piece for stage in stages for piece in stage):
        planned.setdefault(piece.tensors[0][0], piece)
    return tuple(planned.values())


def check_names(model: Model) -> None:
    """Refuse a folder that holds tensors with no place in the model, as an unsupported variant would. Collective."""
    known = {name for piece in plan(model) for name, _ in piece.tensors}
    found = set(model.bridge.safetensor_io.load_hf_weight_names())
    tied = {"lm_head.weight"} if model.bridge.hf_config.tie_word_embeddings else set()
    if extra := sorted(found - known - tied):
        raise DataError(f"{len(extra)} tensors of the folder have no place in the model, the first is {extra[0]}")


def _piece(model: Model, chunk: int, local_name: str, name: str, param: torch.Tensor) -> Piece:
    sharded = bool(getattr(param, "tensor_model_parallel", False))
    shard = torch.empty(param.shape, dtype=param.dtype, device="meta")
    shard.partition_dim = getattr(param, "partition_dim", -1)  # type: ignore[attr-defined]
    shard.tensor_model_parallel = sharded  # type: ignore[attr-defined]
    shards = [shard] * parallel_state.get_tensor_model_parallel_world_size()
    tensors = _to_hugging_face(model, name, shards, shard) if sharded else _convert(model, name, shard)
    return Piece(
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        chunk=chunk,
        local_name=local_name,
        name=name,
        sharded=sharded,
        tensors=tuple((hf_name, tuple(tensor.shape)) for hf_name, tensor in tensors),
        dtype=param.dtype,
    )


def _to_hugging_face(model: Model, name: str, shards: list[torch.Tensor], param: torch.Tensor) -> Tensors:
    return _convert(model, name, model.bridge._weight_merge_across_tp(name, shards, param))


def _convert(model: Model, name: str, whole: torch.Tensor) -> Tensors:
    return list(zip(*model.bridge._weight_to_hf_format(name, whole), strict=True))


@torch.no_grad()
def fetch(model: Model, piece: Piece) -> Tensors:
    """The Hugging Face tensors of a piece on rank 0, an empty list elsewhere. Collective over data-parallel copy 0."""
    if parallel_state.get_data_parallel_rank() != 0:
        return []
    tensors: Tensors = []
    here = parallel_state.get_pipeline_model_parallel_rank() == piece.stage
    if here:
        param = dict(model.chunks[piece.chunk].named_parameters())[piece.local_name]
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        if piece.sharded and ranks > 1:
            shards = [torch.empty_like(param) for _ in range(ranks)]
            dist.all_gather(shards, param.detach(), group=parallel_state.get_tensor_model_parallel_group())
            tensors = _to_hugging_face(model, piece.name, shards, param)
        else:
            tensors = _convert(model, piece.name, param.detach())
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return []
    return tensors if piece.stage == 0 else _send_to_rank_0(piece, tensors, here)


def _send_to_rank_0(piece: Piece, tensors: Tensors, here: bool) -> Tensors:
    """From the first tensor-parallel rank of a later stage to rank 0."""
    if here:
        for _, tensor in tensors:
            dist.send(tensor.contiguous(), dst=0)
        return []
    if dist.get_rank() != 0:
        return []
    source = parallel_state.get_pipeline_model_parallel_group()
    peer = dist.get_global_rank(source, piece.stage)
    device = torch.device("cpu") if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())
    received = [(name, torch.empty(shape, dtype=piece.dtype, device=device)) for name, shape in piece.tensors]
    for _, tensor in received:
        dist.recv(tensor, src=peer)
    return received


class Export:
    """One walk over all weights, bucket by bucket."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.pieces = plan(model)
        self._next = 0

    def next_bucket(self, path: Path, nbytes: int) -> Bucket | None:
        """See `PolicyRank.next_bucket`."""
        pieces = self._cut(nbytes)
        self._next += len(pieces)
        if not pieces:
            return None
        writing = dist.get_rank() == 0
        memory = Segment.create(path, nbytes).memory if writing else bytearray(1)
        target = torch.frombuffer(memory, dtype=torch.uint8)
        specs: list[TensorSpec] = []
        offset = 0
        for piece in pieces:
            for name, tensor in fetch(self.model, piece):
                spec = _write(name, tensor, target, offset)
                specs.append(spec)
                offset = aligned(offset + tensor.numel() * tensor.itemsize)
        return Bucket(segment=str(path), nbytes=offset, tensors=tuple(specs)) if writing else None

    def _cut(self, nbytes: int) -> Sequence[Piece]:
        """The next pieces that fit together."""
        rest = self.pieces[self._next :]
        fitting, used = 0, 0
        for piece in rest:
            used += piece.nbytes
            if used > nbytes:
                break
            fitting += 1
        if rest and not fitting:
            names = ", ".join(name for name, _ in rest[0].tensors)
            raise PolicyError(f"{names} need a bucket of {rest[0].nbytes} bytes, the bucket has {nbytes}")
        return rest[:fitting]


def _write(name: str, tensor: torch.Tensor, target: torch.Tensor, offset: int) -> TensorSpec:
    place = target[offset : offset + tensor.numel() * tensor.itemsize]
    place.copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
    return TensorSpec(
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        offset=offset,
        digest=digest(place.numpy().data),
    )


COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
"""What a Hugging Face folder holds beside its weights: config, tokenizer, chat template, generation settings."""


def save_hf(model: Model, source: Path, folder: Path) -> None:
    """Write weights and the files of `source` that go with them. Collective; rank 0 writes.

    The folder appears under its name only when it is complete, replacing one of the same name.
    """
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in _all_tensors(model)}
    if dist.get_rank() == 0:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for pattern in COPIED:
            for file in source.glob(pattern):
                if not file.name.endswith("safetensors.index.json"):
                    shutil.copy(file, partial / file.name)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


def _all_tensors(model: Model) -> Iterator[tuple[str, Any]]:
    for piece in plan(model):
        yield from fetch(model, piece)
