"""Hugging Face folders into Megatron checkpoints and back: bit for bit, at every layout, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_fapo.errors import CheckpointDamaged, DataError
from megatron_fapo.policy.convert import difference, to_hugging_face, to_megatron
from megatron_fapo.policy.hf_folder import Weights
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import PolicySettings
from tests.policy.lives import LAYOUTS, export, policy_settings, save_tiny
from tests.policy.test_models import MODELS

Elsewhere = Callable[..., Any]
Process = Callable[[PolicySettings], LocalRanks]

CONVERTED = ("qwen2, untied", "qwen3, tied, wide heads", "llama3, untied", "qwen3 moe")


@pytest.fixture(scope="module")
def made(elsewhere: Elsewhere, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A model's Hugging Face folder with all that may lie in one, and its Megatron checkpoint."""
    found: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in found:
            kind, changes = MODELS[name]
            root = tmp_path_factory.mktemp("convert")
            source = save_tiny(kind, root / "source", **changes)
            (source / "chat_template.jinja").write_text("{{ messages }}")
            elsewhere(to_megatron, source, root / "megatron")
            found[name] = (source, root / "megatron")
        return found[name]

    return make


@pytest.mark.parametrize("name", CONVERTED)
def test_there_and_back_is_bit_for_bit(elsewhere: Elsewhere, made: Any, tmp_path: Path, name: str) -> None:
    source, megatron = made(name)
    elsewhere(to_hugging_face, megatron, tmp_path / "back", None, 20_000)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert all(len(load_file(tmp_path / "back" / file)) == 1 or (tmp_path / "back" / file).stat().st_size < 21_000
               for file in files)  # fmt: skip
    expected, found = load_file(source / "model.safetensors"), Weights(tmp_path / "back")
    assert found.names == set(expected)
    for key, tensor in expected.items():
        assert np.array_equal(found.read(key).numpy(), tensor), key
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


@pytest.mark.parametrize("name", CONVERTED)
def test_transformers_loads_it_and_computes_the_same(
    elsewhere: Elsewhere, made: Any, tmp_path: Path, name: str
) -> None:
    _, megatron = made(name)
    elsewhere(to_hugging_face, megatron, tmp_path / "back")
    gap, largest = elsewhere(difference, tmp_path / "back", megatron)
    assert gap <= 1e-5
    assert largest > 0.1


def test_what_lies_beside_the_weights_goes_along_both_ways(elsewhere: Elsewhere, made: Any, tmp_path: Path) -> None:
    source, megatron = made("qwen2, untied")
    elsewhere(to_hugging_face, megatron, tmp_path / "back")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_text() == (source / name).read_text()
    here, there = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert here == there
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted(path.name for path in source.iterdir())
    assert len({path.stat().st_mode for path in (tmp_path / "back").iterdir()}) == 1  # whoever reads one reads all


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("qwen3, tied, wide heads", {}),
        ("qwen3, tied, wide heads", {"tensor": 2}),
        ("qwen3, tied, wide heads", {"pipeline": 2}),
        ("qwen3 moe", {"expert": 2, "data": 2}),
        ("qwen3 moe", {"tensor": 2, "sequence": True, "expert": 2}),
    ],
    ids=str,
)
def test_a_policy_starts_from_the_checkpoint_at_any_layout(
    process: Process, made: Any, name: str, axes: dict[str, Any]
) -> None:
    source, megatron = made(name)
    ours = export(process(policy_settings(megatron, **axes))).tensors
    theirs = load_file(source / "model.safetensors")
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        assert np.array_equal(ours[key], tensor), key


@pytest.mark.parametrize("name", ["one", "dp2"])
def test_a_runs_checkpoint_becomes_a_hugging_face_folder(
    elsewhere: Elsewhere, lives: Any, qwen3: Path, tmp_path: Path, name: str
) -> None:
    assert name in LAYOUTS
    life = lives(name)
    with pytest.raises(DataError, match=r"config.json is missing: name the model's Hugging Face folder"):
        elsewhere(to_hugging_face, life.saved, tmp_path / "model")
    elsewhere(to_hugging_face, life.saved, tmp_path / "model", qwen3)
    found = Weights(tmp_path / "model")
    assert found.names == set(life.after.tensors)
    for key, tensor in life.after.tensors.items():
        assert np.array_equal(found.read(key).numpy(), tensor), key


def test_bfloat16_stays_bfloat16(elsewhere: Elsewhere, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = save_tiny("Llama", tmp_path / "source")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    elsewhere(to_megatron, source, tmp_path / "megatron")
    elsewhere(to_hugging_face, tmp_path / "megatron", tmp_path / "back")
    ours, theirs = Weights(tmp_path / "back"), Weights(source)
    assert ours.names == theirs.names
    for name in theirs.names:
        assert ours.read(name).dtype == torch.bfloat16
        assert torch.equal(ours.read(name), theirs.read(name))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_does_not_fit_is_named_and_leaves_nothing(elsewhere: Elsewhere, made: Any, tmp_path: Path) -> None:
    source, megatron = made("qwen2, untied")
    other = save_tiny("Qwen2", tmp_path / "other", tie_word_embeddings=False, intermediate_size=56)
    with pytest.raises(DataError, match=r"fc1.weight has shape \[2, 96, 32\], the model asks for \[2, 112, 32\]"):
        elsewhere(to_hugging_face, megatron, tmp_path / "back", other)
    (source / "config.json").rename(source / "kept")
    (source / "config.json").write_text((other / "config.json").read_text())
    try:
        with pytest.raises(DataError, match=r"gate_proj.weight has shape \[48, 32\], its config asks for \[56, 32\]"):
            elsewhere(to_megatron, source, tmp_path / "megatron")
    finally:
        (source / "kept").rename(source / "config.json")
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "megatron").exists()


def test_a_damaged_checkpoint_is_named(elsewhere: Elsewhere, made: Any, tmp_path: Path) -> None:
    _, megatron = made("llama3, untied")
    (file,) = megatron.glob("*.distcp")
    good = file.read_bytes()
    try:
        file.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
        with pytest.raises(CheckpointDamaged, match=f"{file.name}: damaged"):
            elsewhere(to_hugging_face, megatron, tmp_path / "back")
    finally:
        file.write_bytes(good)
    assert not (tmp_path / "back").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_fapo.policy.convert import {function}

def progress(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

{function}(Path(sys.argv[1]), Path(sys.argv[2]), progress=progress)
"""


@pytest.mark.parametrize("function", ["to_megatron", "to_hugging_face"])
def test_killed_midway_it_leaves_nothing_that_looks_finished(
    elsewhere: Elsewhere, made: Any, tmp_path: Path, function: str
) -> None:
    source = made("qwen2, untied")[function == "to_hugging_face"]
    target = tmp_path / "target"
    run = subprocess.run(
        [sys.executable, "-c", KILLED.format(function=function), source, target],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".target.partial"]
    with pytest.raises((DataError, CheckpointDamaged)):
        elsewhere(to_hugging_face, tmp_path / ".target.partial", tmp_path / "again", made("qwen2, untied")[0])
    elsewhere({"to_megatron": to_megatron, "to_hugging_face": to_hugging_face}[function], source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
