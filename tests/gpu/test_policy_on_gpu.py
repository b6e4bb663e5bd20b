"""A rank on CUDA does what a rank on the CPU does, in the memory and time that it should.

These need torch, megatron-core and mbridge (see `probe`). With Transformer Engine installed the layers are its own,
without it they are ours on torch's scaled dot product.
"""

import json
import statistics
from pathlib import Path

import pytest

from megatron_fapo.policy.settings import OptimizerSettings, PolicySettings
from tests.gpu import expected
from tests.gpu.compare import BFLOAT16, FLOAT32, assert_near
from tests.gpu.probe import ROOT, Work, run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}
VOCABULARY = 512
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LARGE = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""The shape of Qwen3-1.7B, with random weights."""


def save_model(folder: Path, shape: dict) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape)).bfloat16().save_pretrained(folder)


def settings_of(model: Path, dtype: str, **changes: object) -> PolicySettings:
    optimizer = OptimizerSettings(learning_rate=1e-4, warmup_steps=0, epsilon=1e-3)
    return PolicySettings(model=model, dtype=dtype, optimizer=optimizer).changed(**changes)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_model(folder, SMALL)
    return folder


def small_work(model: Path, dtype: str) -> Work:
    return Work(settings=settings_of(model, dtype), lengths=[37, 5, 111, 64], vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def reference(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run(small_work(small, "float32"), tmp_path_factory.mktemp("cpu"), **CPU)


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", FLOAT32), ("bfloat16", BFLOAT16)])
def test_logits_losses_and_gradient_norms_are_those_of_the_cpu(
    card: str, small: Path, reference: dict, tmp_path: Path, dtype: str, allowed: object
) -> None:
    found = run(small_work(small, dtype), tmp_path)
    assert (found["device"], found["card"]) == ("cuda", card)
    assert_near(found, reference, allowed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_phase_holds_the_memory_that_it_should(card: str, small: Path, tmp_path: Path, dtype: str) -> None:
    found = run(small_work(small, dtype), tmp_path)
    sizes, held = expected.memory(found["parameters"], dtype), found["memory"]
    for kind, nbytes in sizes.items():
        assert found["freed"][kind] == pytest.approx(nbytes, rel=0.1, abs=1 << 16), kind
    last = max(phase for phase in held if phase.startswith("update"))
    workspace = held["away"]["held"]  # of cuBLAS, 64 MiB on Hopper, and a little
    assert workspace < 96 << 20
    assert held[last]["held"] - workspace == pytest.approx(sum(sizes.values()), rel=0.1, abs=4 << 20)
    assert held["back"]["held"] == pytest.approx(held[last]["held"], rel=0.05)


def test_an_optimizer_on_the_host_takes_no_memory_of_the_device(card: str, small: Path, tmp_path: Path) -> None:
    settings = settings_of(small, "bfloat16")
    away = settings.changed(optimizer=settings.optimizer.changed(cpu_offload=1.0))
    found = run(small_work(small, "bfloat16").model_copy(update={"settings": away}), tmp_path)
    assert found["freed"]["optimizer"] == 0
    assert found["freed"]["parameters"] > 0
    (tmp_path / "here").mkdir()
    assert_near(found, run(small_work(small, "bfloat16"), tmp_path / "here"), BFLOAT16)


def test_an_update_of_a_1_7b_model(card: str, tmp_path: Path) -> None:
    """Model FLOPs utilisation and peak memory; written to runs/gpu, because that is what this is for."""
    import transformers

    save_model(tmp_path / "model", LARGE)
    lengths = [2048] * 4
    settings = settings_of(tmp_path / "model", "bfloat16", deterministic=False, entropy=False)
    work = Work(settings=settings, lengths=lengths, steps=7, vocabulary=LARGE["vocab_size"], logits=False)
    found = run(work, tmp_path)
    seconds = statistics.median(found["seconds"][2:])
    flops = expected.update_flops(transformers.Qwen3Config(**LARGE), lengths * work.microbatches)
    top = expected.peak(card)
    result = {
        "card": card,
        "layers": found["layers"],
        "parameters": found["parameters"],
        "tokens": sum(lengths) * work.microbatches,
        "seconds": seconds,
        "mfu": None if top is None else flops / seconds / top,
        "memory": found["memory"],
    }
    folder = ROOT / "runs" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"update-1.7b-{found['layers']}.json").write_text(json.dumps(result, indent=1))
    if result["mfu"] is not None:
        assert 0.05 < result["mfu"] < 0.9, result
    assert found["memory"]["update 2"]["held"] == pytest.approx(
        sum(expected.memory(found["parameters"], "bfloat16").values()), rel=0.1
    )
