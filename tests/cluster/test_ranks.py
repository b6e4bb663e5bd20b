"""Ranks as Ray actors: which failure is raised, what remains of it, and who may look into Ray's files."""

import asyncio
import gc
import os
import shutil
import signal
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio
from safetensors.numpy import load_file, save_file

from megatron_fapo.cluster.model import MegatronModel
from megatron_fapo.cluster.ranks import Ranks
from megatron_fapo.cluster.ray_session import private_path, ray_session
from megatron_fapo.config import ClusterSettings
from megatron_fapo.errors import ConfigError, Diverged, PolicyError, RankLost
from tests.policy.lives import LOSS, policy_settings, save_tiny, step_batch

pytestmark = pytest.mark.asyncio(loop_scope="module")
CLUSTER = ClusterSettings(setup_deadline=120, phase_deadline=60, rank_deadline=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("Qwen3", tmp_path_factory.mktemp("model"), head_dim=16)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def session(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """A Ray for two ranks; gives the run folder."""
    folder = tmp_path_factory.mktemp("run")
    async with ray_session(CLUSTER, 2, folder):
        yield folder


def process_of(rank: int) -> psutil.Process:
    """The rank's process: the actor whose output Ray has marked with its name."""
    for process in psutil.Process().children(recursive=True):
        output = Path(f"/proc/{process.pid}/fd/1")
        if "ray::RankActor" in " ".join(process.cmdline()) and f"policy-rank-{rank}" in output.read_text():
            return process
    raise AssertionError(f"no rank {rank}")


async def test_a_rank_that_freezes_or_dies_is_named_and_not_the_peer_that_waits_for_it(
    session: Path, model: Path
) -> None:
    """Frozen in the middle of an update, gloo's own timeout coming first, then dead in the middle of another."""
    settings = policy_settings(model, data=2).changed(timeout=2)
    ranks = await MegatronModel.start("policy", settings, CLUSTER, 0)
    ranks.ranks.step = 7
    process_of(1).suspend()
    frozen = r"the rank's process is frozen: no sign of life for 8 s .*role policy, rank 1, .*phase train, step 7"
    with pytest.raises(RankLost, match=frozen) as caught:
        await asyncio.wait_for(ranks.update(step_batch(0, ranks.layout), LOSS), 20)
    assert "Timed out waiting 2000ms" in "".join(getattr(caught.value, "__notes__", []))
    await ranks.respawn()
    victim = process_of(1)
    victim.suspend()  # so that rank 0 is in the middle of the update, waiting
    update = asyncio.ensure_future(ranks.update(step_batch(0, ranks.layout), LOSS))
    await asyncio.sleep(0.5)
    assert not update.done()
    victim.send_signal(signal.SIGKILL)
    with pytest.raises(RankLost, match=r"the rank's process died: .*role policy, rank 1, verb update, phase train"):
        await update
    with pytest.raises(RankLost, match="the rank's process died"):
        await ranks.save_written()
    ranks.stop()


async def fail(first: str, second: str) -> None:
    """A verb on two real actors: one fails at once in the first way, its peer a little later in the second."""
    import ray

    class Rank:
        def ready(self) -> None:
            pass

        def call(self, verb: str, way: str, delay: float) -> None:
            time.sleep(60 if way == "hangs" else delay)
            if way == "dies":
                os._exit(1)
            raise Diverged("the loss is nan") if way == "diverges" else RuntimeError("Connection\nclosed by peer")

    actors = [ray.remote(Rank).remote() for _ in range(2)]
    await asyncio.gather(*(actor.ready.remote() for actor in actors))
    calls = [actors[0].call.remote("update", first, 0), actors[1].call.remote("update", second, 0.3)]
    await Ranks("policy", actors, 30).gather("update", calls)


@pytest.mark.parametrize(
    ("first", "second", "kind", "said"),
    [
        ("loses its peer", "dies", RankLost, "the rank's process died: .*rank 1"),
        ("diverges", "dies", RankLost, "the rank's process died: .*rank 1"),
        ("loses its peer", "diverges", Diverged, "the loss is nan"),
        ("diverges", "loses its peer", Diverged, "the loss is nan"),
    ],
)
async def test_of_two_failures_the_cause_is_raised(
    session: Path, first: str, second: str, kind: type[PolicyError], said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        await fail(first, second)
    assert type(caught.value) is kind


async def test_divergence_arrives_as_what_it_is_with_the_traceback_of_the_rank(
    session: Path, model: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    ranks = await MegatronModel.start("policy", policy_settings(broken, data=2), CLUSTER, 0)
    with pytest.raises(Diverged, match="the loss is nan") as caught:
        await ranks.update(step_batch(0, ranks.layout), LOSS)
    assert "\n" not in str(caught.value)
    assert "in _optimize" in caught.value.__notes__[0]


async def test_a_rank_that_is_ended_with_its_peer_says_nothing(session: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Diverged):
        await fail("diverges", "hangs")
    await asyncio.sleep(1)
    gc.collect()
    assert not caplog.records


async def test_a_foreign_error_becomes_one_line_with_its_place(session: Path) -> None:
    with pytest.raises(PolicyError) as caught:
        await fail("loses its peer", "loses its peer")
    assert (
        str(caught.value) == "RuntimeError: Connection closed by peer (role policy, rank 0, verb update, phase train)"
    )
    assert "in call" in caught.value.__notes__[0]


async def test_rays_files_are_closed_to_others_while_it_runs(session: Path) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    assert mode(private_path(session)) == 0o700
    assert mode(session / "ray-token") == 0o600
    assert os.environ["RAY_AUTH_MODE"] == "token"
    sockets = [str(path) for path in private_path(session).rglob("*") if path.is_socket()]
    assert sockets
    assert max(map(len, sockets)) < 90


async def test_the_folder_of_a_live_run_is_not_taken(session: Path) -> None:
    with pytest.raises(ConfigError, match="a run is going on"):
        async with ray_session(CLUSTER, 1, session):
            pass
    assert private_path(session).exists()
