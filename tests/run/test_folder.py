import json

import pytest

from megatron_fapo.errors import ResumeError
from megatron_fapo.records import RunState
from megatron_fapo.run.folder import RunFolder


def write(folder: RunFolder, step: int, keep: int = 2) -> None:
    (folder.open_checkpoint(step) / "weights").write_text(f"weights {step}")
    folder.close_checkpoint(RunState(step=step, cursor=10 * step), keep)


def test_the_newest_complete_checkpoint_is_found_and_old_ones_go(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    assert folder.newest_checkpoint() is None
    for step in (5, 10, 100):
        write(folder, step)
    path, state = folder.newest_checkpoint()
    assert state == RunState(step=100, cursor=1000)
    assert (path / "weights").read_text() == "weights 100"
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step-000010", "step-000100"]


def test_an_interrupted_checkpoint_does_not_count(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create()
    write(folder, 5)
    (folder.open_checkpoint(10) / "weights").write_text("half")
    assert folder.newest_checkpoint()[1].step == 5
    write(folder, 10)
    assert folder.newest_checkpoint()[1].step == 10


def test_a_damaged_state_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create()
    write(folder, 5)
    state = folder.checkpoints / "step-000005" / "state.json"
    for damage in ("{", json.dumps({"step": 5}), ""):
        state.write_text(damage)
        with pytest.raises(ResumeError, match="step-000005"):
            folder.newest_checkpoint()
