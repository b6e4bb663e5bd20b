"""What a machine may lack: outside of CI a test then says so and is skipped, on CI it fails."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def require_tool():
    """`require_tool(name)`: the path of a program."""

    def require(name: str) -> str:
        return shutil.which(name) or lacking(f"{name} is not installed")

    return require


@pytest.fixture(scope="session")
def fapo_critic_sample() -> Path:
    """The authors' rows of judge training data, in the folder that FAPO_DATA names."""
    folder = os.environ.get("FAPO_DATA")
    if not folder:
        lacking("FAPO_DATA is not set: it names the folder with fapo-critic-sample.jsonl")
    return Path(folder) / "fapo-critic-sample.jsonl"


def lacking(reason: str):
    """Skip with the reason; fail on CI, where every test must run."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; on CI every test must run")
    pytest.skip(reason)
