"""Models at their true size, without their weights: every tensor of the checkpoint exactly once at every layout."""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from megatron_fapo.config import read_config as read_run
from megatron_fapo.errors import ConfigError, DataError
from megatron_fapo.plan.shape import Shape, part
from megatron_fapo.policy.settings import ParallelSettings
from megatron_fapo.policy.shapes import Survey, checkpoint_shapes, read_config, survey
from tests.policy.lives import save_tiny

Elsewhere = Callable[..., Any]
CONFIGS = Path(__file__).parents[2] / "configs" / "models"

# parameters as the index of the published checkpoint has them: half of its `total_size` in bytes
PUBLISHED = {
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-math-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "llama-3.3-70b": 70_553_706_496,
    "qwen3-4b": 4_022_468_096,
    "qwen3-4b-instruct-2507": 4_022_468_096,
    "fapo-genrm-4b": 4_022_468_096,
    "qwen3-30b-a3b": 30_532_122_624,
}
TENSOR8 = {"tensor": 8, "sequence": True}
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2.5-7b", {"tensor": 4, "sequence": True}),
    ("qwen2.5-32b", {"tensor": 4, "pipeline": 4, "virtual_pipeline": 4}),
    ("qwen2.5-72b", {**TENSOR8, "pipeline": 4}),
    ("qwen3-4b", {"tensor": 2, "pipeline": 2}),
    ("fapo-genrm-4b", {"tensor": 2, "sequence": True}),
    ("qwen3-30b-a3b", {"tensor": 4, "sequence": True, "expert": 4}),
    ("qwen3-30b-a3b", {"pipeline": 4, "expert": 4, "data": 4}),
]
"""Layouts beside those of the shipped runs."""
RUNS = {
    path.stem: read_run(path).policy
    for path in [*sorted(CONFIGS.parent.glob("*.yaml")), CONFIGS.parent / "judge" / "genrm-4b.yaml"]
}
CASES = [
    *((name, ParallelSettings(**axes), f"{name} {axes}") for name, axes in LAYOUTS),
    *((run.model.name.lower(), run.parallel.with_fewest_copies(), f"{name}.yaml") for name, run in RUNS.items()),
]
LONG = ("qwen3-30b-a3b {", "qwen2.5-72b")
MARKED = [
    pytest.param(name, parallel, id=case, marks=[pytest.mark.long] if case.startswith(LONG) else [])
    for name, parallel, case in CASES
]


@pytest.mark.parametrize(("name", "parallel"), MARKED)
def test_every_tensor_exactly_once_and_the_ranks_add_up(
    elsewhere: Elsewhere, name: str, parallel: ParallelSettings
) -> None:
    config = read_config(CONFIGS / f"{name}.json")
    found: Survey = elsewhere(survey, config, parallel)
    assert found.problems() == []
    assert found.parameters == PUBLISHED[name]
    assert len(found.ranks) == parallel.world
    assert sum(rank.layers for rank in found.ranks) == config.num_hidden_layers * parallel.world // parallel.pipeline
    assert planned_equals_built(CONFIGS / f"{name}.json", parallel, found)


def planned_equals_built(config: Path, parallel: ParallelSettings, found: Survey) -> bool:
    """The planner's closed forms (`plan.shape`) are what Megatron builds, on every rank."""
    shape = Shape.of(json.loads(config.read_text()))
    stages = [part(shape, parallel, stage).parameters for stage in range(parallel.pipeline)]
    built = [rank.parameters for rank in found.ranks]
    return shape.parameters == found.parameters and built == [stages[rank.stage] for rank in found.ranks]


def test_every_shipped_config_is_surveyed() -> None:
    surveyed = {name for name, _ in LAYOUTS} | {run.model.name.lower() for run in RUNS.values()}
    assert {file.stem for file in CONFIGS.glob("*.json")} == set(PUBLISHED) == surveyed
    assert set(RUNS) >= {"qwen2.5-math-7b", "qwen2.5-32b", "llama-3.3-70b", "qwen3-30b-a3b"}


ODD = {"vocab_size": 71, "tie_word_embeddings": True, "max_position_embeddings": 64, "num_hidden_layers": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}


@pytest.mark.parametrize(
    ("kind", "changes", "axes"),
    [
        ("Qwen3", {"head_dim": 16}, {"tensor": 2, "pipeline": 2}),
        ("Qwen3Moe", {**EXPERTS, "tie_word_embeddings": False}, {"tensor": 2, "sequence": True, "expert": 2}),
        ("Qwen3Moe", EXPERTS, {"tensor": 2, "sequence": True, "expert_tensor": 2, "expert": 2, "data": 2}),
    ],
    ids=["tied, odd vocabulary", "experts", "experts that are cut"],
)
def test_a_checkpoint_has_these_tensors(
    elsewhere: Elsewhere, kind: str, changes: dict[str, Any], axes: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_tiny(kind, tmp_path, **changes)
    config = read_config(folder)
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert checkpoint_shapes(config) == saved
    found: Survey = elsewhere(survey, config, ParallelSettings(**axes))
    assert found.problems() == []
    assert found.parameters == sum(prod(shape) for shape in saved.values())
    assert planned_equals_built(folder / "config.json", ParallelSettings(**axes), found)


def test_problems_are_named(elsewhere: Elsewhere) -> None:
    good: Survey = elsewhere(survey, read_config(CONFIGS / "qwen3-4b.json"), ParallelSettings(pipeline=2))
    expected = dict(good.expected)
    missing = expected.pop("model.norm.weight")
    wide = {**expected, "model.layers.0.mlp.up_proj.weight": (9728, 2561)}
    again = good.produced[:1] * 2 + good.produced[1:]
    found = Survey(expected=wide, produced=again, ranks=good.ranks).problems()
    assert found[0].endswith("is produced 2 times")
    assert found[1] == "model.norm.weight is not in the checkpoint"
    assert found[2].startswith("model.layers.0.mlp.up_proj.weight has shape [9728, 2560], the checkpoint [9728, 2561]")
    assert found[3].startswith("the ranks hold")
    assert len(found) == 4
    whole = {**expected, "model.norm.weight": missing, "lm_head.weight": (1, 1)}
    assert Survey(expected=whole, produced=good.produced, ranks=good.ranks).problems()[0] == (
        "lm_head.weight is not produced"
    )


def test_what_cannot_be_surveyed_is_named(elsewhere: Elsewhere, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tensor = 8 does not divide the model's num_attention_heads = 28"):
        elsewhere(survey, read_config(CONFIGS / "qwen2.5-7b.json"), ParallelSettings(**TENSOR8))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json"):
        read_config(tmp_path / "config.json")
