"""Devices that policy and judge lend each other while a run generates, with real servers: who holds what, and when."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_fapo.cluster.lending import open_lending
from megatron_fapo.cluster.phases import Phases
from megatron_fapo.cluster.seats import Seat, Wish, seats
from megatron_fapo.cluster.serve_roles import open_servers
from megatron_fapo.config import Config, read_config
from megatron_fapo.errors import ConfigError, MemoryHeld
from megatron_fapo.records import Generation, GenerationRequest, Role, Sampling, ints
from megatron_fapo.serving.bays import Bays
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.group import ServerGroup
from megatron_fapo.trace import Stint
from tests.cluster.test_phases import Hoarder
from tests.cluster.whole_runs import ROOT, finish, lines, start
from tests.serving.worlds import make_model

LENDING = ["cluster.placement=colocated", "servers.policy.lend=1", "servers.judge.lend=1"]


def requests(name: str, count: int, tokens: int = 200) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            ids=tuple(f"{name}{place}-r{index}" for index in range(4)),
            token_ids=ints([3, 4, 5 + place]),
            seeds=tuple(range(4)),
            sampling=Sampling(max_new_tokens=tokens),
        )
        for place in range(count)
    ]


@dataclass
class Lending:
    """A policy server and a judge server, each with one of the other role on its device."""

    groups: dict[Role, ServerGroup]
    phases: Phases
    stints: list[Stint] = field(default_factory=list)
    worst: int = 0
    """Most bytes of KV cache that the servers at rest were ever seen to hold together."""
    seen: Counter[str] = field(default_factory=Counter)
    """How often a server was seen with something to do."""

    def bays(self) -> list[dict[Role, ServerClient]]:
        policy, judge = self.groups["policy"].clients, self.groups["judge"].clients
        return [{"policy": policy[0], "judge": judge[1]}, {"policy": policy[1], "judge": judge[0]}]

    async def watch(self, bays: list[dict[Role, ServerClient]]) -> None:
        """Both servers of each device, again and again."""
        while True:
            for bay in bays:
                with suppress(Exception):
                    found = {role: await client.info() for role, client in bay.items()}
                    self.worst = max(self.worst, min(info["memory"]["kv_cache"] for info in found.values()))
                    for role, info in found.items():
                        self.seen[bay[role].url] += info["running"] > 0
            await asyncio.sleep(0.01)

    async def ask(self, role: Role, asked: Sequence[GenerationRequest]) -> dict[str, Generation]:
        async def one(request: GenerationRequest) -> list[Generation]:
            return [sample async for sample in self.groups[role].generate(request)]

        answers = await asyncio.gather(*map(one, asked))
        found = {sample.id: sample for samples in answers for sample in samples}
        assert sorted(found) == sorted(name for request in asked for name in request.ids)
        assert sum(map(len, answers)) == len(found)
        return found

    async def until_judged(self, bay: dict[Role, ServerClient]) -> None:
        """Until the judge's servers work there."""
        while self.groups["judge"].rests(bay["judge"]) or not self.groups["policy"].rests(bay["policy"]):
            await asyncio.sleep(0.005)


@asynccontextmanager
async def lending(tmp_path: Path, ranks: Hoarder | None = None) -> AsyncIterator[Lending]:
    """In `generate`, with both devices the policy's."""
    model = make_model(tmp_path / "model")
    names = ("train.deterministic=true", *(f"servers.{role}.max_running=16" for role in ("policy", "judge")))
    models = [
        f"servers.{role}.{key}" for role in ("policy", "judge") for key in (f"model={model}", "context_length=900")
    ]
    limits = ("rollout.max_prompt_tokens=100", "rollout.max_new_tokens=300", "judge.max_new_tokens=300")
    config: Config = read_config(ROOT / "configs/clock/fapo.yaml", [*LENDING, *names, *models, *limits])
    phases = Phases(ranks or Hoarder())
    await phases.make_room()
    async with open_servers(config, tmp_path) as groups:
        world = Lending(groups=groups, phases=phases)
        async with open_lending(config, groups, phases, world.stints.append):
            await phases.enter("publish")
            for client in groups["policy"].clients:  # as a publication brings them
                await client.load_from_disk(str(model), 0)
            await phases.enter("generate")
            yield world


