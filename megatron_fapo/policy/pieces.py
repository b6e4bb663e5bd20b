"""Megatron's parameters as the Hugging Face tensors that they are: the plan, the way in, the way out.

A piece is one Megatron parameter and the Hugging Face tensors it becomes. One copy of the model takes part: of
all data-parallel ranks the first. Every rank knows the whole plan, so all ranks walk it without asking each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_fapo.compat.bridge import EXPERT, Tensors
from megatron_fapo.compat.device import here
from megatron_fapo.policy.hf_folder import Weights
from megatron_fapo.weights import aligned


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One Megatron parameter."""

    chunk: int
    """Which of its ranks' modules has it; 0 but for virtual pipeline stages."""
    local_name: str
    """Its name in that module."""
    name: str
    """Its name with layers and experts counted over all ranks."""
    ranks: tuple[int, ...]
    """The ranks that hold its shards, in order; the first converts."""
    partition: int | None
    """The dimension that the shards are cut along; None where each rank has the whole."""
    shard: int
    """The size of a shard along that dimension; of the last it may be padding."""
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    """Hugging Face names and shapes that it becomes."""
    dtype: torch.dtype

    @property
    def expert(self) -> bool:
        """Whether it belongs to an expert, and with it to the expert-parallel groups."""
        return is_expert(self.name)

    @property
    def nbytes(self) -> int:
        """Bytes in a bucket, alignment included."""
        return sum(aligned(prod(shape) * self.dtype.itemsize) for _, shape in self.tensors)


def is_expert(name: str) -> bool:
    """Whether a parameter, by its counted name, is an expert's."""
    return EXPERT.search(name) is not None


def plan(bridge: Any, chunks: Sequence[Any]) -> tuple[Piece, ...]:
    """All pieces of the model in the order of export, the same on every rank. Collective.

    `chunks` are this rank's parts of the model.
    """
    mine = [piece for piece in own_pieces(bridge, chunks) if leads(piece) and not is_copy(bridge, piece)]
    everyones: list[list[Piece]] = [mine]
    if dist.get_world_size() > 1:
        everyones = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyones, mine)
    return tuple(piece for pieces in everyones for piece in pieces)


def own_pieces(bridge: Any, chunks: Sequence[Any]) -> list[Piece]:
    """The pieces of which this rank holds a shard."""
    found = []
    for place, chunk in enumerate(chunks):
        names = bridge.names(chunk)
        for local_name, param in chunk.named_parameters():
            name = names[local_name]
            ranks = tuple(dist.get_process_group_ranks(_group(name)))
            partition = param.partition_dim if getattr(param, "tensor_model_parallel", False) else None
            shard = torch.empty(param.shape, dtype=param.dtype, device="meta")
            tensors = bridge.to_hugging_face(name, [shard] * len(ranks), partition)
            found.append(
                Piece(
                    chunk=place,
                    local_name=local_name,
                    name=name,
                    ranks=ranks,
                    partition=partition,
                    shard=0 if partition is None else param.shape[partition],
                    tensors=tuple((hf_name, tuple(tensor.shape)) for hf_name, tensor in tensors),
                    dtype=param.dtype,
                )
            )
    return found


def leads(piece: Piece) -> bool:
    """Whether this rank speaks for a piece: first of its shards, in the first copy of the model."""
    if piece.expert:
        copy = parallel_state.get_expert_data_parallel_rank()
    else:
        copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return bool(copy == 0 and dist.get_rank() == piece.ranks[0])


def is_copy(bridge: Any, piece: Piece) -> bool:
    """Whether it is the last stage's copy of a tied embedding."""
    return bool(bridge.hf_config.tie_word_embeddings) and piece.name == "output_layer.weight"


