"""Does a configuration fit, how long does its step take, what holds it up, and what to change: without simulating.

Generation is taken as the policy's servers alone would do it, each with its share of the rollouts, and verdicts as the
judge's servers would if all solutions were there at once; how much of the one hides behind the other takes the
simulation.
"""

from dataclasses import dataclass

from megatron_fapo.config import Config
from megatron_fapo.plan.assumptions import Assumptions
from megatron_fapo.plan.deployment import Deployment, Servers
from megatron_fapo.plan.engine import Engine, Sample, drain
from megatron_fapo.plan.memory import Phase, cache_tokens, overfull, phases
from megatron_fapo.plan.times import Update, publish, rates, switch, update
from megatron_fapo.plan.workload import JUDGE_WORDS, Workload, workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What a role's servers take for a step's work, all of it there from the start."""

    seconds: float
    floor: float
    """No placement of requests can be faster (`floor`)."""
    tokens: int
    causes: dict[str, float]
    """{what time goes to: share}, of the busiest server."""
    tail: float
    """Share of the time in which less than a tenth of the samples is still being written."""
    retracted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A configuration on GPUs, in bytes and seconds."""

    deployment: Deployment
    memory: dict[str, Phase]
    overfull: dict[str, int]
    cache: dict[str, int]
    """{role: tokens whose keys and values fit into one server}."""
    generate: Serving
    judge: Serving | None
    update: Update
    publish: float
    switch: float
    tokens: int
    """Of a step's prompts and responses."""

    @property
    def fits(self) -> bool:
        """Whether every phase has room."""
        return not self.overfull

    @property
    def seconds(self) -> float:
        """Of a step."""
        generating = self.generate.seconds
        if self.judge is not None:
            apart = self.deployment.judge_place == "slice"
            generating = max(generating, self.judge.seconds) if apart else generating + self.judge.seconds
        return generating + self.update.seconds + self.publish + self.switch

    @property
    def tokens_per_gpu(self) -> float:
        """A second, prompts included."""
        return self.tokens / self.seconds / self.deployment.gpus


def estimate(config: Config, made: Deployment, assume: Assumptions, mean: float | None = None) -> Plan:
    """The plan of a configuration on a deployment of it; `mean` tokens of a response."""
    work = workload(assume, config.rollout.max_new_tokens, config.judge.max_new_tokens, mean)
    count = config.rollout.prompts_per_step * config.rollout.group_size
    lengths = work.responses.quantiles(count)
    prompt = int(assume.prompt_tokens)
    generate = _serve(made.policy, made, assume, [(prompt, length) for length in lengths], config.rollout.group_size)
    judge = None
    if made.judge is not None:
        judge = _serve(made.judge, made, assume, _verdicts(config, work, lengths, assume), 1)
    every = [prompt + length for length in lengths]
    memory = phases(
        made, config.policy, config.batch.tokens_per_microbatch, config.publish.bucket_megabytes * 2**20, assume
    )
    servers = {"policy": made.policy, **({"judge": made.judge} if made.judge else {})}
    return Plan(
        deployment=made,
        memory=memory,
        overfull=overfull(memory, made.card.memory),
        cache={role: cache_tokens(one, made.card.memory) for role, one in servers.items()},
        generate=generate,
        judge=judge,
        update=update(made, config.policy, config.batch, assume, every, every),
        publish=publish(made, assume),
        switch=switch(made, config.policy, assume),
        tokens=sum(every),
    )


def _verdicts(config: Config, work: Workload, lengths: list[int], assume: Assumptions) -> list[tuple[int, int]]:
    """(prompt, answer) tokens of the judge for the right ones; a cascade's clear cases end after their prompt."""
    right = lengths[: round(assume.right * len(lengths))]
    answers = work.verdicts.quantiles(len(right)) if right else []
    if config.judge.cascade is not None:
        clear = round(assume.clear * len(answers))
        answers[:clear] = [1] * clear
    asked = [int(assume.prompt_tokens) + JUDGE_WORDS + length for length in right]
    return [(prompt, answer) for prompt, answer in zip(asked, answers, strict=True) for _ in range(config.judge.votes)]


def _serve(
    servers: Servers, made: Deployment, assume: Assumptions, asked: list[tuple[int, int]], group: int
) -> Serving:
    pace = rates(servers, made.card, assume)
    capacity = cache_tokens(servers, made.card.memory)
    total = sum(answer for _, answer in asked)
    if capacity <= 0 or not asked:
        return Serving(seconds=0.0, floor=0.0, tokens=total, causes={}, tail=0.0, retracted=0)
    groups = [asked[start : start + group] for start in range(0, len(asked), group)]
    slowest, retracted = (0.0, 0.0, {"none": 1.0}), 0
    for place in range(min(servers.count, len(groups))):
        engine = Engine(pace, capacity, servers.max_running)
        for number, members in enumerate(groups[place :: servers.count]):
            for index, (prompt, answer) in enumerate(members):
                engine.add(Sample(f"{number}-{index}", prompt, answer, 0 if index else prompt))
        seconds, ended = drain(engine)
        retracted += engine.retracted
        ends = sorted(ended.values())
        tail = 1 - ends[-max(len(ends) // 10, 1)] / seconds
        slowest = max(slowest, (seconds, tail, engine.spent), key=lambda found: found[0])
    seconds, tail, spent = slowest
    whole = sum(spent.values())
    return Serving(
        seconds=seconds,
        floor=floor(servers, made, assume, asked),
        tokens=total,
        causes={cause: part / whole for cause, part in sorted(spent.items(), key=lambda item: -item[1])},
        tail=tail,
        retracted=retracted,
    )


def floor(servers: Servers, made: Deployment, assume: Assumptions, asked: list[tuple[int, int]]) -> float:
    """Seconds below which the roofline lets no placement of these (prompt, answer) go: keys and values read, and
    arithmetic done, spread evenly over all servers; and the longest answer alone."""
    pace = rates(servers, made.card, assume)
    read = pace.token * sum(prompt * answer + answer * answer / 2 for prompt, answer in asked)
    work = pace.sample * sum(answer for _, answer in asked)
    longest = max((answer for _, answer in asked), default=0)
    alone = longest * (pace.fixed + pace.weights)
    return max(read / servers.count, work / servers.count, alone)