async def test_devices_go_where_the_work_is_and_nobody_holds_two_caches(tmp_path: Path) -> None:
    async with lending(tmp_path) as world:
        own, slice_ = world.bays()
        watching = asyncio.ensure_future(world.watch(world.bays()))
        alone = await world.ask("policy", requests("alone", 8))
        assert world.seen[slice_["policy"].url] > 0  # on the judge's device
        assert world.seen[slice_["judge"].url] == 0

        rollouts = asyncio.ensure_future(world.ask("policy", requests("p", 24)))
        await asyncio.sleep(0.1)
        verdicts = asyncio.ensure_future(world.ask("judge", requests("j", 1)))
        await asyncio.wait_for(world.until_judged(slice_), 30)
        judged = await verdicts
        assert world.seen[slice_["judge"].url] > 0
        found = await rollouts
        for name in alone:  # every sample from its own seed, wherever it was drawn
            assert found[name.replace("alone", "p")].token_ids.tolist() == alone[name].token_ids.tolist()
            assert found[name.replace("alone", "p")].logprobs.tobytes() == alone[name].logprobs.tobytes()

        late = asyncio.ensure_future(world.ask("judge", requests("late", 24)))  # no rollout is left: the tail
        await asyncio.wait_for(world.until_judged(own), 30)
        again = await late
        assert world.seen[own["judge"].url] > 0  # on the policy's device
        for name in judged:
            assert again[name.replace("j", "late", 1)].token_ids.tolist() == judged[name].token_ids.tolist()

        watching.cancel()
        assert world.worst == 0
        for phase in ("train", "publish"):
            await world.phases.enter(phase)
            for group in world.groups.values():
                memories = [(await client.info())["memory"] for client in group.clients]
                assert all(memory["kv_cache"] == 0 for memory in memories)
                assert all(
                    bool(m["weights"]) == (phase == "publish" and group is world.groups["policy"]) for m in memories
                )
        lent = {role: sum(s.seconds for s in world.stints if s.lent and s.role == role) for role in world.groups}
        assert min(lent.values()) > 0
        assert sum(stint.handed_over for stint in world.stints) >= 2
        assert sum(stint.nbytes for stint in world.stints) > 0


@pytest.mark.parametrize("place", [0, 1])
async def test_a_server_that_dies_on_a_lent_device_loses_nothing(tmp_path: Path, place: int) -> None:
    """At its work in the judge's bay, or while its own role has the device."""
    async with lending(tmp_path) as world:
        bay = world.bays()[1]
        victim: Role = ("policy", "judge")[place]
        alone = await world.ask("policy", requests("alone", 2))
        rollouts = asyncio.ensure_future(world.ask("policy", requests("p", 24)))
        while not (await bay["policy"].info())["running"]:
            await asyncio.sleep(0.01)
        verdicts = None
        if victim == "judge":
            verdicts = asyncio.ensure_future(world.ask("judge", requests("j", 4)))
            await asyncio.wait_for(world.until_judged(bay), 30)
        os.kill(await pid_of(bay[victim]), signal.SIGKILL)
        verdicts = verdicts or asyncio.ensure_future(world.ask("judge", requests("j", 4)))
        found = await asyncio.wait_for(rollouts, 120)
        assert len(await asyncio.wait_for(verdicts, 120)) == 16
        for name in alone:
            assert found[name.replace("alone", "p")].token_ids.tolist() == alone[name].token_ids.tolist()
        assert [len(world.groups[role].clients) for role in ("policy", "judge")] == [2 - (place == 0), 2 - (place == 1)]


async def pid_of(client: ServerClient) -> int:
    port = int(client.url.rsplit(":", 1)[1])
    children = psutil.Process().children(recursive=True)
    return next(p.pid for p in children if any(c.laddr.port == port for c in p.net_connections("tcp")))


