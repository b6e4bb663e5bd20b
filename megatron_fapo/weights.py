"""The form in which weights travel, shared by the end that writes and the end that reads.

A bucket is a file in shared memory with tensors end to end; its table of contents is a `records.Bucket`. A
checksum is made of one digest a tensor, so each end computes it from the bytes that it holds. A tensor's digest is
made of one xxh3-128 sum a block, so that several ranks and threads can sum one tensor, each while it copies.
"""

import errno
import mmap
import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_fapo.errors import WeightsError

ALIGNMENT = 64
"""Tensors start on multiples of this many bytes, so that views of any dtype are legal."""

Bytes = npt.NDArray[np.uint8]

BLOCK = 2**18
"""Bytes that are copied and summed at a time: a quarter of a megabyte stays in a core's own cache."""
SUM = 16
"""Bytes of the sum of a block."""
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "float64": 8}
"""Bytes of an element, by torch's name of the type."""
_PRIVATE = 0o600
_BLOCK = 512
"""Bytes in a unit of `st_blocks`, whatever the file system."""


def digest(data: bytes | memoryview) -> str:
    """The digest of a tensor's bytes, as hex."""
    data = memoryview(data)
    return combined(b"".join(block_sum(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK)))


def block_sum(block: memoryview) -> bytes:
    """xxh3-128 of a block."""
    return xxhash.xxh3_128_digest(block)


def combined(sums: bytes | memoryview) -> str:
    """The digest of a tensor from the sums of its blocks, end to end."""
    return str(xxhash.xxh3_128_hexdigest(sums))


def blocks(nbytes: int) -> int:
    """The number of blocks of a tensor."""
    return -(-nbytes // BLOCK)


def copy(source: Bytes, target: Bytes) -> str:
    """Copy bytes and return the digest of what `target` then holds."""
    sums = bytearray(blocks(len(target)) * SUM)
    write([source], target, 0, memoryview(sums))
    return combined(bytes(sums))


def write(runs: Iterable[Bytes], tensor: Bytes, start: int, sums: memoryview) -> None:
    """Copy runs of bytes, end to end, into a tensor from byte `start` on, and sum the blocks that they fill.

    What is summed is what `tensor` then holds, while it is in the cache. `sums` has SUM bytes for each block of the
    tensor; those of blocks that begin before `start` or are not filled stay as they are.
    """
    first = start
    for run in runs:
        done = 0
        while done < len(run):
            begin = start - start % BLOCK
            size = min(len(run) - done, begin + BLOCK - start)
            np.copyto(tensor[start : start + size], run[done : done + size])
            done, start = done + size, start + size
            if begin >= first and (start == begin + BLOCK or start == len(tensor)):
                row = begin // BLOCK * SUM
                sums[row : row + SUM] = block_sum(tensor[begin:start].data)


def checksum(digests: Mapping[str, str]) -> str:
    """One checksum over {tensor name: digest}, independent of the mapping's order."""
    whole = xxhash.xxh3_128()
    for name in sorted(digests):
        whole.update(f"{name}={digests[name]}\n".encode())
    return str(whole.hexdigest())


def shared_memory_folder() -> Path:
    """Where segments live: /dev/shm, or the temporary folder where that is missing."""
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


class Segment:
    """A file of fixed size mapped into memory, readable by this user only. Who creates it removes it."""

    def __init__(self, path: Path, descriptor: int, nbytes: int) -> None:
        """Use `create` or `open`. Takes the descriptor of the file over."""
        self.path = path
        self.nbytes = nbytes
        with os.fdopen(descriptor, "rb+") as file:
            status = os.fstat(file.fileno())
            self._file = (status.st_dev, status.st_ino, status.st_size)
            self._map = mmap.mmap(file.fileno(), nbytes)

    @classmethod
    def create(cls, path: Path | str, nbytes: int) -> "Segment":
        """The end that writes: a file whose every byte is there, so that writing cannot fail.

        An own file of this size is used as it is. Anything else under the name, a link or a file that others may
        read, is replaced. Raises WeightsError when there is no room, or when what is there cannot be replaced.
        """
        path = Path(path)
        descriptor = _open_own(path, nbytes)
        if descriptor is None:
            descriptor = _make(path, nbytes)
        return cls(path, descriptor, nbytes)

    @classmethod
    def open(cls, path: Path | str, nbytes: int, *, whole: bool = False) -> "Segment":
        """The end that reads: the first `nbytes`, or the whole, of a file that must be there. Raises WeightsError."""
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise WeightsError(f"segment {path}: {error.strerror}") from None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size < nbytes:
            os.close(descriptor)
            raise WeightsError(f"segment {path}: has {status.st_size} bytes, {nbytes} are needed")
        return cls(path, descriptor, status.st_size if whole else nbytes)

    def is_still(self, nbytes: int) -> bool:
        """Whether the file under the name is the mapped one, and `nbytes` of it are mapped."""
        try:
            now = os.lstat(self.path)
        except OSError:
            return False
        return (now.st_dev, now.st_ino, now.st_size) == self._file and nbytes <= self.nbytes

    @property
    def memory(self) -> memoryview:
        """The bytes, writable."""
        return memoryview(self._map)

    def remove(self) -> None:
        """Unlink the file; mappings of other processes stay valid until they close them."""
        self.path.unlink(missing_ok=True)


def _open_own(path: Path, nbytes: int) -> int | None:
    """The file under this name, if it is just what `_make` would make."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    status = os.fstat(descriptor)
    private = stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) == _PRIVATE and status.st_nlink == 1
    whole = status.st_size == nbytes and status.st_blocks * _BLOCK >= nbytes
    if private and whole and status.st_uid == os.geteuid():
        return descriptor
    os.close(descriptor)
    return None


def _make(path: Path, nbytes: int) -> int:
    """A new file with all its blocks, in place of what has its name."""
    try:
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, _PRIVATE)
    except OSError as error:
        raise WeightsError(f"segment {path}: cannot be made: {error.strerror}; remove what is there") from None
    try:
        if sys.platform == "darwin":
            os.ftruncate(descriptor, nbytes)
        else:
            # Reserved now: a file that ftruncate made kills its writer (SIGBUS) once the memory is full.
            os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise WeightsError(f"segment {path}: {error.strerror}") from None
        place = os.statvfs(path.parent)
        raise WeightsError(
            f"{path.parent} has {place.f_bavail * place.f_frsize} bytes free, each of two buckets needs {nbytes}: "
            "lower publish.bucket_megabytes, or give a container more with --shm-size"
        ) from None
    return descriptor


def aligned(offset: int) -> int:
    """The next legal start of a tensor at or after `offset` bytes."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
