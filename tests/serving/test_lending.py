"""Who works on lent devices: the choice by itself, and what becomes of samples whose server stops for others."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.serving.bays import OTHER, Bays
from megatron_fapo.serving.lending import Chance, Load, choose
from tests.serving.test_keeping import Faults, collect, group_of_servers

ROLES = ("policy", "judge")


def bay(home, at_work, settled=True, alive=ROLES):
    return Chance(
        home=home,
        at_work=at_work,
        servers=dict.fromkeys(ROLES, 1),
        alive={role: role in alive for role in ROLES},
        settled=settled,
    )


def loads(policy, judge):
    """(outstanding, servers at work) of each."""
    return {
        role: Load(outstanding=outstanding, servers=servers)
        for role, (outstanding, servers) in zip(ROLES, (policy, judge), strict=True)
    }


@pytest.mark.parametrize(
    ("bays", "asked", "chosen"),
    [
        ([bay("judge", "policy", settled=False)], loads((90, 3), (1, 0)), 0),  # the first verdict
        ([bay("policy", "policy"), bay("judge", "policy")], loads((90, 3), (1, 0)), 1),  # gets its own device
        ([bay("judge", "policy", settled=False)], loads((90, 3), (0, 0)), None),
        ([bay("judge", "policy")], loads((90, 3), (9, 1)), 0),  # both are crowded: it goes home
        ([bay("judge", "policy", settled=False)], loads((90, 3), (9, 1)), None),
        ([bay("judge", "policy")], loads((90, 3), (8, 1)), None),
        ([bay("judge", "judge")], loads((90, 3), (3, 1)), None),  # the last server of one that has work
        ([bay("judge", "judge")], loads((90, 3), (4, 2)), 0),
        ([bay("judge", "judge")], loads((90, 3), (5, 2)), None),
        ([bay("policy", "policy"), bay("judge", "judge")], loads((4, 2), (90, 1)), 0),  # the tail
        ([bay("policy", "policy")], loads((0, 1), (90, 1)), 0),
        ([bay("policy", "policy")], loads((4, 2), (8, 1)), None),
        ([bay("policy", "policy", alive=("judge",))], loads((4, 1), (1, 1)), 0),  # the servers there died
        ([bay("judge", "judge", alive=("judge",))], loads((90, 3), (0, 1)), None),
        ([bay("judge", "policy", settled=False)], loads((9, 1), (9, 0)), None),  # one bay for both: in turns
        ([bay("judge", "policy")], loads((9, 1), (9, 0)), 0),
    ],
)
def test_the_choice(bays, asked, chosen):
    assert choose(bays, asked) == chosen


@given(
    own=st.fixed_dictionaries({role: st.integers(0, 3) for role in ROLES}),
    homes=st.lists(st.tuples(st.sampled_from(ROLES), st.sampled_from(ROLES)), min_size=1, max_size=6),
    outstanding=st.fixed_dictionaries({role: st.integers(0, 200) for role in ROLES}),
)
def test_nobody_starves_and_bays_come_to_rest(own, homes, outstanding):
    """With the work unchanged, bays move a few times at most, and then each role with work has a server."""
    places = [list(one) for one in homes]
    for _ in range(3 * len(places) + 1):
        at_work = {role: own[role] + sum(now == role for _, now in places) for role in ROLES}
        asked = {role: Load(outstanding=outstanding[role], servers=at_work[role]) for role in ROLES}
        chosen = choose([bay(home, now) for home, now in places], asked)
        if chosen is None:
            break
        before = places[chosen][1]
        assert outstanding[OTHER[before]] > 0
        places[chosen][1] = OTHER[before]
        if sum(own.values()) + len(places) == 1:  # one for both: they take turns
            return
    else:
        pytest.fail("still moving")
    for role in ROLES:
        assert at_work[role] or not outstanding[role] or sum(at_work.values()) == 1


def test_the_servers_of_each_bay():
    bays = Bays(size={"policy": 1, "judge": 2}, lent={"policy": 1, "judge": 1})
    assert (bays.guests("policy"), bays.guests("judge")) == (1, 2)
    servers = {"policy": ["p0", "p1", "guest"], "judge": ["j0", "j1", "guest 0", "guest 1"]}
    assert list(bays.grouped(servers)) == [
        ("policy", {"policy": ["p0"], "judge": ["guest 0", "guest 1"]}),
        ("judge", {"judge": ["j0", "j1"], "policy": ["guest"]}),
    ]


@pytest.mark.parametrize(
    ("moves", "router"),
    [("on", "none"), ("anew", "none"), pytest.param("on", "sglang", marks=pytest.mark.long)],
)
async def test_what_a_server_was_asked_goes_on_at_another(models, tmp_path, request_for, prompts, moves, router):
    """Each of two servers stops in turn: every sample comes once, with the tokens that an undisturbed server draws."""
    requests = [
        request_for(prompt, seeds=range(16), name=f"p{i}", max_new_tokens=200) for i, prompt in enumerate(prompts)
    ]
    async with group_of_servers(models, tmp_path, Faults(), count=2, router=router) as group:
        undisturbed = {sample.id: sample for samples in await collect(group, requests) for sample in samples}
        group.moves, moved = moves, []
        group.hooks.moved = moved.append
        generating = asyncio.ensure_future(collect(group, requests))
        for turn in range(4):
            await asyncio.sleep(0.05)
            client = group.clients[turn % 2]
            await group.rest([client])
            assert not await client.busy()
            assert (group.at_work, group.rests(client)) == (1, True)
            await group.work([client])
            await group.level()
        found = {sample.id: sample for samples in await generating for sample in samples}
        assert group.outstanding == 0
        assert sum(moved) > 0
        assert sorted(found) == sorted(undisturbed)
        for name, sample in found.items():
            alone = undisturbed[name]
            assert sample.token_ids.tolist() == alone.token_ids.tolist()
            assert sample.finish_reason == alone.finish_reason
            assert [(span.start, span.version) for span in sample.versions] == [(0, -1)]
            if moves == "anew":
                assert sample.logprobs.tobytes() == alone.logprobs.tobytes()
            else:
                assert np.abs(sample.logprobs - alone.logprobs).max() < 1e-4


async def test_a_request_waits_for_a_server_that_rests(models, tmp_path, request_for, prompts):
    async with group_of_servers(models, tmp_path, Faults()) as group:
        await group.rest(group.clients)
        generating = asyncio.ensure_future(collect(group, [request_for(prompts[0])]))
        choosing = asyncio.ensure_future(group.choices("c", request_for(prompts[0]).token_ids, [3, 4]))
        await asyncio.sleep(0.2)
        assert not generating.done()
        assert group.outstanding == 2
        await group.work(group.clients)
        assert len((await generating)[0]) == 1
        assert len(await choosing) == 2
        assert group.outstanding == 0
