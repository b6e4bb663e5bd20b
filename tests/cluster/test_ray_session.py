"""Ray for the length of a run: it starts beside other things, and leaves its ranks' logs and nothing else."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from megatron_fapo.cluster.model import MegatronModel
from megatron_fapo.cluster.ray_session import keep_logs, private_folder, private_path, ray_session
from megatron_fapo.config import ClusterSettings
from megatron_fapo.errors import ConfigError, DataError
from megatron_fapo.policy.settings import PolicySettings

CLUSTER = ClusterSettings(setup_deadline=120)
MARKED = ":job_id:01000000\n:actor_name:RankActor\n:actor_name:policy-rank-3\n"


async def test_other_work_goes_on_while_ray_starts_and_a_failed_start_leaves_the_logs_of_ranks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    order = []
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)

    async def start() -> None:
        async with ray_session(CLUSTER, 1, tmp_path):
            order.append("ray")
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(told.wait(), 5)
            await MegatronModel.start("policy", PolicySettings(model=tmp_path / "nowhere"), CLUSTER, 0)

    async def work() -> None:
        order.append("work")

    failure, _ = await asyncio.gather(start(), work(), return_exceptions=True)
    assert isinstance(failure, DataError)
    assert order == ["work", "ray"]
    assert "SIGTERM" not in capfd.readouterr().err
    said = (tmp_path / "logs" / "policy-rank-0.err").read_text()
    assert "setup failed\nTraceback" in said
    assert "config.json is missing" in said
    assert not private_path(tmp_path).exists()


def leftover(folder: Path, out: str) -> Path:
    """What a killed run leaves behind."""
    logs = private_path(folder) / "ray" / "session_1" / "logs"
    logs.mkdir(parents=True)
    (logs.parents[1] / "session_latest").symlink_to(logs.parent)
    (logs / "worker-a-01000000-1.out").write_text(out)
    return logs


def test_what_a_killed_run_left_behind_is_removed_and_its_logs_are_kept(tmp_path: Path) -> None:
    leftover(tmp_path, MARKED + "last words\n")
    with private_folder(tmp_path) as folder:
        assert list(folder.iterdir()) == []
        assert (tmp_path / "logs" / "policy-rank-3.out").read_text() == "last words\n"
    assert not folder.exists()


def test_silent_ranks_and_other_workers_leave_no_log(tmp_path: Path) -> None:
    (tmp_path / "worker-a-01000000-1.out").write_text(MARKED)
    (tmp_path / "worker-b-ffffffff-2.err").write_text("idle\n")
    (tmp_path / "raylet.err").write_text("raylet\n")
    keep_logs(tmp_path, tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with private_folder(tmp_path) as folder:
        with pytest.raises(ConfigError, match="a run is going on in this folder"), private_folder(tmp_path):
            pass
        assert folder.exists()


def test_a_link_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "ray").mkdir()
    private_path(tmp_path).symlink_to(tmp_path / "elsewhere")
    try:
        with pytest.raises(ConfigError, match="cannot hold Ray's files"), private_folder(tmp_path):
            pass
        assert (tmp_path / "elsewhere" / "ray").exists()
    finally:
        private_path(tmp_path).unlink()


def test_the_folder_has_a_short_name_of_its_own(tmp_path: Path) -> None:
    names = {str(private_path(tmp_path / (letter * 200))) for letter in "ab"}
    assert len(names) == 2
    assert max(map(len, names)) < 20
