"""A policy that was saved and loaded in new processes goes on as if it had never stopped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fapo.errors import ResumeError
from megatron_fapo.policy import checkpoint
from megatron_fapo.policy.local import LocalRanks
from tests.policy.lives import LAYOUTS, LOSS, Life, policy_settings, step_batch

Lives = Callable[[str], Life]


@pytest.mark.parametrize("name", ["one", "dp2"])
def test_resumed_updates_equal_uninterrupted_ones_to_the_last_digit(lives: Lives, qwen3: Path, name: str) -> None:
    life = lives(name)
    with LocalRanks(policy_settings(qwen3, **LAYOUTS[name]), seed=99) as ranks:
        ranks.call("load", str(life.saved))
        again = [ranks.call("update", step_batch(step, ranks.layout), LOSS)[0] for step in (3, 4)]
    assert [report.updates for report in again] == [report.updates for report in life.resumed]


@pytest.fixture
def copy(lives: Lives, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lives("one").saved, tmp_path / "copy"))


def test_a_whole_checkpoint_passes(copy: Path) -> None:
    assert checkpoint.check(copy)["updates"] == 3


def test_a_flipped_byte_is_named(copy: Path) -> None:
    file = max(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ResumeError, match=f"{file.name}: damaged"):
        checkpoint.check(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "common.pt").unlink()
    with pytest.raises(ResumeError, match=r"common.pt: missing"):
        checkpoint.check(copy)


def test_an_unfinished_or_absent_checkpoint_is_named(copy: Path) -> None:
    manifest = copy / checkpoint.MANIFEST
    manifest.write_text(json.dumps({"updates": 3})[:-4])
    with pytest.raises(ResumeError, match=r"manifest.json: damaged"):
        checkpoint.check(copy)
    manifest.unlink()
    with pytest.raises(ResumeError, match="no complete checkpoint"):
        checkpoint.check(copy)
    with pytest.raises(ResumeError, match="no complete checkpoint"):
        checkpoint.check(copy / "nowhere")


def test_every_rank_hears_of_a_damaged_folder(process: Callable[..., LocalRanks], qwen3: Path, tmp_path: Path) -> None:
    ranks = process(policy_settings(qwen3))
    with pytest.raises(ResumeError, match="no complete checkpoint"):
        ranks.call("load", str(tmp_path))
