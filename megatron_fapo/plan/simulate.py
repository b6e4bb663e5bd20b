"""Steps of a run in virtual time: the real sampler, judge and server group, against modelled servers and ranks."""

import asyncio
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

from megatron_fapo.algorithm.rewards import informative
from megatron_fapo.config import Config
from megatron_fapo.judge.answerer import Served
from megatron_fapo.judge.ask import Asker
from megatron_fapo.judge.judge import Judge, Rules
from megatron_fapo.plan.assumptions import Assumptions
from megatron_fapo.plan.deployment import Deployment, Servers
from megatron_fapo.plan.engine import Engine
from megatron_fapo.plan.memory import cache_rooms, cache_share
from megatron_fapo.plan.servers import Answers, ModelledDevices, ModelledServer
from megatron_fapo.plan.times import publish, rates, switch, update
from megatron_fapo.plan.virtual_time import LoopClock, run_virtual
from megatron_fapo.plan.workload import Workload, workload
from megatron_fapo.records import Group, NotJudged, Role, Verdict
from megatron_fapo.rollout.sampler import Sampler
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.group import ServerGroup
from megatron_fapo.serving.lending import Bay, Lender
from megatron_fapo.trace import Stint


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step, in seconds and counts."""

    publish: float
    switch: float
    generate: float
    """Until the last verdict."""
    rollouts_landed: float
    """Until the last rollout."""
    update: float
    tokens: int
    """Of prompts and responses."""
    judged: int
    skipped: int
    failed: int
    judge_tokens: int
    tail: float
    """Share of `rollouts_landed` in which less than a tenth of the rollouts was still being written."""
    policy_busy: float
    """Share of the policy servers' time with something to write; above 1 with what they did on the judge's GPUs."""
    judge_busy: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.publish + self.switch + self.generate + self.update


@dataclass(slots=True)
class World:
    """What the steps of one simulation share."""

    config: Config
    made: Deployment
    assume: Assumptions
    work: Workload
    policy: list[ModelledServer]
    judge: list[ModelledServer]
    stints: list[Stint] = field(default_factory=list)
    """How long servers worked on devices that are lent."""
    landed: list[float] = field(default_factory=list)
    groups: dict[Role, ServerGroup] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = {"policy": ServerGroup(cast("Sequence[ServerClient]", self.policy))}
        if self.judge:
            self.groups["judge"] = ServerGroup(cast("Sequence[ServerClient]", self.judge))
        for group in self.groups.values():
            group.moves = "on" if self.made.bays else "never"

    async def step(self, number: int, dead_server: float | None) -> Step:
        """Publish, hand over, generate and judge, update."""
        clock, config = LoopClock(), self.config
        spent = publish(self.made, self.assume), switch(self.made, config.policy, self.assume)
        await clock.sleep(sum(spent))
        for server in self.policy:
            server.version = number
        self.landed.clear()
        busy = self._busy()
        begin = clock.now()
        dying = None
        if dead_server is not None:
            dying = asyncio.get_running_loop().call_later(dead_server, self.policy[0].die)
        async with self._lending():
            groups = await self._sampler().collect(number, number * config.rollout.prompts_per_step)
        if dying is not None:
            dying.cancel()
        seconds = clock.now() - begin
        updating = update(self.made, config.policy, config.batch, self.assume, *self._sequences(groups)).seconds
        await clock.sleep(updating)
        verdicts = [judged.verdict for group in groups for judged in group]
        counted = [v for v in verdicts if isinstance(v, Verdict)]
        not_judged = [v.reason for v in verdicts if isinstance(v, NotJudged)]
        last = max(self.landed) - begin
        tenth = sorted(self.landed)[-max(len(self.landed) // 10, 1)] - begin
        shares = [
            (now - before) / seconds / (kind.count if kind else 1)
            for now, before, kind in zip(self._busy(), busy, (self.made.policy, self.made.judge), strict=True)
        ]
        return Step(
            publish=spent[0],
            switch=spent[1],
            generate=seconds,
            rollouts_landed=last,
            update=updating,
            tokens=sum(len(group.prompt.token_ids) + len(j.rollout.token_ids) for group in groups for j in group),
            judged=len(counted),
            skipped=not_judged.count("skipped"),
            failed=not_judged.count("failed"),
            judge_tokens=sum(v.tokens for v in counted),
            tail=(last - tenth) / last,
            policy_busy=shares[0],
            judge_busy=shares[1],
        )

    @asynccontextmanager
    async def _lending(self) -> AsyncIterator[None]:
        """While rollouts and verdicts are drawn, devices may change hands."""
        bays = self.made.bays
        if not bays:
            yield
            return
        servers = {role: group.clients for role, group in self.groups.items()}
        lender = Lender(
            bays=[Bay(home=home, servers=both) for home, both in bays.grouped(servers)],
            groups=self.groups,
            size=bays.size,
            devices=ModelledDevices(self.assume.hand_over / 2),
            told=self.stints.append,
            clock=LoopClock(),
        )
        await lender.begin()
        lending = asyncio.ensure_future(lender.run())
        yield
        lending.cancel()
        await asyncio.gather(lending, return_exceptions=True)
        lender.end()

    def _busy(self) -> tuple[float, float]:
        return sum(s.busy for s in self.policy), sum(s.busy for s in self.judge)

    def _sampler(self) -> Sampler:
        config, clock = self.config, LoopClock()
        asker = None
        if self.judge:
            asker = Asker(Served(self.groups["judge"], self.work), config.judge, clock, config.train.seed)
        rules = Rules(
            judge=config.judge,
            algorithm=config.algorithm,
            group_size=config.rollout.group_size,
            max_tokens=config.rollout.max_new_tokens,
        )
        return Sampler(
            task=self.work,
            servers=self.groups["policy"],
            judge=Judge(asker, rules, clock),
            tokenizer=self.work,
            settings=config.rollout,
            algorithm=config.algorithm,
            seed=config.train.seed,
            progress=lambda rollouts: self._one_landed(clock.now()),
        )

    def _one_landed(self, now: float) -> None:
        self.landed.append(now)
        if self.made.judge_place == "after" and len(self.landed) == self._wanted:
            for server in self.judge:
                server.open_gate()

    @property
    def _wanted(self) -> int:
        return self.config.rollout.prompts_per_step * self.config.rollout.group_size

    def _sequences(self, groups: Sequence[Group]) -> tuple[list[int], list[int]]:
        """Lengths of the sequences with a gradient, and of all."""
        limit, algorithm = self.config.rollout.max_new_tokens, self.config.algorithm
        lengths = {
            group.prompt.id: [len(group.prompt.token_ids) + len(j.rollout.token_ids) for j in group] for group in groups
        }
        skipping = self.config.batching.skip_zero_advantage
        working = [g for g in groups if not skipping or informative(g, algorithm, max_tokens=limit)] or groups[:1]
        return (
            [length for group in working for length in lengths[group.prompt.id]],
            [length for some in lengths.values() for length in some],
        )


def world(config: Config, made: Deployment, assume: Assumptions, mean: float | None = None) -> World:
    """Servers of a deployment, and what they are asked."""
    if made.judge_place == "after":  # the deadline would end verdicts that could not begin before
        config = config.changed(judge=config.judge.changed(step_deadline=None))
    work = workload(assume, config.rollout.max_new_tokens, config.judge.max_new_tokens, mean)
    policy_room, judge_room = cache_rooms(made)

    def servers(role: Role, kind: Servers, room: float, answers: Answers) -> list[ModelledServer]:
        pace, capacity = rates(kind, made.card, assume), int(room / cache_share(kind))
        guests = made.bays.guests(role) if made.bays else 0
        return [
            ModelledServer(f"{role}-{place}", Engine(pace, capacity, kind.max_running), answers, work)
            for place in range(kind.count + guests)
        ]

    policy = servers("policy", made.policy, policy_room, lambda seed, _: work.response(seed))
    judge: list[ModelledServer] = []
    if made.judge is not None:
        judge = servers("judge", made.judge, judge_room, work.verdict)
        if made.judge_place == "shared":
            _share(policy, judge, made)
        for server in judge:
            server.gate = made.judge_place != "after"
    return World(config=config, made=made, assume=assume, work=work, policy=policy, judge=judge)


def _share(policy: list[ModelledServer], judge: list[ModelledServer], made: Deployment) -> None:
    """Servers that have a GPU in common are neighbours."""
    assert made.judge is not None
    for place, server in enumerate(policy):
        first, last = place * made.policy.tensor, (place + 1) * made.policy.tensor - 1
        others = judge[first // made.judge.tensor : last // made.judge.tensor + 1]
        server.neighbours += others
        for other in others:
            other.neighbours.append(server)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """Steps with the judge, and the same steps of plain RLVR."""

    steps: tuple[Step, ...]
    plain: tuple[Step, ...]

    def mean(self, name: str) -> float:
        """Of a field of the steps."""
        return statistics.fmean(getattr(step, name) for step in self.steps)

    @property
    def plain_seconds(self) -> float:
        """A plain RLVR step that still generates and trains: without judge, publication and change of phase."""
        return statistics.fmean(step.generate + step.update for step in self.plain)

    @property
    def judge_overhead(self) -> float:
        """What verdicts add to generation, over the plain step."""
        return (self.mean("generate") - statistics.fmean(step.generate for step in self.plain)) / self.plain_seconds

    @property
    def learning_share(self) -> float:
        """What verdicts add to the update: groups of right answers that have a gradient once one of them is flawed."""
        return (self.mean("update") - statistics.fmean(step.update for step in self.plain)) / self.plain_seconds

    @property
    def publish_share(self) -> float:
        """Publication over the plain step."""
        return self.mean("publish") / self.plain_seconds

    @property
    def switch_share(self) -> float:
        """Changes of phase over the plain step."""
        return self.mean("switch") / self.plain_seconds

    @property
    def overhead(self) -> float:
        """All of them."""
        return self.judge_overhead + self.learning_share + self.publish_share + self.switch_share


def simulate(
    config: Config,
    made: Deployment,
    assume: Assumptions,
    *,
    steps: int = 2,
    mean: float | None = None,
    dead_server: float | None = None,
) -> Simulation:
    """Run `steps` steps with the judge and without, each from the same seeds; `dead_server` seconds into each step's
    generation its first policy server dies, and is back in the next step."""
    return Simulation(
        steps=_run(config, made, assume, steps, mean, dead_server),
        plain=_run(config, made.without_judge(), assume, steps, mean, None),
    )


def _run(
    config: Config, made: Deployment, assume: Assumptions, steps: int, mean: float | None, dead_server: float | None
) -> tuple[Step, ...]:
    async def run(number: int) -> Step:
        return await world(config, made, assume, mean).step(number, dead_server)

    return tuple(run_virtual(run(number)) for number in range(steps))
