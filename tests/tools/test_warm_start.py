"""The warm start is made by Megatron and is an ordinary Hugging Face model that has begun to learn."""

import logging
from pathlib import Path

import pytest

from megatron_fapo.settings import load
from megatron_fapo.tasks.tokenizer import ChatTokenizer
from tools.warm_start import ROOT, WarmStartSettings, make

CONFIG = ROOT / "configs" / "clock" / "warm_start.yaml"


def test_the_shipped_configuration_loads() -> None:
    settings = load(WarmStartSettings, CONFIG)
    assert settings.model.vocabulary >= 75
    assert settings.optimizer.warmup_steps < min(settings.policy.steps, settings.judge.steps)


@pytest.mark.long
def test_both_models_learn_and_come_out_the_same_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    overrides = ["policy.steps=40", "judge.steps=20", "optimizer.warmup_steps=10"]
    settings = load(WarmStartSettings, CONFIG, overrides)
    with caplog.at_level(logging.INFO, "warm_start"):
        for name in ("one", "two"):
            make(settings, tmp_path / name)
    losses = [float(record.getMessage().split()[-1]) for record in caplog.records if record.name == "warm_start"]
    assert losses[:4] == losses[4:]
    assert losses[1] < losses[0] - 1.5, "policy"
    assert losses[3] < losses[2] - 1.0, "judge"
    for role in ("policy", "judge"):
        first, second = (tmp_path / name / role for name in ("one", "two"))
        assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
        model = AutoModelForCausalLM.from_pretrained(first)
        assert model.num_parameters() < 500_000
        assert len(AutoTokenizer.from_pretrained(first)) == ChatTokenizer.load(first).vocab_size


@pytest.mark.parametrize("role", ["policy", "judge"])
def test_the_shipped_models_are_of_this_configuration(role: str) -> None:
    from transformers import AutoConfig

    settings = load(WarmStartSettings, CONFIG)
    config = AutoConfig.from_pretrained(ROOT / "configs" / "clock" / "warm-start" / role)
    assert config.vocab_size == settings.model.vocabulary
    assert config.num_hidden_layers == settings.model.layers
