"""A rank that is lost while weights are half-way to the servers: by each way for weights, as if nothing had been.

The servers leave the broken group or update, the ranks come back, and everything is sent in full; the run ends with
the metrics and weights, to the last bit, of one that nobody disturbed and that sent through shared memory.
"""

import asyncio
import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_fapo.cluster.cluster import Cluster
from megatron_fapo.config import Config, read_config
from megatron_fapo.errors import RankLost
from tests.cluster.test_recovery import TINY, no_harm, run, same

BUCKETS = 3
"""So many have been written when a rank is lost, of seven."""


@dataclass(frozen=True, kw_only=True)
class Blow:
    """In the publication of which step a rank gets which signal."""

    step: int
    rank: int
    signal: signal.Signals


BLOWS = [
    Blow(step=step, rank=rank, signal=number)
    for step, (rank, number) in enumerate(
        [(0, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGKILL), (1, signal.SIGSTOP)], start=1
    )
]


def tiny(**publish: Any) -> Config:
    return read_config(
        Path("configs/clock/fapo.yaml"),
        [*TINY, "publish.bucket_megabytes=0.4", *(f"publish.{name}={value}" for name, value in publish.items())],
    )


async def half_way(verb: str, blows: list[Blow], cluster: Cluster, said: list[str]) -> None:
    """Strike in each blow's publication, once the ranks have been asked to write, or to send, one bucket more."""
    model, written = cluster.policy, 0
    left = list(blows)

    def struck(name: str) -> None:
        real = getattr(model, name)

        async def call(*arguments: Any) -> Any:
            nonlocal written
            due = name == verb and written == BUCKETS and left and model.ranks.step == left[0].step
            process = await pid_of(left[0].rank) if due else 0
            asked = asyncio.ensure_future(real(*arguments))
            if due:
                await asyncio.sleep(0)
                os.kill(process, left.pop(0).signal)
            answer = await asked
            written = {"open_export": 0, "next_bucket": written + 1}.get(name, written)
            return answer

        setattr(model, name, call)

    async def pid_of(rank: int) -> int:
        return int(await model.ranks._actors[rank].__ray_call__.remote(lambda actor: os.getpid()))

    for name in ("open_export", "next_bucket", "send_bucket"):
        struck(name)
    for _ in blows:
        ranks = model.ranks
        try:
            await ranks.lost()
        except RankLost as loss:
            said.append(str(loss))
        while model.ranks is ranks:
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
async def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert await run(tiny(), path, no_harm) == []
    return path


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["group", "delta", "disk"])
async def test_a_run_goes_on_after_each_as_if_nothing_had_been(undisturbed: Path, tmp_path: Path, way: str) -> None:
    verb = "send_bucket" if way == "group" else "next_bucket"
    said = await run(tiny(transport=way), tmp_path / "run", partial(half_way, verb, BLOWS))
    for blow, text in zip(BLOWS, said, strict=True):
        how = "process died" if blow.signal == signal.SIGKILL else "is frozen"
        assert how in text, text
        assert f"role policy, rank {blow.rank}, " in text, text
        assert f"phase publish, step {blow.step}" in text, text
    assert same(tmp_path / "run", undisturbed, len(BLOWS))
