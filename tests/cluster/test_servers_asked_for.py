"""How many servers a run begins with that was asked for others before."""

from pathlib import Path

import pytest

from megatron_fapo.cluster.cluster import with_servers_asked_for
from megatron_fapo.config import Config, read_config
from megatron_fapo.run.folder import RunFolder, Wanted


def counts(config: Config) -> tuple[int, int]:
    return config.server("policy").count, config.server("judge").count


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Of a run with one server of each role, in which three for the policy were asked for."""
    folder = RunFolder(tmp_path)
    folder.ask_for_servers({"policy": Wanted(count=3, configured=1)})
    return folder


def configured(*overrides: str) -> Config:
    return read_config(Path("configs/clock/fapo.yaml"), overrides)


def test_what_was_asked_for_holds_until_the_configuration_says_another_number(folder: RunFolder) -> None:
    room = "servers.policy.max_count=4"
    assert counts(with_servers_asked_for(configured(room), folder)) == (3, 1)
    assert counts(with_servers_asked_for(configured(room, "servers.judge.count=2"), folder)) == (3, 2)
    assert counts(with_servers_asked_for(configured(room, "servers.policy.count=2"), folder)) == (2, 1)
    assert counts(with_servers_asked_for(configured(room), folder)) == (1, 1)


@pytest.mark.parametrize("given", ["servers.policy.max_count=2", "cluster.placement=colocated"])
def test_what_the_run_has_no_room_for_is_not_begun_with(folder: RunFolder, given: str) -> None:
    assert counts(with_servers_asked_for(configured(given), folder)) == (1, 1)
