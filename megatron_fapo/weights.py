"""The form in which weights travel, shared by the end that writes and the end that reads.

A bucket is a file in shared memory with tensors end to end; its table of contents is a `records.Bucket`. A
checksum is made of one xxh3-128 digest a tensor, so each end computes it from the bytes that it holds.
"""

import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import xxhash

ALIGNMENT = 64
"""Tensors start on multiples of this many bytes, so that views of any dtype are legal."""


def digest(data: bytes | memoryview) -> str:
    """xxh3-128 of a tensor's bytes, as hex."""
    return str(xxhash.xxh3_128_hexdigest(data))


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

    def __init__(self, path: Path | str, nbytes: int) -> None:
        self.path = Path(path)
        self.nbytes = nbytes
        descriptor = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            os.ftruncate(descriptor, nbytes)
            self._map = mmap.mmap(descriptor, nbytes)
        finally:
            os.close(descriptor)

    @property
    def memory(self) -> memoryview:
        """The bytes, writable."""
        return memoryview(self._map)

    def remove(self) -> None:
        """Unlink the file; mappings of other processes stay valid until they close them."""
        self.path.unlink(missing_ok=True)


def aligned(offset: int) -> int:
    """The next legal start of a tensor at or after `offset` bytes."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
