"""Who sits on which GPUs: ranks, policy servers and judge servers of a configuration, or of the same on more GPUs."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_fapo.config import Config
from megatron_fapo.errors import ConfigError
from megatron_fapo.plan.assumptions import Card
from megatron_fapo.plan.shape import Shape
from megatron_fapo.policy.layouts import check_layout
from megatron_fapo.policy.settings import ParallelSettings
from megatron_fapo.records import Role
from megatron_fapo.serving.bays import Bays
from megatron_fapo.serving.settings import ServerSettings
from megatron_fapo.surroundings import read_shape

Placement = Literal["colocated", "split"]
"""Whether ranks and servers take turns on the same GPUs, or have their own."""

JudgePlace = Literal["slice", "shared", "after"]
"""While rollouts are generated, the judge has GPUs of its own (`slice`); every policy server shares its GPUs with a
judge server (`shared`); or the judge takes all GPUs when the last rollout has ended (`after`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """The servers of a role."""

    shape: Shape
    count: int
    tensor: int
    """GPUs of one server."""
    memory_fraction: float
    max_running: int
    context_length: int
    lend: int = 0
    """Of these servers, how many lend their GPUs to the other role."""
    backup: bool = False
    """Whether weights come back from the host, instead of being published again."""

    @property
    def gpus(self) -> int:
        """Of all of them."""
        return self.count * self.tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A configuration on GPUs."""

    card: Card
    shape: Shape
    """The policy's model."""
    parallel: ParallelSettings
    policy: Servers
    judge: Servers | None
    placement: Placement
    judge_place: JudgePlace

    @property
    def serving(self) -> int:
        """GPUs that generate: under `slice` the policy's and the judge's apart, otherwise the same ones."""
        if self.judge is None:
            return self.policy.gpus
        if self.judge_place == "slice":
            return self.policy.gpus + self.judge.gpus
        return max(self.policy.gpus, self.judge.gpus)

    @property
    def bays(self) -> Bays | None:
        """The GPUs that policy and judge lend each other; None where they lend none."""
        if self.judge is None or self.judge_place != "slice" or self.placement != "colocated":
            return None
        wide = max(self.policy.tensor, self.judge.tensor)
        roles: dict[Role, Servers] = {"policy": self.policy, "judge": self.judge}
        size = {role: wide // servers.tensor for role, servers in roles.items()}
        return Bays(size=size, lent={role: servers.lend // size[role] for role, servers in roles.items()}) or None

    @property
    def gpus(self) -> int:
        """All of them."""
        ranks = self.parallel.world
        return max(ranks, self.serving) if self.placement == "colocated" else ranks + self.serving

    def without_judge(self) -> "Deployment":
        """Plain RLVR on the same GPUs: those of the judge serve the policy."""
        return replace(self, judge=None, policy=replace(self.policy, count=max(self.serving // self.policy.tensor, 1)))


def deployment(
    config: Config,
    card: Card,
    *,
    gpus: int | None = None,
    placement: Placement | None = None,
    judge_place: JudgePlace = "slice",
    judge_gpus: int | None = None,
) -> Deployment:
    """The GPUs of a configuration. `gpus` scales data parallelism and the number of servers.

    Models are known by their config.json, or by the one that is shipped under their name (`surroundings.read_shape`).
    Raises ConfigError for what cannot be.
    """
    config_json = read_shape(config.policy.model)
    shape, parallel = Shape.of(config_json), config.policy.parallel
    policy = _servers(config.server("policy"), shape)
    judge, servers = None, config.servers.judge
    if config.judge.enabled and isinstance(servers, ServerSettings):
        judge = _servers(config.server("judge"), Shape.of(read_shape(servers.model)))
    made = Deployment(
        card=card,
        shape=shape,
        parallel=parallel,
        policy=policy,
        judge=judge,
        placement=placement or config.cluster.placement,
        judge_place=judge_place,
    )
    lent = made.policy.lend / policy.count, judge.lend / judge.count if judge else 0.0
    made = _on(made, gpus or made.gpus, judge_gpus)
    made = replace(
        made,
        policy=replace(made.policy, lend=round(lent[0] * made.policy.count)),
        judge=replace(made.judge, lend=round(lent[1] * made.judge.count)) if made.judge else None,
    )
    check_layout(config_json, made.parallel)
    _check(made)
    return made


def _servers(settings: ServerSettings, shape: Shape) -> Servers:
    return Servers(
        shape=shape,
        count=settings.count,
        tensor=settings.sglang.tensor_parallel,
        memory_fraction=settings.sglang.memory_fraction,
        max_running=settings.max_running,
        context_length=settings.context_length,
        lend=settings.lend,
        backup=settings.weights_cpu_backup,
    )


def _on(made: Deployment, gpus: int, judge_gpus: int | None) -> Deployment:
    """The same on `gpus` GPUs, of which `judge_gpus` judge; the shares of roles stay as they were where nobody asks."""
    copy = made.parallel.world // made.parallel.data
    serving = gpus
    if made.placement == "split":
        ranks = (
            made.parallel.world if gpus == made.gpus else copy * max(gpus * made.parallel.world // made.gpus // copy, 1)
        )
        serving = gpus - ranks
    else:
        ranks = gpus - gpus % copy
    if ranks < copy or serving < made.policy.tensor:
        raise ConfigError(
            f"{gpus} GPUs are too few: one copy of the model in training takes {copy}, a policy server "
            f"{made.policy.tensor}"
        )
    parallel = made.parallel.changed(data=ranks // copy)
    if made.judge is None:
        policy = replace(made.policy, count=serving // made.policy.tensor)
        return replace(made, parallel=parallel, policy=policy)
    judge = made.judge
    if made.judge_place != "slice":
        judge = replace(judge, count=serving // judge.tensor)
        policy = replace(made.policy, count=serving // made.policy.tensor)
        return replace(made, parallel=parallel, policy=policy, judge=judge)
    if judge_gpus is None:
        asked = judge.gpus / (judge.gpus + made.policy.gpus)
        judge_gpus = max(round(asked * serving / judge.tensor), 1) * judge.tensor
    count = (serving - judge_gpus) // made.policy.tensor
    judge = replace(judge, count=(serving - count * made.policy.tensor) // judge.tensor)
    return replace(made, parallel=parallel, policy=replace(made.policy, count=count), judge=judge)


def _check(made: Deployment) -> None:
    for role, servers in (("policy", made.policy), ("judge", made.judge)):
        if servers is None:
            continue
        if servers.count < 1:
            raise ConfigError(
                f"no GPU is left for a {role} server of {servers.tensor}: give it more, or the other less"
            )
        if servers.shape.heads % servers.tensor:
            raise ConfigError(
                f"servers.{role}.sglang.tensor_parallel = {servers.tensor} does not divide the model's "
                f"{servers.shape.heads} attention heads"
            )


def summary(made: Deployment) -> dict[str, Any]:
    """In words and numbers, for a report."""
    return {
        "gpus": made.gpus,
        "card": made.card.name,
        "placement": made.placement,
        "ranks": made.parallel.world,
        "policy_servers": f"{made.policy.count} x {made.policy.tensor}",
        "judge_servers": f"{made.judge.count} x {made.judge.tensor} ({made.judge_place})" if made.judge else "none",
    }
