"""What generates and checks, without training: servers by role, the task, and samplers over them.

`fapo eval` stands on this alone; a run adds the training ranks.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_fapo.cluster.hosts import Hosts
from megatron_fapo.cluster.seats import Seat, seats, wishes_of
from megatron_fapo.config import Config
from megatron_fapo.judge.answerer import Answerer, OpenAI, Served
from megatron_fapo.judge.ask import Asker
from megatron_fapo.judge.audit import Audit
from megatron_fapo.judge.judge import Judge, Rules
from megatron_fapo.judge.settings import AuditSettings, JudgeSettings
from megatron_fapo.records import Role
from megatron_fapo.rollout.sampler import Sampler
from megatron_fapo.rollout.settings import RolloutSettings
from megatron_fapo.serving.group import ServerGroup
from megatron_fapo.serving.hooks import Hooks
from megatron_fapo.serving.launcher import Start, launch, launch_one, start_here
from megatron_fapo.serving.process import Server
from megatron_fapo.serving.settings import EndpointSettings, ServerSettings, SharedSettings
from megatron_fapo.tasks.benchmarks import BenchmarkTask
from megatron_fapo.tasks.interface import Task
from megatron_fapo.tasks.registry import open_task as task_from
from megatron_fapo.tasks.tokenizer import ChatTokenizer
from megatron_fapo.trace import Stint, SystemClock

_AFTER_ROLLOUTS = -1
"""Priority of verdicts on servers that also draw rollouts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """Who is told how a step's generation goes; nobody by default."""

    landed: Callable[[int], None] = lambda rollouts: None
    """So many more rollouts are finished."""
    judged: Callable[[float, float], None] = lambda start, end: None
    """A solution was at the judge from start to end, in seconds of the system clock."""
    retried: Callable[[int], None] = lambda samples: None
    """So many samples are asked of a server again."""
    moved: Callable[[int], None] = lambda samples: None
    """So many samples go on at another server, the devices of theirs being lent."""
    restarted: Callable[[], None] = lambda: None
    """A server died and was started again."""
    worked: Callable[[Stint], None] = lambda stint: None
    """Servers of a role have worked on devices that two roles share, until just now."""


@asynccontextmanager
async def open_servers(
    config: Config,
    logs: Path,
    watcher: Watcher | None = None,
    *,
    hosts: Hosts | None = None,
    gpus_taken: int = 0,
) -> AsyncIterator[dict[Role, ServerGroup]]:
    """Start the servers of all roles that the run needs, side by side; stop them at the end.

    On the nodes of `hosts`, or on this machine with the GPUs that follow the `gpus_taken` first ones.
    """
    roles = [role for role, _ in config.started_servers()]
    watcher = watcher or Watcher()
    hooks = {role: Hooks(retried=watcher.retried, moved=watcher.moved, restarted=watcher.restarted) for role in roles}
    starts = hosts.starts(config) if hosts is not None else _starts_here(config)
    settings = {}
    for role in roles:
        settings[role] = config.server(role).on_gpus_from(gpus_taken)
        gpus_taken += settings[role].places * settings[role].gpus
        if hosts is not None:
            settings[role] = hosts.with_key(settings[role])
    async with AsyncExitStack() as stack:
        groups = await asyncio.gather(
            *(
                stack.enter_async_context(launch(settings[role], role, logs, hooks[role], starts[role]))
                for role in roles
            )
        )
        yield dict(zip(roles, groups, strict=True))


def _starts_here(config: Config) -> dict[Role, Start]:
    """On this machine: servers follow each other over the GPUs, but for those that share theirs."""
    wishes, bays = wishes_of(config)
    if not bays:
        return dict.fromkeys(wishes, start_here)
    total = sum(wish.count * wish.gpus for wish in wishes.values())
    return {role: _on(places) for role, places in seats(wishes, nodes=1, gpus=[total], bays=bays).items()}


def _on(places: Sequence[Seat]) -> Start:

    async def start(settings: ServerSettings, path: Path, place: int) -> Server:
        gpu = places[place].gpu
        if gpu is not None:
            settings = settings.changed(sglang=settings.sglang.changed(first_gpu=gpu))
        return await launch_one(settings, path, settings.port + place if settings.port else 0)

    return start


