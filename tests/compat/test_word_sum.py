"""SGLang's sum of a parameter on CUDA, by what SGLang's own kernel gave."""

import numpy as np
import pytest
import torch

from megatron_fapo.compat.word_sum import TILE, WordSum
from megatron_fapo.held import HeldDigests, HeldLayout
from megatron_fapo.records import TensorSpec

OF_SGLANG = {
    1: "287a434620bde7f3",
    3: "c505603fe3c64571",
    4: "ba239b4e5cc690c8",
    2 * TILE * 4: "37e27b07c6a3f4f7",
    TILE * 4 + 12: "bd09a8917d933e1d",
    100003: "ff604f3034486d5e",
    3 * TILE * 4 + 2: "add803e6959d9250",
}
"""By bytes: what `gpu_tensor_hash` of SGLang 0.5.23 gives of them in Triton's interpreter."""


def the_bytes() -> dict[int, torch.Tensor]:
    """Random bytes of each size, drawn as they were for the values above."""
    generator, found = torch.Generator().manual_seed(0), {}
    for size in OF_SGLANG:
        found[size] = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
        torch.randint(0, size + 1, (3,), generator=generator)
    return found


def total(*parts: object) -> str:
    found = WordSum()
    for part in parts:
        found.update(part)
    return found.hexdigest()


@pytest.mark.parametrize("size", OF_SGLANG)
def test_it_is_the_sum_of_sglangs_kernel_however_the_bytes_are_cut(size: int) -> None:
    data = the_bytes()[size]
    assert total(data) == OF_SGLANG[size]
    for cut in {size // 3, 1, size - 1}:
        assert total(data[:cut], data[cut:].numpy()) == OF_SGLANG[size]


def test_any_other_byte_and_any_other_order_is_another_sum() -> None:
    data = the_bytes()[100003]
    for place in (0, TILE * 4, 100002):
        other = data.clone()
        other[place] ^= 1
        assert total(other) != OF_SGLANG[100003]
    assert total(data[4:], data[:4]) != OF_SGLANG[100003]
    assert total(data, torch.zeros(4, dtype=torch.uint8)) != OF_SGLANG[100003]
    assert total() == f"{0:016x}"


def test_fused_and_sharded_parameters_are_summed_so_where_the_layout_says() -> None:
    """Two ranks; query, key and value in one parameter."""
    rng = np.random.default_rng(0)
    sizes = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
    parts = {name: rng.integers(0, 256, (rows, 12), dtype=np.uint8) for name, rows in sizes.items()}
    held = HeldDigests(HeldLayout(engine="sglang", tensor_parallel=2, kv_heads=2, digest="words"), WordSum)
    for name, rows in parts.items():
        spec = TensorSpec(name=f"layer.{name}.weight", dtype="float32", shape=(len(rows), 3), offset=0, digest="")
        held.add(spec, rows.reshape(-1).data)
    for rank in (0, 1):
        mine = np.concatenate([rows[rank * len(rows) // 2 : (rank + 1) * len(rows) // 2] for rows in parts.values()])
        assert held.result()[f"layer.qkv_proj.weight@{rank}"] == total(mine)
