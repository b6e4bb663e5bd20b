"""FP8 weights: within e4m3's rounding of what they were, under the names and shapes that SGLang expects."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.errors import DataError
from megatron_fapo.fp8 import BLOCK, LARGEST, RELATIVE_ERROR, SMALLEST_STEP, Fp8, plan
from megatron_fapo.policy import quantize as module
from megatron_fapo.policy.quantize import allowed, blockwise, dequantize, per_tensor, quantize
from tests.policy import modelopt_fp8
from tests.policy.modelopt_fp8 import drawn

NAME = "model.layers.0.mlp.down_proj.weight"
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@given(
    st.integers(0, 2**31), st.integers(1, 200), st.integers(1, 200), DTYPES, st.sampled_from([blockwise, per_tensor])
)
def test_every_value_comes_back_within_the_rounding_of_e4m3(seed, rows, columns, dtype, form):
    matrix = drawn(seed, rows, columns, dtype)
    values, scale = form(matrix)
    error = (dequantize(values, scale) - matrix.float()).abs()
    steps = dequantize(torch.full_like(matrix, SMALLEST_STEP).to(values.dtype), scale)
    bound = torch.maximum(matrix.float().abs() * RELATIVE_ERROR, steps / 2)
    assert bool((error <= bound * (1 + 1e-6)).all())
    assert bool((error <= allowed(matrix.float(), scale)).all())
    assert allowed(matrix.float(), scale).expand_as(error).sub(bound).abs().max() <= 1e-5 * bound.max()


@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 300), DTYPES)
def test_each_block_is_scaled_by_its_own_largest_value(seed, rows, columns, dtype):
    matrix = drawn(seed, rows, columns, dtype)
    values, scale = blockwise(matrix)
    for row in range(0, rows, BLOCK):
        for column in range(0, columns, BLOCK):
            block = (slice(row, row + BLOCK), slice(column, column + BLOCK))
            alone = per_tensor(matrix[block])
            assert scale[row // BLOCK, column // BLOCK] == alone[1][0]
            assert torch.equal(values[block].view(torch.uint8), alone[0].contiguous().view(torch.uint8))
            if matrix[block].any():
                assert values[block].float().abs().max() == LARGEST


def test_the_result_does_not_depend_on_how_many_rows_are_taken_at_a_time(monkeypatch):
    matrix = drawn(1, 700, 260, torch.bfloat16)
    whole = [*blockwise(matrix), *per_tensor(matrix)]
    monkeypatch.setattr(module, "_AT_A_TIME", 1)
    for ours, theirs in zip([*blockwise(matrix), *per_tensor(matrix)], whole, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_zeros_stay_zeros_and_the_smallest_numbers_do_not_become_nan():
    for form in (blockwise, per_tensor):
        for matrix in (torch.zeros(130, 130), torch.full((130, 130), 1e-44)):
            values, scale = form(matrix)
            assert bool(scale.isfinite().all())
            assert dequantize(values, scale).abs().max() <= 1e-40


def test_the_bits_are_those_of_modelopt():
    theirs = np.load(modelopt_fp8.FILE)
    for form in (blockwise, per_tensor):
        values, scale = form(modelopt_fp8.matrix())
        assert np.array_equal(values.view(torch.uint8).numpy(), theirs[f"{form.__name__}_values"])
        assert np.array_equal(scale.numpy(), theirs[f"{form.__name__}_scale"])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scales", ["blockwise", "tensor"])
def test_what_is_not_finite_is_named(wrong, scales):
    matrix = torch.ones(256, 256)
    matrix[200, 3] = wrong
    with pytest.raises(DataError, match=f"{NAME}: holds values that are not finite"):
        quantize(plan({NAME: (256, 256)}, scales), NAME, matrix)


QWEN = {
    "model.embed_tokens.weight": (1000, 256),
    "model.layers.0.input_layernorm.weight": (256,),
    "model.layers.0.self_attn.q_proj.weight": (512, 256),
    "model.layers.0.self_attn.q_proj.bias": (512,),
    "model.layers.0.self_attn.k_proj.weight": (128, 256),
    "model.layers.0.self_attn.v_proj.weight": (128, 256),
    "model.layers.0.self_attn.o_proj.weight": (256, 512),
    "model.layers.0.mlp.gate_proj.weight": (768, 256),
    "model.layers.0.mlp.up_proj.weight": (768, 256),
    "model.layers.0.mlp.down_proj.weight": (256, 768),
    "lm_head.weight": (1000, 256),
}


def modules(fp8: Fp8) -> set[str]:
    return {name.split(".")[-2] for name in fp8.matrices}


def test_matrices_become_fp8_and_nothing_else():
    fp8 = plan(QWEN, "blockwise")
    assert modules(fp8) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert fp8.kept == ("lm_head",)
    for name, shape in QWEN.items():
        made = quantize(fp8, name, torch.randn(shape))
        assert [(n, tuple(t.shape), str(t.dtype)) for n, t in made] == [
            (n, s, f"torch.{d}") for n, s, d in fp8.tensors(name, shape)
        ]
    assert fp8.tensors("model.layers.0.mlp.up_proj.weight", (768, 256)) == (
        ("model.layers.0.mlp.up_proj.weight", (768, 256), "float8_e4m3fn"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", (6, 2), "float32"),
    )


def test_what_sglang_fuses_is_fp8_as_a_whole_or_not_at_all():
    narrow = QWEN | {"model.layers.0.self_attn.k_proj.weight": (64, 256)}
    fp8 = plan(narrow, "blockwise")
    assert modules(fp8) == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")} < set(fp8.kept)
    assert modules(plan(narrow, "tensor")) == modules(plan(QWEN, "tensor")) == modules(plan(QWEN, "blockwise"))


def test_servers_of_several_ranks_take_what_their_parts_allow():
    assert modules(plan(QWEN, "blockwise", tensor_parallel=2, kv_heads=1)) == modules(plan(QWEN, "blockwise"))
    # 768 / 4 is no multiple of 128, and neither is a quarter of two heads of keys
    assert modules(plan(QWEN, "blockwise", tensor_parallel=4, kv_heads=2)) == {"o_proj"}


def test_experts_stay_together_and_routers_stay_bf16():
    layer = "model.layers.1.mlp"
    shapes = {f"{layer}.gate.weight": (4, 256)}
    for expert in range(4):
        for name in ("gate_proj", "up_proj"):
            shapes[f"{layer}.experts.{expert}.{name}.weight"] = (128, 256)
        shapes[f"{layer}.experts.{expert}.down_proj.weight"] = (256, 128)
    fp8 = plan(shapes, "blockwise")
    assert (len(fp8.matrices), fp8.kept) == (12, ("lm_head", f"{layer}.gate"))
    none = plan(shapes | {f"{layer}.experts.3.up_proj.weight": (64, 256)}, "blockwise")
    assert (none.matrices, none.kept) == (frozenset(), ("lm_head", f"{layer}.experts", f"{layer}.gate"))
