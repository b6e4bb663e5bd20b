"""The learning rate as a function of the update."""

import itertools

import pytest
from pydantic import ValidationError

from megatron_fapo.policy.schedule import learning_rate
from megatron_fapo.policy.settings import OptimizerSettings


def test_warm_up_then_constant() -> None:
    settings = OptimizerSettings(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(n, settings) for n in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_to_its_floor_and_stays() -> None:
    settings = OptimizerSettings(learning_rate=2.0, warmup_steps=2, schedule="cosine", decay_steps=12, floor=0.1)
    rates = [learning_rate(n, settings) for n in range(20)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[7] == pytest.approx(2.0 * 0.55)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[2:]))
    assert rates[12:] == pytest.approx([0.2] * 8)


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert learning_rate(0, OptimizerSettings(learning_rate=3.0, warmup_steps=0)) == 3.0


def test_cosine_needs_an_end() -> None:
    with pytest.raises(ValidationError, match="decay_steps greater than warmup_steps"):
        OptimizerSettings(schedule="cosine", warmup_steps=10, decay_steps=10)
