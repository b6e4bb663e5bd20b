"""Real Megatron ranks on gloo: one scripted life a layout, run once, compared by many tests."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import PolicySettings
from tests.policy.lives import LAYOUTS, Life, live, policy_settings, save_tiny
from tests.policy.matrix import Pool, Reference, reference, save_moe


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
def pool() -> Iterator[Pool]:
    """Four processes that take on one layout after the other."""
    with Pool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def dense(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A dense model of four layers with grouped queries, and its life on one rank."""
    return reference(pool, save_tiny("Qwen3", tmp_path_factory.mktemp("dense"), head_dim=16, num_hidden_layers=4))


@pytest.fixture(scope="session")
def sparse(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A mixture of experts, and its life on one rank."""
    return reference(pool, save_moe(tmp_path_factory.mktemp("sparse")))


@pytest.fixture(scope="session")
def process() -> Iterator[Callable[[PolicySettings], LocalRanks]]:
    """Processes that tests set up anew as they need them; those of another number of ranks end first."""
    held: list[LocalRanks] = []

    def again(settings: PolicySettings) -> LocalRanks:
        if held and len(held[0]) != settings.parallel.world:
            held.pop().close()
        if not held:
            held.append(LocalRanks(settings, seed=5))
            return held[0]
        ranks = held[0]
        ranks.call("shutdown")
        host, port = ranks.call("address")[0]
        world = settings.parallel.world
        ranks.layout = ranks.call_each("setup", [(r, world, host, port, settings, 5) for r in range(world)])[0]
        return ranks

    yield again
    for ranks in held:
        ranks.close()


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[Callable[..., Any]]:
    """`elsewhere(function, *args)` in a process of its own, the same for all tests: Megatron's patches stay there."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:

        def call(function: Callable[..., Any], *args: Any) -> Any:
            return pool.submit(function, *args).result()

        yield call
