"""A microbatch laid out in rows: what is padding is counted as padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.policy.forward import pad, unpad
from megatron_fapo.records import MicroBatch, floats, ints


def micro(lengths: list[int]) -> MicroBatch:
    """Sequences of tokens 1, 2, ...; the first of each is its prompt."""
    total = sum(lengths)
    starts = np.cumsum([0, *lengths])
    mask = np.ones(total)
    mask[starts[:-1]] = 0
    zeros = floats(np.zeros(total))
    return MicroBatch(
        ids=tuple(map(str, range(len(lengths)))),
        token_ids=ints(np.arange(1, total + 1)),
        bounds=ints(starts),
        loss_mask=floats(mask),
        advantages=zeros,
        logprobs=floats(np.arange(total)),
        temperature=1.0,
    )


def test_rows_of_equal_length_have_no_padding_and_ragged_ones_have_what_is_missing() -> None:
    device = torch.device("cpu")
    even = pad(micro([6, 6, 6]), device)
    assert (even.real_tokens, even.tokens.numel()) == (15, 15)
    ragged = pad(micro([6, 3, 2]), device)
    assert (ragged.real_tokens, ragged.tokens.numel()) == (5 + 2 + 1, 15)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_every_token_with_a_predecessor_is_chosen_and_comes_back_to_its_place(lengths: list[int]) -> None:
    batch = micro(lengths)
    padded = pad(batch, torch.device("cpu"))
    assert padded.real_tokens == len(padded.chosen) == sum(lengths) - len(lengths)
    assert padded.real_tokens <= padded.tokens.numel()
    inputs = padded.tokens.reshape(-1)[padded.chosen]
    assert torch.equal(padded.targets, inputs + 1)  # tokens count upwards
    assert unpad(padded.behaviour, padded, len(batch.token_ids)) == pytest.approx(batch.logprobs * batch.loss_mask)
