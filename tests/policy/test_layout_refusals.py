"""Layouts that cannot work, or would train wrongly in silence, are refused with the reason before anything is built."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_fapo.batch.layout import Layout
from megatron_fapo.errors import ConfigError
from megatron_fapo.policy.layouts import check_backend, check_layout
from megatron_fapo.policy.settings import ParallelSettings
from tests.policy.lives import save_tiny, step_batch
from tests.policy.matrix import DENSE, MOE, Pool, live, settings_of

QWEN3 = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 4}
QWEN3_MOE = {**QWEN3, "intermediate_size": 45, "num_experts": 4, "moe_intermediate_size": 24}


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({"sequence": True}, "sequence needs tensor of 2 or more"),
        ({"virtual_pipeline": 2}, "virtual_pipeline = 2 needs pipeline of 2 or more"),
        ({"expert": 2}, "expert × expert_tensor = 2 does not divide tensor × context × data = 1"),
        ({"expert": 4, "pipeline": 4, "data": 2}, "= 4 does not divide tensor × context × data = 2"),
    ],
)
def test_axes_that_contradict_each_other_are_refused(chosen: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ParallelSettings(**chosen)


@pytest.mark.parametrize(
    ("model", "chosen", "reason"),
    [
        (QWEN3, {"tensor": 4}, "tensor = 4 does not divide the model's num_key_value_heads = 2"),
        (QWEN3, {"pipeline": 3}, "pipeline = 3 does not divide the model's num_hidden_layers = 4"),
        (QWEN3, {"pipeline": 2, "virtual_pipeline": 3}, "virtual_pipeline = 3 times pipeline = 2 does not divide"),
        (QWEN3, {"expert": 2, "data": 2}, "the model has no experts"),
        (QWEN3_MOE, {"expert": 3, "data": 3}, "expert = 3 does not divide the model's num_experts = 4"),
        (QWEN3_MOE, {"tensor": 2, "expert": 2}, "needs sequence=true for a mixture of experts"),
        (QWEN3_MOE, {"tensor": 2, "sequence": True}, "unsummed; set expert_tensor=2, or expert above 1"),
        (QWEN3_MOE, {"expert_tensor": 2, "data": 2}, "expert_tensor = 2 must be 1 or tensor = 1"),
        (
            {**QWEN3_MOE, "moe_intermediate_size": 25},
            {"tensor": 2, "sequence": True, "expert_tensor": 2},
            "expert_tensor = 2 does not divide the model's moe_intermediate_size = 25",
        ),
    ],
)
def test_a_layout_that_does_not_fit_the_model_is_refused(
    model: dict[str, Any], chosen: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_layout(model, ParallelSettings(**chosen))


@pytest.mark.parametrize(
    ("backend", "chosen", "reason"),
    [
        ("gloo", {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2, "data": 2}, "which gloo cannot"),
        ("nccl", {"pipeline": 2, "virtual_pipeline": 2}, "mix up the shapes of microbatches"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(backend: str, chosen: dict[str, Any], reason: str) -> None:
    parallel = ParallelSettings(**chosen)
    with pytest.raises(ConfigError, match=reason):
        check_backend(parallel, backend)
    check_backend(parallel, {"gloo": "nccl", "nccl": "gloo"}[backend])


def test_the_matrix_is_accepted() -> None:
    for model, layouts in ((QWEN3, DENSE), (QWEN3_MOE, MOE)):
        for chosen in layouts.values():
            parallel = ParallelSettings(**{axis: size for axis, size in chosen.items() if axis != "distributed"})
            check_layout(model, parallel)
            check_backend(parallel, "gloo")


def test_ranks_refuse_too(pool: Pool, tmp_path: Path) -> None:
    folder = save_tiny("Qwen3", tmp_path, head_dim=16)
    with pytest.raises(ConfigError, match="the model has no experts"):
        live(pool, settings_of(folder, {"expert": 2, "data": 2}))


def test_rows_and_microbatches_come_in_the_multiples_that_a_layout_needs() -> None:
    assert Layout(tp=2, cp=2).length_multiple == 4
    assert Layout(tp=2, cp=2, sp=True).length_multiple == 8
    assert Layout(tp=4, sp=True).length_multiple == 4
    assert len(step_batch(0, Layout(pp=2, dp=2)).minibatches[0].microbatches) % 2 == 1
    assert len(step_batch(0, Layout(pp=2, vpp=2, dp=2)).minibatches[0].microbatches) % 2 == 0
