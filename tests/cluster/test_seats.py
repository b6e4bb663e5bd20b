"""No two servers on one GPU, none across two nodes, the judge's slice after the policy's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.cluster.seats import Seat, Wish, seats
from megatron_fapo.errors import ConfigError


def test_the_slice_of_32b_on_eight_nodes() -> None:
    found = seats({"policy": Wish(count=12, gpus=4), "judge": Wish(count=16, gpus=1)}, nodes=8, gpus=[8] * 8)
    assert found["policy"] == [Seat(node=i // 2, gpu=4 * (i % 2)) for i in range(12)]
    assert found["judge"] == [Seat(node=6 + i // 8, gpu=i % 8) for i in range(16)]


@given(
    policy=st.builds(Wish, count=st.integers(1, 6), gpus=st.integers(1, 8)),
    judge=st.builds(Wish, count=st.integers(1, 6), gpus=st.integers(1, 8)),
    nodes=st.integers(1, 6),
)
def test_nobody_shares_a_gpu_and_nobody_reaches_over_two_nodes(policy: Wish, judge: Wish, nodes: int) -> None:
    wishes = {"policy": policy, "judge": judge}
    try:
        found = seats(wishes, nodes=nodes, gpus=[8] * nodes)
    except ConfigError:
        assert policy.count * policy.gpus + judge.count * judge.gpus > 8 * nodes - 7 * nodes
        return
    taken = [
        (seat.node, (seat.gpu or 0) + i) for role in wishes for seat in found[role] for i in range(wishes[role].gpus)
    ]
    assert len(taken) == len(set(taken))
    assert all(node < nodes and gpu < 8 for node, gpu in taken)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match=r"servers\.judge: 0 of 1 servers with 4 GPUs each fit on 1 node"):
        seats({"policy": Wish(count=1, gpus=6), "judge": Wish(count=1, gpus=4)}, nodes=1, gpus=[8])


def test_cpus_take_the_nodes_in_turn() -> None:
    found = seats({"policy": Wish(count=3, gpus=0), "judge": Wish(count=1, gpus=0)}, nodes=2, gpus=[0, 0])
    assert [seat.node for seat in found["policy"]] == [0, 1, 0]
