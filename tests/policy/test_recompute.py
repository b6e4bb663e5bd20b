"""Activations computed again give the gradients of activations kept, to the last digit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fapo.errors import ConfigError
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import PolicySettings
from tests.policy.lives import LOSS, Exported, export, policy_settings, save_tiny, step_batch

Process = Callable[[PolicySettings], LocalRanks]
MODULES = ("core_attn", "mlp")


def updated(ranks: LocalRanks) -> tuple[Any, Exported]:
    answer = ranks.call("update", step_batch(0, ranks.layout, updates=2), LOSS)[0]
    return answer.updates, export(ranks)


@pytest.fixture(scope="module")
def kept(process: Process, qwen3: Path) -> tuple[Any, Exported]:
    return updated(process(policy_settings(qwen3)))


@pytest.mark.parametrize(
    "changes",
    [
        *({"recompute": "selective", "recompute_modules": [module]} for module in MODULES),
        {"recompute": "selective", "recompute_modules": MODULES},
        {"recompute": "full"},
        {"recompute": "full", "recompute_layers": 1},
    ],
    ids=[*MODULES, "both", "full", "full, one layer"],
)
def test_gradients_and_weights_are_those_of_activations_kept(
    process: Process, qwen3: Path, kept: tuple[Any, Exported], changes: dict[str, Any]
) -> None:
    reports, weights = updated(process(policy_settings(qwen3).changed(**changes)))
    assert reports == kept[0]
    assert weights.digests == kept[1].digests


def test_a_mixture_of_experts_recomputes_its_experts(process: Process, tmp_path: Path) -> None:
    folder = save_tiny(
        "Qwen3Moe", tmp_path / "moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    )
    seen = [
        updated(process(policy_settings(folder).changed(recompute=kind, recompute_modules=["moe"])))
        for kind in ("none", "selective")
    ]
    assert seen[0][0] == seen[1][0]
    assert np.array_equal(*(np.concatenate([t.ravel() for t in s[1].tensors.values()]) for s in seen))


def test_what_makes_no_sense_is_refused(process: Process, qwen3: Path) -> None:
    with pytest.raises(ValueError, match="recompute_layers needs recompute = full, found none"):
        policy_settings(qwen3).changed(recompute_layers=1)
    settings = policy_settings(qwen3)
    with pytest.raises(ConfigError, match="cpu_offload needs a CUDA device"):
        process(settings.changed(optimizer=settings.optimizer.changed(cpu_offload=0.5)))
    with pytest.raises(ConfigError, match="layernorm needs Transformer Engine"):
        process(settings.changed(recompute="selective", recompute_modules=["layernorm"]))
