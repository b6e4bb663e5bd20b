import json
import logging

import pytest

from megatron_fapo import manifest
from megatron_fapo.errors import CheckpointDamaged, ResumeError
from megatron_fapo.manifest import Manifest
from megatron_fapo.records import RunState
from megatron_fapo.run.folder import RunFolder, Wanted
from megatron_fapo.run.settings import CheckpointSettings


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def write(folder: RunFolder, step: int, **settings) -> None:
    path = folder.open_checkpoint(step)
    (path / "weights").write_text(f"weights {step}")
    files = {"weights": manifest.file_sum(path / "weights")}
    manifest.write(path, Manifest(updates=step, layout={"tp": 1}, files=files))
    folder.close_checkpoint(RunState(step=step, cursor=10 * step), CheckpointSettings(**settings))


def steps(folder: RunFolder) -> list[int]:
    return [state.step for _, state in folder.resumable()]


def test_complete_checkpoints_are_found_newest_first_and_old_ones_go(folder):
    assert folder.resumable() == []
    for step in (5, 10, 100):
        write(folder, step)
    (path, state), _ = folder.resumable()
    assert state == RunState(step=100, cursor=1000)
    assert (path / "weights").read_text() == "weights 100"
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["latest", "step-000010", "step-000100"]
    assert (folder.checkpoints / "latest").resolve() == path


def test_the_last_k_stay_and_every_nth_for_good(folder):
    for step in range(5, 65, 5):
        write(folder, step, keep=2, keep_every=20)
    assert steps(folder) == [60, 55, 40, 20]
    write(folder, 1000005, keep=1, keep_every=20)  # more digits than the name pads to
    assert steps(folder) == [1000005, 60, 40, 20]


def test_an_interrupted_checkpoint_does_not_count_and_goes_with_the_next(folder):
    write(folder, 5)
    (folder.open_checkpoint(10) / "weights").write_text("half")
    assert steps(folder) == [5]
    assert (folder.checkpoints / "latest" / "weights").read_text() == "weights 5"
    write(folder, 15)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["latest", "step-000005", "step-000015"]


def test_a_saved_step_is_saved_again(folder):
    write(folder, 5)
    write(folder, 5)
    assert steps(folder) == [5]


def damage_state(path):
    (path / "state.json").write_text(json.dumps({"step": 5}))


def cut_weights(path):
    (path / "weights").write_text("wei")


def remove_weights(path):
    (path / "weights").unlink()


def remove_manifest(path):
    (path / "manifest.json").unlink()


def damage_manifest(path):
    (path / "manifest.json").write_text('{"files": 3')


DAMAGES = [
    (damage_state, "state.json"),
    (cut_weights, "weights: damaged, it has 3 of 10 bytes"),
    (remove_weights, "weights: missing"),
    (remove_manifest, "manifest.json is missing"),
    (damage_manifest, "manifest.json: damaged"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(folder, caplog, damage, named):
    write(folder, 5)
    write(folder, 10)
    damage(folder.checkpoints / "step-000010")
    with caplog.at_level(logging.WARNING):
        assert steps(folder) == [5]
    (message,) = caplog.messages
    assert "step-000010" in message
    assert named in message
    damage(folder.checkpoints / "step-000005")
    with pytest.raises(ResumeError, match=r"no checkpoint can be used: .*step-000010.*step-000005"):
        folder.resumable()


def test_a_changed_byte_shows_in_the_sum_only(folder):
    write(folder, 5)
    path = folder.checkpoints / "step-000005"
    (path / "weights").write_text("weights 6")
    found = manifest.read(path)
    with pytest.raises(CheckpointDamaged, match="weights: damaged, its checksum differs"):
        manifest.compare_sums(path, found, found.files)


def test_servers_that_were_asked_for_are_told_once_and_stay_wanted_until_the_configuration_changes(folder):
    assert folder.servers_asked_for() == {}
    elsewhere = RunFolder(folder.path)
    elsewhere.ask_for_servers({"policy": Wanted(count=3, configured=1)})
    assert folder.servers_asked_for() == {"policy": 3}
    assert folder.servers_asked_for() == {}
    elsewhere.ask_for_servers({"judge": Wanted(count=2, configured=1)})
    assert folder.servers_asked_for() == {"policy": 3, "judge": 2}
    elsewhere.ask_for_servers({"judge": Wanted(count=2, configured=1)})  # once more: one of them may be gone
    assert folder.servers_asked_for() == {"policy": 3, "judge": 2}

    resumed = RunFolder(folder.path)
    assert resumed.begin_with_servers({"policy": 1, "judge": 1}) == {"policy": 3, "judge": 2}
    assert resumed.servers_asked_for() == {}
    assert resumed.begin_with_servers({"policy": 2, "judge": 1}) == {"policy": 2, "judge": 2}
    assert resumed.begin_with_servers({"policy": 1, "judge": 1}) == {"policy": 1, "judge": 2}
