"""What the GPU tests rest on, run on a CPU: the probe, the comparison, the expectations."""

from types import SimpleNamespace

import numpy as np
import pytest
import transformers

from megatron_fapo.batch.balance import crossover
from tests.gpu import expected
from tests.gpu.compare import BFLOAT16, FLOAT32, assert_near
from tests.gpu.probe import Work, run
from tests.gpu.test_policy_on_gpu import CPU, LARGE, SMALL, VOCABULARY, save_model, settings_of


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("probe")
    save_model(folder, {**SMALL, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96})
    return {
        dtype: run(Work(settings=settings_of(folder, dtype), lengths=[17, 5, 31], vocabulary=VOCABULARY), folder, **CPU)
        for dtype in ("float32", "bfloat16")
    }


def test_the_probe_reports_what_the_gpu_tests_read(reports: dict) -> None:
    report = reports["float32"]
    assert (report["device"], report["card"], report["layers"]) == ("cpu", "CPU", "local")
    assert report["logits"].shape == (17 + 5 + 31 - 3, VOCABULARY)
    assert len(report["updates"]) == len(report["seconds"]) == 3
    assert report["after coming back"]["grad_norm"] > 0


def test_bf16_is_as_near_to_float32_as_the_gpu_must_be_and_not_nearer(reports: dict) -> None:
    assert_near(reports["float32"], reports["float32"], FLOAT32)
    assert_near(reports["bfloat16"], reports["float32"], BFLOAT16)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_near(reports["bfloat16"], reports["float32"], FLOAT32)


def test_the_comparison_sees_a_wrong_gradient_norm(reports: dict) -> None:
    wrong = {**reports["float32"], "updates": [dict(update) for update in reports["float32"]["updates"]]}
    wrong["updates"][2]["grad_norm"] *= 1.1
    with pytest.raises(AssertionError):
        assert_near(wrong, reports["float32"], BFLOAT16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rank_frees_the_bytes_that_are_expected(reports: dict, dtype: str) -> None:
    for kind, nbytes in expected.memory(reports[dtype]["parameters"], dtype).items():
        assert reports[dtype]["freed"][kind] == pytest.approx(nbytes, rel=0.1), kind


def test_operations_are_those_that_batches_are_balanced_by() -> None:
    config = transformers.Qwen3Config(**LARGE)
    length = crossover(layers=28, hidden=2048, heads=16, groups=8, head_dim=128, mlp=6144, vocabulary=151936)
    one, two = expected.update_flops(config, [1]), expected.update_flops(config, [round(length)])
    assert two == pytest.approx(2 * one * length, rel=1e-3)
    parameters = 1.72e9  # tied embeddings count once, as the output layer
    assert one == pytest.approx(6 * parameters, rel=0.01)


def test_peaks_by_name() -> None:
    assert expected.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert expected.peak("NVIDIA H100 PCIe") == 756e12
    assert expected.peak("some other card") is None
    assert np.isfinite(expected.update_flops(SimpleNamespace(**SMALL), [8]))
