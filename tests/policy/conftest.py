"""Real Megatron ranks on gloo: one scripted life a layout, run once, compared by many tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import PolicySettings
from tests.policy.lives import LAYOUTS, Life, live, policy_settings, save_tiny


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("Qwen3", tmp_path_factory.mktemp("qwen3"), head_dim=16)


@pytest.fixture(scope="session")
def lives(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Life]:
    """The life of a layout by its name, lived once."""
    lived: dict[str, Life] = {}

    def get(name: str) -> Life:
        if name not in lived:
            settings = policy_settings(qwen3, **LAYOUTS[name])
            lived[name] = live(settings, tmp_path_factory.mktemp(name) / "checkpoint")
        return lived[name]

    return get


@pytest.fixture(scope="session")
def process() -> Iterator[Callable[[PolicySettings], LocalRanks]]:
    """One process of one rank that tests set up anew as they need it."""
    held: list[LocalRanks] = []

    def again(settings: PolicySettings) -> LocalRanks:
        if not held or not len(held[0]):
            held[:] = [LocalRanks(settings, seed=5)]
        else:
            ranks = held[0]
            ranks.call("shutdown")
            host, port = ranks.call("address")[0]
            ranks.call("setup", 0, 1, host, port, settings, 5)
        return held[0]

    yield again
    for ranks in held:
        ranks.close()
