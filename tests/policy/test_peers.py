"""Ranks of one machine that wait for each other: what was told arrives, and one that is gone or frozen is noticed."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch.distributed as dist

from megatron_fapo.errors import RankLost
from megatron_fapo.policy.peers import Peers
from megatron_fapo.weights import shared_memory_folder

WORLD = 3
SECONDS = 2.0


def rank_of(rank: int, folder: str, body, answers) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    peers = Peers(SECONDS)
    answers.put((rank, body(rank, peers)))


def together(tmp_path, body, answering: int = WORLD):
    """The answers of so many ranks."""
    context = multiprocessing.get_context("forkserver")
    answers = context.SimpleQueue()
    ranks = [context.Process(target=rank_of, args=(rank, str(tmp_path), body, answers)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    found = dict(answers.get() for _ in range(answering))
    for process in ranks:
        process.kill()
        process.join()
    return found


def adds_up(rank: int, peers: Peers):
    found = []
    for round in range(3):
        time.sleep(0.05 * rank)
        peers.arrive()
        peers.all_arrived()
        values = np.zeros(100_000, np.uint8)
        values[rank::WORLD] = 10 * round + rank + 1
        peers.sum_on_first(values)
        found.append(values)
    peers.close()
    return found


def test_the_first_rank_gets_what_all_have(tmp_path):
    before = set(shared_memory_folder().glob("fapo-*"))
    found = together(tmp_path, adds_up)
    for round, values in enumerate(found[0]):
        assert [values[rank::WORLD].tolist() for rank in range(WORLD)] == [
            [10 * round + rank + 1] * len(values[rank::WORLD]) for rank in range(WORLD)
        ]
    assert set(shared_memory_folder().glob("fapo-*")) <= before


def waits_for_the_dead(rank: int, peers: Peers):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return noticed(peers)


def waits_for_the_frozen(rank: int, peers: Peers):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return noticed(peers)


def noticed(peers: Peers):
    started = time.monotonic()
    try:
        peers.arrive()
        peers.all_arrived()
    except RankLost as lost:
        return str(lost), time.monotonic() - started
    return "", 0.0


@pytest.mark.parametrize("body", [waits_for_the_dead, waits_for_the_frozen])
def test_a_rank_that_dies_or_freezes_is_noticed_in_time(tmp_path, body):
    found = together(tmp_path, body, answering=WORLD - 1)
    assert set(found) == {0, 2}
    for said, seconds in found.values():
        assert "another rank on this machine does not answer" in said
        assert seconds < 2 * SECONDS