@asynccontextmanager
async def open_task(config: Config, benchmark: tuple[str, str | None] | None = None) -> AsyncIterator[Task]:
    """The run's task, or a benchmark (name, source), with the policy's tokenizer; its checker is closed at the end."""
    tokenizer = ChatTokenizer.load(Path(config.servers.policy.model))
    task: Task
    if benchmark is None:
        task = task_from(config.task, tokenizer, config.train.seed)
    else:
        task = BenchmarkTask(*benchmark, tokenizer, config.train.seed)
    try:
        yield task
    finally:
        await task.close()


def make_sampler(config: Config, task: Task, servers: Mapping[Role, ServerGroup], watcher: Watcher) -> Sampler:
    """The sampler of training."""
    return _sampler(config, config.rollout, config.judge, task, servers, watcher)


def make_evaluator(
    config: Config, task: Task, servers: Mapping[Role, ServerGroup], watcher: Watcher | None = None
) -> Sampler:
    """The sampler of held-out evaluation: its temperature and group size, and a judge that skips nothing."""
    evaluation = config.evaluation
    rollout = config.rollout.changed(
        group_size=evaluation.samples, temperature=evaluation.temperature, top_p=evaluation.top_p
    )
    judge = config.judge.changed(skip=False, probe_share=0.0, audit=None)
    return _sampler(config, rollout, judge, task, servers, watcher or Watcher())


def _sampler(
    config: Config,
    rollout: RolloutSettings,
    judge: JudgeSettings,
    task: Task,
    servers: Mapping[Role, ServerGroup],
    watcher: Watcher,
) -> Sampler:
    asker = None
    answerer = _answerer(config, servers)
    if answerer is not None:
        asker = Asker(answerer, judge, SystemClock(), config.train.seed, watcher.judged)
    audit = None
    if answerer is not None and judge.audit is not None:
        reference = _reference(judge.audit, answerer, judge, config.train.seed)
        soft = config.algorithm.reward.penalty == "soft"
        audit = Audit(judge.audit, reference, soft=soft, cascade=judge.cascade)
    rules = Rules(
        judge=judge, algorithm=config.algorithm, group_size=rollout.group_size, max_tokens=rollout.max_new_tokens
    )
    return Sampler(
        task=task,
        servers=servers["policy"],
        judge=Judge(asker, rules, audit=audit),
        tokenizer=ChatTokenizer.load(Path(config.server("policy").model)),
        settings=rollout,
        algorithm=config.algorithm,
        seed=config.train.seed,
        progress=watcher.landed,
    )


def _answerer(config: Config, servers: Mapping[Role, ServerGroup]) -> Answerer | None:
    """The judge: on servers of the run, behind an outside endpoint, or none."""
    settings = config.servers.judge
    if not config.judge.enabled:
        return None
    if isinstance(settings, EndpointSettings):
        key = settings.api_key()
        return OpenAI(settings.endpoint, settings.model, key, timeout=settings.timeout, retries=settings.retries)
    if isinstance(settings, SharedSettings):
        return Served(
            servers["policy"], ChatTokenizer.load(Path(config.servers.policy.model)), priority=_AFTER_ROLLOUTS
        )
    return Served(servers["judge"], ChatTokenizer.load(Path(config.server("judge").model)))


def _reference(audit: AuditSettings, judged: Answerer, judge: JudgeSettings, seed: int) -> Asker | None:
    """Who audits the judge; None where the task's oracle does."""
    if audit.reference == "oracle":
        return None
    settings = judge.changed(
        votes=audit.votes,
        temperature=audit.temperature,
        cascade=None,
        probability="votes",
        vote_rule="majority",
        errors=None,
    )
    if audit.endpoint is None or audit.model is None:
        return Asker(judged, settings, SystemClock(), seed + 1)
    key = None if audit.api_key_file is None else audit.api_key_file.read_text().strip()
    return Asker(OpenAI(audit.endpoint, audit.model, key), settings, SystemClock(), seed + 1)