class Keeping(ServerClient):
    """A server that says that it has given its memory back."""

    async def release_memory(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Nothing."""

    async def flush_cache(self) -> None:
        """Nothing."""


class Silent(ServerClient):
    """A server that does not say what it holds, as SGLang does not."""

    async def info(self) -> dict[str, Any]:
        """All else."""
        return {key: value for key, value in (await super().info()).items() if key != "memory"}


@pytest.mark.parametrize(
    ("kind", "free", "message"),
    [
        (Keeping, None, "{url} lends its devices and still holds .* KV cache"),
        (Silent, 100, "{url}: lends its devices, and they have no more room than before"),
        (Silent, None, None),
    ],
)
async def test_a_server_that_keeps_its_cache_ends_the_run_by_name(
    tmp_path: Path, kind: type[ServerClient], free: int | None, message: str | None
) -> None:
    ranks = Hoarder()
    async with lending(tmp_path, ranks=ranks) as world:
        bay = world.bays()[1]
        await world.ask("policy", requests("p", 8))
        bay["policy"].__class__, ranks.free = kind, free
        judged = asyncio.wait_for(world.ask("judge", requests("j", 1)), 30)
        if message is None:
            assert len(await judged) == 4
            return
        with pytest.raises(MemoryHeld, match=message.format(url=bay["policy"].url)):
            await judged


@pytest.mark.long
def test_a_run_that_lends_gives_the_same_metrics(tmp_path: Path) -> None:
    few = ["train.steps=3", "evaluation.every=2", "checkpoint.every=3"]
    finish(start(tmp_path / "lends", *LENDING, *few))
    finish(start(tmp_path / "keeps", "cluster.placement=colocated", *few))
    timed = ("time/", "servers/", "memory/")
    lends, keeps = (
        [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines(tmp_path / name)]
        for name in ("lends", "keeps")
    )
    assert lends == keeps
    for line in lines(tmp_path / "lends")[:3]:
        assert line["servers/handovers"] > 0
        assert line["time/lent_to_policy"] > 0
        # Both of a role hold their weights, whoever is at work.
        for owner in ("publish/policy_weights", "generate/policy_weights", "generate/judge_weights"):
            assert line[f"memory/{owner}"] == pytest.approx(2 * lines(tmp_path / "keeps")[0][f"memory/{owner}"])


def test_guests_sit_on_the_devices_that_are_lent() -> None:
    wishes = {"policy": Wish(count=2, gpus=4), "judge": Wish(count=8, gpus=1)}
    bays = Bays(size={"policy": 1, "judge": 4}, lent={"policy": 1, "judge": 1})
    found = seats(wishes, nodes=2, gpus=[8, 8], bays=bays)
    assert found["policy"] == [Seat(node=0, gpu=0), Seat(node=0, gpu=4), Seat(node=1, gpu=0)]
    assert found["judge"][8:] == [Seat(node=0, gpu=gpu) for gpu in range(4)]
    wishes = {"policy": Wish(count=1, gpus=4), "judge": Wish(count=4, gpus=1)}
    with pytest.raises(ConfigError, match="not side by side on one node"):
        seats(wishes, nodes=2, gpus=[6, 6], bays=Bays(size=bays.size, lent={"policy": 0, "judge": 1}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.placement=split"], r"servers\.policy\.lend = 1 needs cluster\.placement = colocated"),
        (["judge.enabled=false"], "lends devices to servers of the judge, and the run starts none"),
        (["servers.judge.lend=2"], r"servers\.judge\.lend = 2 is more than servers\.judge\.count = 1"),
        (["servers.judge.max_count=2"], "leave servers.judge.max_count out"),
        (["servers.judge.engine=sglang"], "share no device"),
        (
            [f"servers.{role}.engine=sglang" for role in ("policy", "judge")]
            + ["servers.policy.sglang.tensor_parallel=2"],
            r"servers\.judge\.lend = 1 must be a multiple of 2",
        ),
        (
            [f"servers.{role}.engine=sglang" for role in ("policy", "judge")]
            + ["servers.policy.sglang.tensor_parallel=2", "servers.judge.sglang.tensor_parallel=3"],
            "cannot share their devices evenly",
        ),
    ],
)
def test_what_cannot_be_lent_is_refused_by_name(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(ROOT / "configs/clock/fapo.yaml", [*LENDING, "train.deterministic=false", *overrides])
