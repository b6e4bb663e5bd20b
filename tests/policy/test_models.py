"""Every family goes into Megatron and out again bit for bit, and computes what transformers computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_fapo.batch.layout import Layout
from megatron_fapo.batch.pack import SupervisedExample, make_supervised_batch
from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import PolicySettings
from megatron_fapo.records import ints
from tests.policy.lives import VOCABULARY, export, policy_settings, save_tiny, split

Process = Callable[[PolicySettings], LocalRanks]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}

EXPERTS = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2, untied": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2, tied, yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3, tied, wide heads": ("Qwen3", {"head_dim": 16}),
    "qwen3, yarn with a factor": (
        "Qwen3",
        {"head_dim": 16, "tie_word_embeddings": False, "rope_parameters": {**YARN, "attention_factor": 1.3}},
    ),
    "llama3, untied": ("Llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "llama, tied, narrow heads, linear": ("Llama", {"head_dim": 4, "rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "qwen3 moe": ("Qwen3Moe", EXPERTS),
    "qwen3 moe, weights not normalised": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": False}),
}
LAYOUTS = {
    "one": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "ep2": {"expert": 2, "data": 2},
    "tp2 ep2": {"tensor": 2, "expert": 2},
    "tp2 pp2": {"tensor": 2, "pipeline": 2},
    "ep2 pp2": {"expert": 2, "data": 2, "pipeline": 2},
}
"""In the order of the number of ranks, so that processes are started once for each."""

CASES = [(layout, name) for layout, axes in LAYOUTS.items() for name in MODELS if "moe" in name or "expert" not in axes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            kind, changes = MODELS[name]
            made[name] = save_tiny(kind, tmp_path_factory.mktemp("model"), **changes)
        return made[name]

    return make


PREFIX = ints(np.random.default_rng(3).integers(1, VOCABULARY, 40))


def distribution(ranks: LocalRanks, layout: Layout) -> tuple[Any, Any]:
    """What a model thinks of PREFIX: the log-probs of its tokens [40], and of every token that may follow [V]."""
    examples = [SupervisedExample(id=f"v{v}", prompt_ids=PREFIX, response_ids=ints([v])) for v in range(VOCABULARY)]
    batch = make_supervised_batch(examples, layout, BatchSettings(tokens_per_microbatch=2000))
    found: dict[str, Any] = {}
    answers = ranks.call("score", batch.microbatches)
    for dp in range(layout.dp):
        for row, values in zip(batch.microbatches, answers[dp * layout.tp], strict=True):
            found |= split(row[dp], values)
    return found["v0"][: len(PREFIX)], np.array([found[f"v{v}"][-1] for v in range(VOCABULARY)])


def reference(folder: Path) -> tuple[Any, Any]:
    """The same by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor(np.array(PREFIX, np.int64))
    with torch.no_grad():
        logs = torch.log_softmax(model(tokens[None]).logits[0], -1)
    return logs[:-1].gather(-1, tokens[1:, None])[:, 0].numpy(), logs[-1].numpy()


@pytest.mark.parametrize(("layout", "name"), CASES, ids=[f"{layout}: {name}" for layout, name in CASES])
def test_in_and_out_bit_for_bit_and_the_same_distribution(
    process: Process, folder: Callable[[str], Path], layout: str, name: str
) -> None:
    source = folder(name)
    axes = dict(LAYOUTS[layout])
    if "moe" in name and "tensor" in axes:
        axes |= {"sequence": True, "expert_tensor": 1 if "expert" in axes else 2}
    ranks = process(policy_settings(source, **axes))
    ours, theirs = export(ranks).tensors, load_file(source / "model.safetensors")
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        assert ours[key].shape == tensor.shape, key
        assert np.array_equal(ours[key], tensor), key
    of_prefix, of_next = distribution(ranks, ranks.layout)
    expected_prefix, expected_next = reference(source)
    assert of_prefix[0] == 0.0
    np.testing.assert_allclose(of_prefix[1:], expected_prefix, atol=1e-5)
    np.testing.assert_allclose(of_next, expected_next, atol=1e-5)
    assert np.exp(of_next).sum() == pytest.approx(1.0, abs=1e-5)
