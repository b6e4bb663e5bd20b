"""Planned bytes against those that real ranks of a small model free when they offload."""

import json
from pathlib import Path

import pytest

from megatron_fapo.plan.memory import state
from megatron_fapo.plan.shape import Shape, part
from megatron_fapo.policy.local import LocalRanks
from tests.policy.lives import LOSS, policy_settings, save_tiny, step_batch


@pytest.mark.long
@pytest.mark.parametrize(("axes", "dtype"), [({"tensor": 2}, "float32"), ({"data": 2}, "bfloat16")], ids=str)
def test_ranks_hold_what_was_planned(axes: dict[str, int], dtype: str, tmp_path: Path) -> None:
    folder = save_tiny("Qwen3", tmp_path, vocab_size=4003, hidden_size=64, head_dim=16, intermediate_size=176)
    settings = policy_settings(folder, **axes).changed(dtype=dtype)
    shape = Shape.of(json.loads((folder / "config.json").read_text()))
    planned = state(settings, part(shape, settings.parallel, 0))
    with LocalRanks(settings, seed=1) as ranks:
        ranks.call("update", step_batch(0, ranks.layout), LOSS)
        for freed in ranks.call("offload", ("parameters", "gradients", "optimizer")):
            # buffers of a distributed optimizer begin each parameter at a multiple of 64 elements
            for owner, measured in freed.items():
                assert getattr(planned, owner) == pytest.approx(measured, rel=0.01), owner
