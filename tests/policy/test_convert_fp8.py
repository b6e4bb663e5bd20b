"""FP8 folders: made of either kind of folder, what their config says, read again as the floats that they stand for."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_fapo.errors import ConfigError, DataError, PolicyError
from megatron_fapo.fp8 import kept_by, plan
from megatron_fapo.held import HeldDigests, HeldLayout
from megatron_fapo.policy.convert import difference, fp8_error, to_hugging_face, to_megatron
from megatron_fapo.policy.hf_folder import Weights
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.quantize import allowed, quantize
from megatron_fapo.policy.settings import PolicySettings
from megatron_fapo.weights import Segment, digest, shared_memory_folder
from tests.policy.lives import export, policy_settings, save_tiny

Elsewhere = Callable[..., Any]
Process = Callable[[PolicySettings], LocalRanks]

WIDE = {"hidden_size": 128, "num_key_value_heads": 4, "intermediate_size": 256, "head_dim": 32}
MODELS = {
    "dense, tied": ("Qwen3", WIDE),
    "bias, untied": ("Qwen2", WIDE | {"tie_word_embeddings": False}),
    "experts": (
        "Qwen3Moe",
        WIDE | {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True},
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            kind, changes = MODELS[name]
            made[name] = save_tiny(kind, tmp_path_factory.mktemp("wide"), **changes)
        return made[name]

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("scales", ["blockwise", "tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_has_each_tensor_as_the_plan_says(
    elsewhere: Elsewhere, source: Any, tmp_path: Path, name: str, scales: Any
) -> None:
    before = tensors(source(name))
    fp8 = plan({key: tuple(tensor.shape) for key, tensor in before.items()}, scales)
    assert fp8.matrices
    assert elsewhere(to_hugging_face, source(name), tmp_path / "fp8", None, 60_000, _quiet, scales) == fp8
    found = tensors(tmp_path / "fp8")
    expected = dict(part for key, tensor in before.items() for part in quantize(fp8, key, tensor))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert (config["dtype"], config["quantization_config"]) == ("bfloat16", fp8.config())
    assert (tmp_path / "fp8" / "tokenizer.json").read_text() == "{}"


def _quiet(done: int, total: int) -> None:
    assert done <= total


def test_a_megatron_checkpoint_gives_the_same_folder(elsewhere: Elsewhere, source: Any, tmp_path: Path) -> None:
    elsewhere(to_megatron, source("experts"), tmp_path / "megatron")
    for place, folder in (("direct", source("experts")), ("by megatron", tmp_path / "megatron")):
        elsewhere(to_hugging_face, folder, tmp_path / place, None, 10**9, _quiet, "blockwise")
    direct, again = tensors(tmp_path / "direct"), tensors(tmp_path / "by megatron")
    assert direct.keys() == again.keys()
    assert all(torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in direct.items())


def test_the_error_is_measured_and_a_changed_value_is_seen(elsewhere: Elsewhere, source: Any, tmp_path: Path) -> None:
    folder = source("bias, untied")
    elsewhere(to_hugging_face, folder, tmp_path / "fp8", None, 10**9, _quiet, "blockwise")
    found = elsewhere(fp8_error, folder, tmp_path / "fp8")
    assert 0.9 < found.worst <= 1.0
    assert 0.02 < found.root_mean_square < 0.03
    assert 0.0 < found.logits < 0.2 * found.largest_logit
    (file,) = (tmp_path / "fp8").glob("*.safetensors")
    changed = load_file(file)
    value = changed["model.layers.1.mlp.down_proj.weight"].view(torch.uint8)
    value[7, 9] ^= 0b1000  # the exponent's last bit
    save_file(changed, file)
    assert elsewhere(fp8_error, folder, tmp_path / "fp8").worst > 1.5
    changed["model.norm.weight"][0] += 1.0
    save_file(changed, file)
    with pytest.raises(DataError, match=r"model.norm.weight is not what it is in"):
        elsewhere(fp8_error, folder, tmp_path / "fp8")


def test_a_policy_starts_from_an_fp8_folder_and_a_checkpoint_of_it_is_plain(
    elsewhere: Elsewhere, process: Process, source: Any, tmp_path: Path
) -> None:
    elsewhere(to_hugging_face, source("dense, tied"), tmp_path / "fp8", None, 10**9, _quiet, "tensor")
    weights, before = Weights(tmp_path / "fp8"), tensors(source("dense, tied"))
    ours = export(process(policy_settings(tmp_path / "fp8", tensor=2)), 300_000).tensors
    assert ours.keys() == before.keys() == weights.names
    for name, tensor in before.items():
        assert torch.equal(torch.from_numpy(ours[name]), weights.read(name).float())
        scale = weights.scale(name)
        if scale is not None:
            assert bool(((weights.read(name) - tensor).abs() <= allowed(tensor, scale)).all())
    elsewhere(to_megatron, tmp_path / "fp8", tmp_path / "megatron")
    elsewhere(to_hugging_face, tmp_path / "megatron", tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    for name, tensor in tensors(tmp_path / "plain").items():
        assert torch.equal(tensor, weights.read(name).to(torch.bfloat16))
    gap, largest = elsewhere(difference, tmp_path / "plain", tmp_path / "megatron")
    assert gap <= 1e-5 * largest


def test_published_in_fp8_from_two_ranks_it_is_the_folder_bit_for_bit(
    process: Process, elsewhere: Elsewhere, source: Any, tmp_path: Path
) -> None:
    elsewhere(to_hugging_face, source("dense, tied"), tmp_path / "fp8", None, 10**9, _quiet, "blockwise")
    kept = kept_by(json.loads((tmp_path / "fp8" / "config.json").read_text()))
    ranks = process(policy_settings(source("dense, tied"), tensor=2))
    layout = HeldLayout(engine="sglang", kv_heads=4, kept_in_bf16=kept)
    found, specs = {}, []
    segment = Segment.create(shared_memory_folder() / f"fapo-test-fp8-{os.getpid()}", 300_000)
    try:
        ranks.call("open_export", (layout,))
        while (bucket := ranks.call("next_bucket", str(segment.path), 300_000)[0]) is not None:
            specs += bucket.tensors
            for spec in bucket.tensors:
                dtype = getattr(torch, spec.dtype)
                data = segment.memory[spec.offset : spec.offset + prod(spec.shape) * dtype.itemsize]
                assert spec.digest == digest(data)
                found[spec.name] = torch.frombuffer(bytearray(data), dtype=dtype).view(spec.shape)
        held = ranks.call("expected", layout)[0]
        with pytest.raises(PolicyError, match="hold weights in different forms"):
            ranks.call("open_export", (layout, HeldLayout()))
    finally:
        segment.remove()
    expected = tensors(tmp_path / "fp8")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    again, weights = HeldDigests(layout), Weights(tmp_path / "fp8")
    for spec in specs:
        if spec.name in weights.names:  # of a matrix, SGLang sums the BF16 that it stands for
            plain = weights.read(spec.name).to(torch.bfloat16).view(torch.uint8).numpy()
            again.add(replace(spec, dtype="bfloat16"), memoryview(plain).cast("B"))
    assert held == again.result()


def test_what_cannot_be_is_refused_by_name(elsewhere: Elsewhere, source: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no matrix has a size that SGLang takes in FP8 \(blockwise, 64 ranks\)"):
        elsewhere(to_hugging_face, source("dense, tied"), tmp_path / "x", None, 10**9, _quiet, "blockwise", 64)
    elsewhere(to_hugging_face, source("dense, tied"), tmp_path / "fp8", None, 10**9, _quiet, "blockwise")
    (file,) = (tmp_path / "fp8").glob("*.safetensors")
    changed, name = load_file(file), "model.layers.0.mlp.down_proj.weight"
    save_file(changed | {f"{name}_scale_inv": torch.ones(128, 1)}, file)
    with pytest.raises(
        DataError, match=r"weight_scale_inv has shape \[128, 1\]; supported: one scale, or one for each"
    ):
        Weights(tmp_path / "fp8").read(name)
    save_file({key: tensor for key, tensor in changed.items() if key != f"{name}_scale_inv"}, file)
    with pytest.raises(
        DataError, match=r"down_proj.weight is stored as F8_E4M3; supported: .* and F8_E4M3 with scales"
    ):
        Weights(tmp_path / "fp8").dtype(name)
    with safe_open(file, "pt") as opened:
        assert opened.get_tensor(name).dtype == torch.float8_e4m3fn
