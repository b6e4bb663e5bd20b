"""Short messages between the ranks of one machine.

A collective of gloo goes through two more threads at each end, and where every core has work each of them waits for
its turn. A message over a Unix socket wakes the thread that needs it, and that one alone. It orders memory as well:
what a rank wrote into shared memory before it sent is there for the one who has received.
"""

import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_fapo.errors import RankLost
from megatron_fapo.weights import Bytes, shared_memory_folder

_NUMBER = 4
"""Bytes of a rank's number."""


class Peers:
    """Connections to all other ranks. Every method raises RankLost when one of them has died or stays silent."""

    def __init__(self, seconds: float) -> None:
        """Collective. `seconds` is how long a rank waits for another."""
        self.rank, world = dist.get_rank(), dist.get_world_size()
        self._seconds = seconds
        self._others: dict[int, socket.socket] = {}
        if world == 1:
            return
        name = [secrets.token_hex(8)]
        dist.broadcast_object_list(name, src=0)
        doors = [shared_memory_folder() / f"fapo-{name[0]}-{rank}" for rank in range(world)]
        with self._watched(), self._door(doors[self.rank]) as own:
            dist.barrier()  # all doors are there
            for rank in range(self.rank):
                self._others[rank] = self._socket()
                self._others[rank].connect(str(doors[rank]))
                self._others[rank].sendall(self.rank.to_bytes(_NUMBER, "little"))
            for _ in range(self.rank + 1, world):
                caller, _ = own.accept()
                caller.settimeout(seconds)
                number = bytearray(_NUMBER)
                _receive(caller, memoryview(number))
                self._others[int.from_bytes(number, "little")] = caller

    def arrive(self) -> None:
        """Tell all others that this rank has come so far; waits for nobody."""
        with self._watched():
            for other in self._others.values():
                other.sendall(b".")

    def all_arrived(self) -> None:
        """Wait until all others have told."""
        with self._watched():
            for other in self._others.values():
                _receive(other, memoryview(bytearray(1)))

    def sum_on_first(self, values: Bytes) -> None:
        """Add the values of all ranks up in those of rank 0, which waits for the others."""
        with self._watched():
            if self.rank != 0:
                self._others[0].sendall(values.data)
                return
            theirs = np.empty_like(values)
            for other in self._others.values():
                _receive(other, theirs.data)
                values += theirs

    def close(self) -> None:
        """Hang up."""
        for other in self._others.values():
            other.close()
        self._others = {}

    def _socket(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(self._seconds)
        return made

    @contextmanager
    def _door(self, path: Path) -> Iterator[socket.socket]:
        """Where ranks of higher numbers call; this user's alone, and gone when they have."""
        with self._socket() as door:
            door.bind(str(path))
            try:
                path.chmod(0o600)
                door.listen(dist.get_world_size())
                yield door
            finally:
                path.unlink()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RankLost(f"another rank on this machine does not answer: {error}", rank=self.rank) from error


def _receive(other: socket.socket, into: memoryview) -> None:
    """Fill memory. Raises OSError when the other end is gone or silent."""
    while into:
        count = other.recv_into(into)
        if not count:
            raise ConnectionResetError("it has ended")
        into = into[count:]
