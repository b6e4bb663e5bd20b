"""BF16 with float32 master weights and reductions; FP8's settings, and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_fapo.batch.layout import Layout
from megatron_fapo.batch.pack import SupervisedExample, make_supervised_batch
from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.errors import ConfigError
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import Fp8Settings, OptimizerSettings, ParallelSettings, PolicySettings
from megatron_fapo.records import MiniBatch, UpdateReport, ints
from megatron_fapo.settings import build
from tests.policy.lives import VOCABULARY, policy_settings
from tests.policy.test_checkpoint import tensors_of

STEPS = 30


def examples(layout: Layout) -> MiniBatch:
    """Sequences that can be learnt by heart."""
    rng = np.random.default_rng(3)
    rows = [
        SupervisedExample(
            id=f"e{n}",
            prompt_ids=ints(rng.integers(1, VOCABULARY, rng.integers(2, 6))),
            response_ids=ints(rng.integers(1, VOCABULARY, rng.integers(4, 20))),
        )
        for n in range(8)
    ]
    return make_supervised_batch(rows, layout, BatchSettings(tokens_per_microbatch=64))


def learn(ranks: LocalRanks, steps: int = STEPS) -> list[UpdateReport]:
    batch = examples(ranks.layout)
    return [ranks.call("supervised_update", batch)[0] for _ in range(steps)]


def in_dtype(model: Path, dtype: str) -> PolicySettings:
    return policy_settings(model).changed(
        dtype=dtype, optimizer=OptimizerSettings(learning_rate=3e-3, warmup_steps=0, epsilon=1e-8)
    )


def test_bf16_learns_as_float32_does(qwen3: Path) -> None:
    curves = {}
    for dtype in ("float32", "bfloat16"):
        with LocalRanks(in_dtype(qwen3, dtype), seed=5) as ranks:
            curves[dtype] = np.array([report.loss for report in learn(ranks)])
    assert curves["float32"][-1] < 0.5 * curves["float32"][0]
    np.testing.assert_allclose(curves["bfloat16"], curves["float32"], atol=0.05, rtol=0.05)
    assert not np.array_equal(curves["bfloat16"], curves["float32"])


def test_master_weights_are_float32_and_come_back_from_a_checkpoint(qwen3: Path, tmp_path: Path) -> None:
    import torch

    settings = in_dtype(qwen3, "bfloat16")
    with LocalRanks(settings, seed=5) as ranks:
        learn(ranks, 5)
        ranks.call("save", str(tmp_path / "saved"))
        expected = learn(ranks, 3)
    with LocalRanks(settings, seed=9) as ranks:
        ranks.call("load", str(tmp_path / "saved"))
        ranks.call("save", str(tmp_path / "again"))
        assert learn(ranks, 3) == expected

    saved, again = tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "again")
    masters = [key for key in saved if key.startswith("optimizer.state.param.")]
    assert len(masters) == 10
    rounded = 0
    for key in masters:
        weight = saved[key.removeprefix("optimizer.state.param.")]
        assert (saved[key].dtype, weight.dtype) == (torch.float32, torch.bfloat16), key
        assert torch.equal(saved[key].bfloat16(), weight), key
        rounded += int((saved[key] != weight.float()).sum())
    assert rounded > 1000  # the masters hold what BF16 has no digits for
    for key, tensor in saved.items():
        assert torch.equal(tensor, again[key]), key


PROBE = """
import json, sys
from pathlib import Path
from megatron_fapo.policy.rank import PolicyRank
from megatron_fapo.policy.settings import PolicySettings
rank = PolicyRank()
rank.setup(0, 1, *rank.address(), PolicySettings.model_validate_json(sys.stdin.read()), 0)
(part,) = rank.model.parallel
print(json.dumps({
    "weights": sorted({str(p.dtype) for p in part.parameters()}),
    "gradients": sorted({str(p.main_grad.dtype) for p in part.parameters()}),
    "reduced": sorted({str(b.grad_data.dtype) for b in part.buffers}),
}))
"""


def test_gradients_are_summed_and_reduced_in_float32(qwen3: Path) -> None:
    settings = in_dtype(qwen3, "bfloat16").model_dump_json()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROBE], input=settings, capture_output=True, text=True, check=False, env=environment
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found == {"weights": ["torch.bfloat16"], "gradients": ["torch.float32"], "reduced": ["torch.float32"]}


def with_fp8(**values: object) -> dict:
    return {"model": "m", "dtype": "bfloat16", "fp8": values}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (with_fp8(recipe="delayed"), "set edge_layers_bf16 to 0"),
        (with_fp8(recipe="mxfp8"), "policy.fp8.recipe|fp8.recipe"),
        ({**with_fp8(), "dtype": "float32"}, "fp8 needs dtype = bfloat16, found float32"),
        (with_fp8(edge_layers_bf16=-1), "edge_layers_bf16"),
    ],
)
def test_fp8_that_cannot_be_is_refused_when_it_is_read(values: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(PolicySettings, values)


@pytest.mark.skipif("transformer_engine" in sys.modules, reason="this machine has Transformer Engine")
def test_fp8_on_a_cpu_is_refused_with_what_to_do(process: Callable[..., LocalRanks], qwen3: Path) -> None:
    ranks = process(policy_settings(qwen3))
    ranks.call("shutdown")
    host, port = ranks.call("address")[0]
    settings = in_dtype(qwen3, "bfloat16").changed(fp8=Fp8Settings())
    with pytest.raises(ConfigError, match=r"policy\.fp8 .* needs a GPU and Transformer Engine.* leave policy\.fp8 out"):
        ranks.call("setup", 0, 1, host, port, settings, 5)


def fp8_settings(recipe: str = "blockwise", edge: int = 1, **parallel: int) -> PolicySettings:
    return PolicySettings(
        model=Path("m"),
        dtype="bfloat16",
        fp8=Fp8Settings(recipe=recipe, edge_layers_bf16=edge),
        parallel=ParallelSettings(**parallel),
    )


MODEL = SimpleNamespace(hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_experts=0)


def able(prepared: list[str]) -> SimpleNamespace:
    """A device that takes every recipe, and writes down which."""
    return SimpleNamespace(prepare_fp8=prepared.append)


def test_fp8_in_megatrons_words() -> None:
    from megatron.core.transformer import TransformerConfig

    from megatron_fapo.policy.precision import fp8_flags

    prepared: list[str] = []
    flags = fp8_flags(MODEL, fp8_settings(), able(prepared))
    assert prepared == ["blockwise"]
    assert (flags["fp8"], flags["fp8_recipe"], flags["first_last_layers_bf16"]) == ("e4m3", "blockwise", True)
    assert not fp8_flags(MODEL, fp8_settings("delayed", 0), able(prepared))["first_last_layers_bf16"]
    assert fp8_flags(MODEL, PolicySettings(model=Path("m")), able(prepared)) == {}
    assert flags.keys() <= set(TransformerConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("settings", "model", "named"),
    [
        (fp8_settings(tensor=4), MODEL, "intermediate_size / tensor = 40"),
        (fp8_settings(), SimpleNamespace(**{**vars(MODEL), "hidden_size": 72}), "hidden_size = 72"),
        (fp8_settings(edge=3, pipeline=2), MODEL, "edge_layers_bf16 = 3 is more than the 2 layers"),
    ],
)
def test_shapes_that_fp8_kernels_do_not_take_are_refused(
    settings: PolicySettings, model: SimpleNamespace, named: str
) -> None:
    from megatron_fapo.policy.precision import fp8_flags

    with pytest.raises(ConfigError, match=named):
        fp8_flags(model, settings, able([]))


@pytest.mark.parametrize(
    ("recipe", "parallel", "expected"),
    [
        ("blockwise", {}, 128),
        ("tensorwise", {}, 16),
        ("tensorwise", {"tensor": 2}, 16),
        ("tensorwise", {"tensor": 2, "sequence": True}, 32),
        ("blockwise", {"tensor": 2, "sequence": True, "context": 2}, 128 * 2 * 4),
    ],
)
def test_tokens_of_a_matrix_product_are_a_multiple(recipe: str, parallel: dict, expected: int) -> None:
    from megatron_fapo.policy.precision import token_multiple

    assert token_multiple(fp8_settings(recipe, 0, **parallel)) == expected


@pytest.mark.parametrize("multiple", [16, 128])
def test_rows_padded_for_fp8_give_the_same_loss(qwen3: Path, multiple: int) -> None:
    """The padding that FP8 needs, in float32, where it must change nothing."""
    import torch

    from megatron_fapo.policy.forward import pad

    layout = Layout(total_multiple=multiple)
    batch = examples(Layout())
    for (micro,) in batch.microbatches:
        plain = pad(micro, torch.device("cpu"))
        padded = pad(micro, torch.device("cpu"), layout=layout)
        assert padded.tokens.numel() % multiple == 0
        assert padded.tokens.shape[1] - plain.tokens.shape[1] < multiple
        assert padded.real_tokens == plain.real_tokens
        assert torch.equal(padded.targets, plain.targets)
        width = plain.tokens.shape[1]
        assert torch.equal(padded.tokens[:, :width], plain.tokens)
        assert torch.equal(padded.tokens.reshape(-1)[padded.chosen], plain.tokens.reshape(-1)[plain.chosen])


def test_bf16_weights_are_exported_as_such(qwen3: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with LocalRanks(in_dtype(qwen3, "bfloat16"), seed=5) as ranks:
        ranks.call("save_hf", str(tmp_path))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        assert {str(weights.get_tensor(name).dtype) for name in weights.keys()} == {"torch.bfloat16"}  # noqa: SIM118
