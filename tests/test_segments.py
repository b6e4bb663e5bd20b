"""Shared-memory segments: nobody else's file, no missing memory, and readers that make nothing."""

import os
import stat

import pytest

from megatron_fapo.errors import WeightsError
from megatron_fapo.weights import Segment, shared_memory_folder

SIZE = 3 * 4096


@pytest.fixture
def path():
    path = shared_memory_folder() / f"fapo-test-segments-{os.getpid()}"
    yield path
    path.unlink(missing_ok=True)


def make_open_to_all(path, tmp_path):
    path.write_bytes(bytes(SIZE))
    path.chmod(0o666)


def make_link(path, tmp_path):
    (tmp_path / "victim").write_bytes(bytes(SIZE))
    path.symlink_to(tmp_path / "victim")


def make_hard_link(path, tmp_path):
    other = path.with_name(path.name + "-other")
    Segment.create(other, SIZE)
    path.hardlink_to(other)
    return other


def make_shorter(path, tmp_path):
    Segment.create(path, SIZE - 1)


def make_sparse(path, tmp_path):
    path.touch(0o600)
    os.truncate(path, SIZE)


def make_fifo(path, tmp_path):
    os.mkfifo(path, 0o600)


IMPOSTORS = [make_open_to_all, make_link, make_hard_link, make_shorter, make_sparse, make_fifo]


@pytest.mark.parametrize("prepare", IMPOSTORS, ids=lambda prepare: prepare.__name__)
def test_whatever_has_the_name_is_replaced_by_a_private_file_with_all_its_memory(path, tmp_path, prepare):
    other = prepare(path, tmp_path)
    before = path.lstat().st_ino
    try:
        segment = Segment.create(path, SIZE)
        segment.memory[:] = b"x" * SIZE
        now = path.lstat()
        assert now.st_ino != before
        assert (stat.S_IFMT(now.st_mode), stat.S_IMODE(now.st_mode)) == (stat.S_IFREG, 0o600)
        assert (now.st_uid, now.st_size, now.st_blocks * 512 >= SIZE) == (os.geteuid(), SIZE, True)
        if prepare is make_link:
            assert (tmp_path / "victim").read_bytes() == bytes(SIZE)
        assert bytes(Segment.open(path, SIZE).memory) == b"x" * SIZE
    finally:
        if other:
            other.unlink()


def test_an_own_segment_of_this_size_is_used_as_it_is(path):
    first = Segment.create(path, SIZE)
    first.memory[:3] = b"abc"
    before = path.stat()
    second = Segment.create(path, SIZE)
    assert bytes(second.memory[:3]) == b"abc"
    second.memory[:3] = b"xyz"
    assert bytes(first.memory[:3]) == b"xyz"
    assert path.stat().st_ino == before.st_ino


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_file_that_belongs_to_someone_else_is_replaced(path):
    Segment.create(path, SIZE)
    os.chown(path, 12345, 12345)
    Segment.create(path, SIZE)
    assert path.stat().st_uid == 0


def test_what_cannot_be_replaced_is_named(path):
    path.mkdir()
    try:
        with pytest.raises(WeightsError, match=rf"{path}: cannot be made: .*remove what is there"):
            Segment.create(path, SIZE)
    finally:
        path.rmdir()


def test_memory_that_is_not_there_is_an_error_and_not_a_signal(path):
    place = os.statvfs(path.parent)
    nbytes = (place.f_blocks + 1) * place.f_frsize
    with pytest.raises(WeightsError, match=rf"{path.parent} has \d+ bytes free.* {nbytes}: .*bucket_meg.*shm-size"):
        Segment.create(path, nbytes)
    assert not path.exists()


def test_a_reader_makes_and_changes_nothing(path, tmp_path):
    with pytest.raises(WeightsError, match="No such file"):
        Segment.open(path, SIZE)
    assert not path.exists()
    Segment.create(path, SIZE)
    with pytest.raises(WeightsError, match=f"has {SIZE} bytes, {SIZE + 1} are needed"):
        Segment.open(path, SIZE + 1)
    assert path.stat().st_size == SIZE
    assert len(Segment.open(path, SIZE - 5).memory) == SIZE - 5
    path.unlink()
    path.symlink_to(tmp_path)
    with pytest.raises(WeightsError, match="symbolic link"):
        Segment.open(path, 1)
