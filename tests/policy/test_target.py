"""Tensors of many blocks, written and summed by several ranks: the bytes and the digest of the whole, whoever wrote."""

import numpy as np
import pytest
import torch

from megatron_fapo.policy.target import Target
from megatron_fapo.records import TensorSpec
from megatron_fapo.weights import BLOCK, SUM, block_sum, blocks, combined, digest

ROWS, COLUMNS = 611, 1000
"""9.3 blocks of float32; a shard ends inside of a block."""

BY_ROWS = {rank: (slice(start, end),) for rank, (start, end) in enumerate([(0, 204), (204, 408), (408, ROWS)])}
BY_COLUMNS = {rank: (slice(None), slice(start, start + 500)) for rank, start in enumerate([0, 500])}
WHOLE = {0: (slice(None),)}
ONE_SHARD = {0: (slice(None), slice(0, COLUMNS))}
PADDED = {0: (slice(0, ROWS),), 1: (slice(ROWS, ROWS),)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("places", "alone"),
    [(BY_ROWS, 8), (BY_COLUMNS, 0), (WHOLE, 10), (ONE_SHARD, 10), (PADDED, 10)],
    ids=["rows", "columns", "whole", "one shard", "padded"],
)
def test_every_block_is_summed_once_and_the_digest_is_that_of_the_bytes(places, alone, dtype):
    whole = torch.randn(ROWS, COLUMNS).to(dtype)
    expected = whole.view(torch.uint8).numpy().tobytes()
    spec = TensorSpec(name="x", dtype=str(dtype).removeprefix("torch."), shape=tuple(whole.shape), offset=64, digest="")
    memory = memoryview(bytearray(64 + len(expected)))
    sums = np.zeros((len(places), blocks(len(expected)) * SUM), np.uint8)
    targets = [Target(spec, memory, places, own) for own in sums]
    for rank, target in enumerate(targets):
        target.put(whole[places[rank]], rank)
    assert memory[64:].tobytes() == expected
    filled = sums.reshape(len(places), -1, SUM).any(2)
    assert np.sum(filled, 0).max(initial=0) <= 1
    if dtype is torch.float32:
        assert np.sum(filled) == alone
    for number, block in enumerate(targets[0].shared):
        targets[number % len(targets)].sum(block)
    assert combined(np.sum(sums, 0, dtype=np.uint8).data) == digest(expected)


def test_heads_that_lie_apart_in_a_shard_are_written_in_order():
    groups = torch.randn(4, 6, 50, 300)
    query = groups[:, :-2]
    spec = TensorSpec(name="q", dtype="float32", shape=(4 * 4 * 50, 300), offset=0, digest="")
    memory = memoryview(bytearray(query.numel() * 4))
    sums = np.zeros(blocks(len(memory)) * SUM, np.uint8)
    target = Target(spec, memory, {0: (slice(0, 800),)}, sums)
    target.put(query, 0)
    assert memory.tobytes() == query.contiguous().numpy().tobytes()
    assert target.shared == []
    assert combined(sums.data) == digest(memory)


def test_a_digest_is_made_of_the_sums_of_blocks():
    data = np.random.default_rng(0).bytes(2 * BLOCK + 5)
    assert blocks(len(data)) == 3
    parts = [block_sum(memoryview(data[start : start + BLOCK])) for start in (0, BLOCK, 2 * BLOCK)]
    assert digest(data) == combined(b"".join(parts)) != digest(data[:-1])
