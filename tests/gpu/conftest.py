"""Why a GPU test cannot run here, said by the test."""

from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session")
def card() -> str:
    """The name of this machine's GPU."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is false")
    return torch.cuda.get_device_name()


@pytest.fixture(scope="session")
def transformer_engine(card: str) -> str:
    """The name of this machine's GPU, where Transformer Engine is installed and the GPU has FP8."""
    import torch

    if find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    if (capability := torch.cuda.get_device_capability()) < (8, 9):
        pytest.skip(f"{card} has compute capability {capability}, FP8 needs 8.9")
    return card
