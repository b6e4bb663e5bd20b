"""Closed forms of a model's size. That every rank of Megatron's build has as many is tested where it is built, in
tests/policy/test_shapes.py."""

import json
from pathlib import Path

import pytest

from megatron_fapo.errors import ConfigError
from megatron_fapo.plan.shape import Shape, part
from megatron_fapo.policy.settings import ParallelSettings
from tests.policy.test_shapes import PUBLISHED

MODELS = Path(__file__).parents[2] / "configs" / "models"


def shape(name: str) -> Shape:
    return Shape.of(json.loads((MODELS / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_as_many_parameters_as_its_published_checkpoint(name: str) -> None:
    assert shape(name).parameters == PUBLISHED[name]


def test_ranks_of_all_stages_add_up_to_the_model_where_nothing_is_copied() -> None:
    model = shape("qwen2.5-7b")
    stages = [part(model, ParallelSettings(pipeline=4), stage).parameters for stage in range(4)]
    assert sum(stages) == model.parameters


def test_a_mixture_of_experts_meets_few_experts_with_one_sample_and_all_with_many() -> None:
    model = shape("qwen3-30b-a3b")
    alone, many = model.weights_met(1), model.weights_met(10_000)
    assert alone == pytest.approx(model.active + model.vocabulary * model.hidden, rel=1e-3)  # 3.3 of 30.5 billion
    assert many == pytest.approx(model.parameters - model.vocabulary * model.hidden, rel=1e-6)


def test_keys_and_values_of_a_token() -> None:
    assert shape("qwen2.5-32b").cache == 64 * 2 * 8 * 128 * 2  # layers, keys and values, heads, their size, bytes
    assert shape("qwen3-4b").cache == 147_456


def test_a_config_without_sizes_is_named() -> None:
    with pytest.raises(ConfigError, match="num_attention_heads"):
        Shape.of({"model_type": "qwen2"})
