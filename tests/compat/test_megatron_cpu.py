"""Each patch is needed still: without it, Megatron on a CPU fails in a known way. When one of these tests fails after
an upgrade of megatron-core, the patch may go."""

import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_fapo.compat import device, megatron_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")

ASKS_FOR_CUDA = re.compile(
    "Torch not compiled with CUDA enabled|Cannot re-initialize CUDA in forked subprocess|No CUDA GPUs|NVIDIA driver"
)
"""What torch says then: a build without CUDA, or one with CUDA on a machine without a GPU."""


@pytest.fixture(scope="module")
def without(qwen3_folder: Path) -> dict[str, str]:
    patches = ["none", "P1", "P2", "P3", "P4", "P10", "P10 prepare"]
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ablate.py")), str(qwen3_folder), *patches],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_with_all_patches_a_rank_lives(without: dict[str, str]) -> None:
    assert without["none"] == "works"


@pytest.mark.parametrize("patch", ["P1", "P2", "P3", "P4"])
def test_without_it_megatron_asks_for_cuda(without: dict[str, str], patch: str) -> None:
    assert ASKS_FOR_CUDA.search(without[patch])


def test_without_p10_no_optimizer_state_can_be_loaded(without: dict[str, str]) -> None:
    assert without["P10"] == "KeyError: 'step'"
    assert without["P10 prepare"] != "works"


def test_p6_to_p9_and_p12_are_needed_while_upstream_says_so() -> None:
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    assert "pin_memory=True" in inspect.getsource(rope_utils.get_pos_emb_on_this_cp_rank), "P6"
    assert "torch.cuda.Stream()" in inspect.getsource(token_dispatcher), "P7"
    if importlib.metadata.version("megatron-core") == "0.16.1":
        assert not hasattr(moe_utils, "te_general_gemm"), "P8"
    assert "tensor.is_cuda" in inspect.getsource(moe_utils.maybe_move_tensor_to_cpu), "P9"
    shapes = inspect.getsource(P2PCommunicator._communicate_shapes)
    assert "batch_isend_irecv" in shapes, "P12"


def test_the_mode_is_confined_to_its_block() -> None:
    with megatron_cpu.active():
        tensor = torch.zeros(2, device="cuda")
        assert tensor.device.type == "cpu"
        assert tensor.cuda() is tensor
        assert tensor.to(torch.device("cuda")).device.type == "cpu"
        assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_this_machine_is_a_cpu() -> None:
    here = device.current()
    assert here is device.CPU
    assert (here.backend, here.torch_device().type) == ("gloo", "cpu")