def _group(name: str) -> Any:
    """The ranks among which a parameter is cut."""
    if is_expert(name):
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def shapes(pieces: Sequence[Piece]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Hugging Face tensors that a plan consists of."""
    return {name: shape for piece in pieces for name, shape in piece.tensors}


def tied(bridge: Any) -> Mapping[str, str]:
    """Names that a folder may hold although the model has their weights under another."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if bridge.hf_config.tie_word_embeddings else {}


@torch.no_grad()
def load(bridge: Any, chunks: Sequence[Any], weights: Weights) -> None:
    """Fill this rank's parameters, one at a time. Collective.

    Each rank reads the tensors that its parameters consist of, and keeps its shard: nothing is sent. Raises
    DataError for a folder whose names or shapes are not those of its config.
    """
    weights.check(shapes(plan(bridge, chunks)), unused=tied(bridge))
    for chunk in chunks:
        names = bridge.names(chunk)
        for local_name, param in chunk.named_parameters():
            name = names[local_name]
            param.copy_(bridge.shard(name, bridge.from_hugging_face(name, weights.read), param))


@torch.no_grad()
def fetch(bridge: Any, chunks: Sequence[Any], piece: Piece) -> Tensors:
    """The Hugging Face tensors of a piece on rank 0, an empty list elsewhere. Collective over the first copy."""
    rank, source = dist.get_rank(), piece.ranks[0]
    tensors: Tensors = []
    if rank in piece.ranks:
        param = dict(chunks[piece.chunk].named_parameters())[piece.local_name].detach()
        shards = [param]
        if piece.partition is not None and len(piece.ranks) > 1:
            shards = [torch.empty_like(param) for _ in piece.ranks]
            dist.all_gather(shards, param, group=_group(piece.name))
        if rank == source:
            tensors = bridge.to_hugging_face(piece.name, shards, piece.partition)
    if source == 0:
        return tensors if rank == 0 else []
    if rank == source:
        for _, tensor in tensors:
            dist.send(tensor.contiguous(), dst=0)
    return _receive(piece) if rank == 0 else []


Place = tuple[slice, ...]
"""Where a shard lies in a Hugging Face tensor."""


def places(piece: Piece) -> list[dict[int, Place]]:
    """For each Hugging Face tensor of a piece: {rank: place of its shard}.

    Tensor-parallel shards are blocks of the Hugging Face tensors too: Megatron gives each rank whole heads, and
    halves of gate and up. So every rank can put its part in place, without gathering and without a copy in between.
    A tensor that every rank has is written by the first.
    """
    if piece.partition is None:
        return [{piece.ranks[0]: (slice(None),)} for _ in piece.tensors]
    several = len(piece.tensors) > 1
    found = []
    for _, shape in piece.tensors:
        dim = 0 if several else piece.partition
        each = shape[0] // len(piece.ranks) if several else piece.shard
        found.append(
            {
                rank: (*[slice(None)] * dim, slice(min(i * each, shape[dim]), min((i + 1) * each, shape[dim])))
                for i, rank in enumerate(piece.ranks)
            }
        )
    return found


@torch.no_grad()
def own_parts(bridge: Any, param: torch.Tensor, piece: Piece) -> list[torch.Tensor]:
    """This rank's shard of a piece as parts of its Hugging Face tensors: views of it, for `places`; [] for none."""
    rank = dist.get_rank()
    if piece.partition is None:
        whole = bridge.to_hugging_face(piece.name, [param], piece.partition)
        return [tensor for _, tensor in whole] if rank == piece.ranks[0] else []
    if len(piece.tensors) > 1:
        return _split(bridge, param, piece)
    place = places(piece)[0][rank][piece.partition]
    return [param.narrow(piece.partition, 0, place.stop - place.start)]  # Megatron may have padded the vocabulary


def _split(bridge: Any, param: torch.Tensor, piece: Piece) -> list[torch.Tensor]:
    """A shard as the shards of its Hugging Face tensors, gate and up, or query, key and value by group and head."""
    if len(piece.tensors) == 3:  # [groups, heads of a group + key + value, head size, ...]
        (_, query), (_, key), _ = piece.tensors
        groups = bridge.hf_config.num_key_value_heads // len(piece.ranks)
        heads = param.view(groups, query[0] // key[0] + 2, -1, *param.shape[1:])
        return [heads[:, :-2], heads[:, -2:-1], heads[:, -1:]]
    return list(param.chunk(len(piece.tensors)))


def _receive(piece: Piece) -> Tensors:
    device = here()
    received = [(name, torch.empty(shape, dtype=piece.dtype, device=device)) for name, shape in piece.tensors]
    for _, tensor in received:
        dist.recv(tensor, src=piece.ranks[0])
    return received
