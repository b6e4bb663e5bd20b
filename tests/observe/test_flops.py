"""FLOPs in closed form against the parameters that the models are known to have, and MFU by hand."""

import json
from pathlib import Path

import pytest

from megatron_fapo.errors import DataError
from megatron_fapo.observe.flops import ModelFlops, model_flops, read_model_flops
from megatron_fapo.observe.metrics import mfu
from tests.builders import make_group
from tests.observe.test_metrics import report

REPORT = report()
MODELS = Path(__file__).parents[2] / "configs" / "models"

# Parameters as published, in billions: without the embedding (Qwen cards), or all; activated for the mixture.
PUBLISHED = {"qwen2.5-7b": 6.53, "qwen2.5-32b": 31.0, "qwen2.5-72b": 70.0, "qwen3-4b": 3.6}


@pytest.mark.parametrize("name", PUBLISHED)
def test_matrix_parameters_are_the_published_ones_without_embedding(name):
    config = json.loads((MODELS / f"{name}.json").read_text())
    body = model_flops(config).matrix_parameters - config["vocab_size"] * config["hidden_size"]
    assert body / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)


def test_a_mixture_counts_its_active_experts():
    config = json.loads((MODELS / "qwen3-30b-a3b.json").read_text())
    assert model_flops(config).matrix_parameters / 1e9 == pytest.approx(3.3 - 0.31, rel=0.03), "3.3 B active in all"


def test_attention_costs_what_a_token_can_see():
    flops = ModelFlops(matrix_parameters=10, attention_width=3)
    assert flops.per_token(0) == 60
    assert flops.per_token(4) - flops.per_token(2) == 6 * 3 * 2


def test_mfu_by_hand():
    group = make_group(["clean", "wrong"])
    lengths = [len(group.prompt.token_ids) + len(one.rollout.token_ids) for one in group]
    mean = sum(n * n for n in lengths) / sum(lengths)
    work = (6 * 10 + 6 * 3 * mean) * sum(update.tokens for update in REPORT.updates)
    flops = ModelFlops(matrix_parameters=10, attention_width=3)
    assert mfu([group], REPORT, flops, peak=1e6)["time/mfu"] == pytest.approx(work / (REPORT.seconds * 1e6))


def test_a_model_without_sizes_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="hidden_size"):
        read_model_flops(tmp_path)
