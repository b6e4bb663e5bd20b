"""A policy that was saved and loaded in new processes goes on as if it had never stopped, in any layout."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_fapo.errors import CheckpointDamaged, PolicyError, ResumeError
from megatron_fapo.manifest import MANIFEST
from megatron_fapo.policy import checkpoint
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.records import UpdateReport
from tests.policy.lives import LAYOUTS, LOSS, VOCABULARY, Life, policy_settings, step_batch
from tests.policy.matrix import save_moe

Lives = Callable[[str], Life]
NEXT = (3, 4, 5)


def updates(ranks: LocalRanks, steps: tuple[int, ...] = NEXT) -> list[UpdateReport]:
    return [ranks.call("update", step_batch(step, ranks.layout), LOSS)[0].updates[0] for step in steps]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_resumed_updates_equal_uninterrupted_ones_to_the_last_digit(lives: Lives, qwen3: Path, name: str) -> None:
    life = lives(name)
    with LocalRanks(policy_settings(qwen3, **LAYOUTS[name]), seed=99) as ranks:
        ranks.call("load", str(life.saved))
        again = updates(ranks, NEXT[: len(life.resumed)])
    assert again == [report.updates[0] for report in life.resumed]


def test_a_plain_optimizer_resumes_too_and_does_not_pass_for_a_distributed_one(qwen3: Path, tmp_path: Path) -> None:
    distributed = policy_settings(qwen3)
    plain = distributed.changed(optimizer=distributed.optimizer.changed(distributed=False))
    with LocalRanks(plain, seed=5) as ranks:
        updates(ranks, (0, 1, 2))
        ranks.call("save", str(tmp_path))
        expected = updates(ranks)
    with LocalRanks(plain, seed=9) as ranks:
        ranks.call("load", str(tmp_path))
        assert updates(ranks) == expected
    with LocalRanks(distributed, seed=9) as ranks:
        with pytest.raises(ResumeError, match="does not fit this model and optimizer"):
            ranks.call("load", str(tmp_path))


def tensors_of(folder: Path) -> dict:
    """Every tensor of a checkpoint, whole, as torch reads it without Megatron and without ranks."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(found.size, dtype=found.properties.dtype)
        for key, found in stored.items()
        if isinstance(found, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.mark.parametrize(
    ("before", "after"), [("tp2", "pp2"), ("pp2", "tp2"), ("one", "dp2"), ("dp2", "one"), ("tp2", "dp2")]
)
def test_saved_in_one_layout_and_resumed_in_another(
    lives: Lives, qwen3: Path, tmp_path: Path, before: str, after: str
) -> None:
    saved = lives(before).saved
    with LocalRanks(policy_settings(qwen3, **LAYOUTS[before]), seed=3) as ranks:
        ranks.call("load", str(saved))
        expected = updates(ranks)
    with LocalRanks(policy_settings(qwen3, **LAYOUTS[after]), seed=99) as ranks:
        ranks.call("load", str(saved))
        ranks.call("save", str(tmp_path / "again"))
        found = updates(ranks)

    assert_the_same_tensors(tmp_path / "again", saved)
    assert_near(found, expected)


def assert_the_same_tensors(ours: Path, theirs: Path) -> None:
    """Bit for bit, weights and optimizer states of two checkpoints, each gathered from its own layout."""
    import torch

    found, expected = tensors_of(ours), tensors_of(theirs)
    assert sorted(found) == sorted(expected)
    assert sum(key.startswith("optimizer.state.exp_avg") for key in found) > 10
    for key, tensor in expected.items():
        # tensor parallelism pads the vocabulary
        rows = slice(VOCABULARY) if "embedding" in key or "output_layer" in key else slice(None)
        assert torch.equal(found[key][rows], tensor[rows]), key
        assert found[key][rows].any(), key


def assert_near(found: list[UpdateReport], expected: list[UpdateReport]) -> None:
    """Losses and gradient norms of two layouts on the same batches."""
    for update, reference in zip(found, expected, strict=True):
        assert update.loss == pytest.approx(reference.loss, rel=1e-5, abs=1e-7)
        assert update.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
        assert update.learning_rate == reference.learning_rate


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_moe(tmp_path_factory.mktemp("moe"))


AROUND_EXPERTS = [
    {},
    {"expert": 2, "data": 2},
    {"tensor": 2, "sequence": True, "expert_tensor": 2},
    {"pipeline": 2},
    {"data": 2},
]
AROUND_EXPERTS_ON_FOUR = [
    {"expert": 2, "data": 2, "pipeline": 2, "virtual_pipeline": 2},
    {"tensor": 2, "sequence": True, "expert": 2, "data": 2},
    {"expert": 2, "data": 4},
]


def name_of(layouts: list[dict]) -> str:
    return f"{len(layouts)} layouts"


@pytest.mark.parametrize(
    "layouts", [AROUND_EXPERTS, pytest.param(AROUND_EXPERTS_ON_FOUR, marks=pytest.mark.long)], ids=name_of
)
def test_a_mixture_of_experts_goes_from_layout_to_layout(moe: Path, tmp_path: Path, layouts: list[dict]) -> None:
    """Saved in one, loaded and saved in the next, and so on: the first and each later one hold the same tensors."""
    with LocalRanks(policy_settings(moe), seed=5) as ranks:
        updates(ranks, (0, 1, 2))
        ranks.call("save", str(tmp_path / "first"))
        expected = updates(ranks)
    last = tmp_path / "first"
    for number, layout in enumerate(layouts):
        with LocalRanks(policy_settings(moe, **layout), seed=9 + number) as ranks:
            ranks.call("load", str(last))
            last = tmp_path / str(number)
            ranks.call("save", str(last))
            found = updates(ranks)
        assert_the_same_tensors(last, tmp_path / "first")
        assert_near(found, expected)


ON_A_SLOW_DISK = """
import sys, threading
from pathlib import Path
from megatron_fapo.compat.checkpoint_files import SaveRequest
from megatron_fapo.policy.rank import PolicyRank
from megatron_fapo.policy.settings import PolicySettings
from tests.policy.lives import LOSS, step_batch

disk_is_free, write = threading.Event(), SaveRequest.write

def write_late(request):
    disk_is_free.wait()
    write(request)

SaveRequest.write = write_late
folder = Path(sys.argv[1])
rank = PolicyRank()
layout = rank.setup(0, 1, *rank.address(), PolicySettings.model_validate_json(sys.stdin.read()), 5)
rank.update(step_batch(0, layout), LOSS)
rank.begin_save(str(folder / "meanwhile"))
rank.update(step_batch(1, layout), LOSS)
assert not rank.save_written()
disk_is_free.set()
rank.end_save()
"""


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "plain optimizer"])
def test_an_update_during_the_save_is_not_in_it(qwen3: Path, tmp_path: Path, distributed: bool) -> None:
    settings = policy_settings(qwen3)
    settings = settings.changed(optimizer=settings.optimizer.changed(distributed=distributed))
    with LocalRanks(settings, seed=5) as ranks:
        updates(ranks, (0,))
        ranks.call("save", str(tmp_path / "in peace"))
    run = subprocess.run(
        [sys.executable, "-c", ON_A_SLOW_DISK, str(tmp_path)],
        input=settings.model_dump_json(),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    peace, meanwhile = checkpoint.check(tmp_path / "in peace"), checkpoint.check(tmp_path / "meanwhile")
    weights = [name for name in peace.files if name.endswith(".distcp")]
    assert len(weights) == 1
    assert [meanwhile.files[name] for name in weights] == [peace.files[name] for name in weights]
    assert meanwhile.updates == 1


def test_ranks_write_equal_shares(lives: Lives) -> None:
    sizes = [file.stat().st_size for file in lives("dp2").saved.glob("*.distcp")]
    assert len(sizes) == 2
    assert min(sizes) > 0.7 * max(sizes)


def test_a_rank_killed_while_saving_leaves_no_checkpoint(qwen3: Path, tmp_path: Path) -> None:
    with LocalRanks(policy_settings(qwen3), seed=5) as ranks:
        ranks.call("begin_save", str(tmp_path))
        os.kill(ranks._processes[0].pid, signal.SIGKILL)
        with pytest.raises(PolicyError, match="died"):
            ranks.call("end_save")
    with pytest.raises(CheckpointDamaged, match="no complete checkpoint"):
        checkpoint.check(tmp_path)


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_FSIZE"), reason="this system cannot limit another process's files")
def test_a_rank_that_cannot_write_says_so_and_leaves_no_checkpoint(qwen3: Path, tmp_path: Path) -> None:
    with LocalRanks(policy_settings(qwen3, data=2), seed=5) as ranks:
        psutil.Process(ranks._processes[1].pid).rlimit(psutil.RLIMIT_FSIZE, (4096, psutil.RLIM_INFINITY))
        with pytest.raises(PolicyError, match="could not be written"):
            ranks.call("save", str(tmp_path))
    with pytest.raises(CheckpointDamaged, match="no complete checkpoint"):
        checkpoint.check(tmp_path)


def test_one_save_at_a_time(process: Callable[..., LocalRanks], qwen3: Path, tmp_path: Path) -> None:
    ranks = process(policy_settings(qwen3))
    ranks.call("begin_save", str(tmp_path / "first"))
    with pytest.raises(PolicyError, match="first is running"):
        ranks.call("begin_save", str(tmp_path / "second"))


@pytest.fixture
def copy(lives: Lives, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lives("one").saved, tmp_path / "copy"))


def test_a_whole_checkpoint_passes(copy: Path) -> None:
    assert checkpoint.check(copy).updates == 3


def test_every_file_is_in_the_manifest(copy: Path) -> None:
    assert set(checkpoint.check(copy).files) == {file.name for file in copy.iterdir()} - {MANIFEST}


def test_a_flipped_byte_is_named(copy: Path) -> None:
    file = max(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match=f"{file.name}: damaged, its checksum differs"):
        checkpoint.check(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "common.pt").unlink()
    with pytest.raises(CheckpointDamaged, match=r"common.pt: missing"):
        checkpoint.check(copy)


def test_every_rank_hears_of_a_damage_that_one_of_them_reads(lives: Lives, qwen3: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(lives("dp2").saved, tmp_path / "copy"))
    file = sorted(folder.glob("*.distcp"))[1]
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with LocalRanks(policy_settings(qwen3, data=2), seed=5) as ranks:
        with pytest.raises(CheckpointDamaged, match=f"{file.name}: damaged"):
            ranks.call("load", str(folder))
