"""FP8 by Transformer Engine's recipes against BF16 on the same GPU."""

from pathlib import Path

import pytest

from megatron_fapo.policy.settings import Fp8Settings
from tests.gpu.compare import FP8, assert_near
from tests.gpu.probe import Work, run
from tests.gpu.test_policy_on_gpu import SMALL, VOCABULARY, save_model, settings_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

RECIPES = [
    Fp8Settings(recipe="blockwise"),
    Fp8Settings(recipe="tensorwise"),
    Fp8Settings(recipe="tensorwise", format="hybrid", edge_layers_bf16=0),
    Fp8Settings(recipe="delayed", format="hybrid", edge_layers_bf16=0),
]
ALIGNED, RAGGED = [64, 64, 64, 64], [37, 5, 111, 61]


@pytest.fixture(scope="module")
def model(transformer_engine: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_model(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def in_bf16(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    work = {
        "aligned": Work(settings=settings_of(model, "bfloat16"), lengths=ALIGNED, vocabulary=VOCABULARY),
        "ragged": Work(settings=settings_of(model, "bfloat16"), lengths=RAGGED, vocabulary=VOCABULARY),
    }
    return {name: run(asked, tmp_path_factory.mktemp(name)) for name, asked in work.items()}


@pytest.mark.parametrize("lengths", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
@pytest.mark.parametrize("fp8", RECIPES, ids=lambda fp8: f"{fp8.recipe}-{fp8.format}")
def test_fp8_is_near_bf16(model: Path, in_bf16: dict, tmp_path: Path, fp8: Fp8Settings, lengths: list[int]) -> None:
    """Ragged sequences too: padding that reached the scales or the gradients would show in the gradient norm."""
    settings = settings_of(model, "bfloat16", fp8=fp8)
    found = run(Work(settings=settings, lengths=lengths, vocabulary=VOCABULARY), tmp_path)
    assert found["layers"] == "transformer_engine"
    assert_near(found, in_bf16["aligned" if lengths is ALIGNED else "ragged"], FP8)
