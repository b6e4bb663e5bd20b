"""What changed between two tensors, there and back."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.delta import Change, change


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]), st.integers(1, 3000), st.floats(0, 1))
def test_a_change_makes_the_new_tensor_of_the_old_one(seed, itemsize, size, share):
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 256, size * itemsize, np.uint8)
    new = np.where(np.repeat(rng.random(size) < share, itemsize), rng.integers(0, 256, old.size, np.uint8), old)
    made = Change.from_json(json.loads(json.dumps(change(old, new, itemsize, "base").to_json())))
    for _ in range(2):  # applied again it does no harm
        made.apply(old)
        assert np.array_equal(old, new)
    assert made.base == "base"


@pytest.mark.parametrize(("gap", "size"), [(255, 1), (256, 2), (65535, 2), (65536, 4)])
def test_gaps_take_the_bytes_that_they_need(gap, size):
    old = np.zeros(2 * (gap + 1), np.uint8)
    new = old.copy()
    new.view(np.uint16)[gap] = 1
    made = change(old, new, 2, "")
    assert made.nbytes == size + 2
    made.apply(old)
    assert np.array_equal(old, new)


def test_nothing_changed_is_nothing_to_send():
    assert change(np.ones(64, np.uint8), np.ones(64, np.uint8), 4, "").nbytes == 0


def test_a_change_that_does_not_fit_is_refused():
    made = change(np.zeros(8, np.uint8), np.ones(8, np.uint8), 2, "")
    with pytest.raises(ValueError, match="element 3 of a tensor of 2"):
        made.apply(np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match=r"4 gaps, 2 values"):
        Change.from_json({**made.to_json(), "values": "AQEBAQ=="})
    with pytest.raises(ValueError, match="types"):
        Change.from_json({**made.to_json(), "value_type": "<f4"})
