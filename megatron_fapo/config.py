"""The assembled configuration, and the checks that need more than one section. Light: no torch, no Ray."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, Tag, model_validator

from megatron_fapo.algorithm.settings import AlgorithmSettings
from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.errors import ConfigError
from megatron_fapo.judge.settings import JudgeSettings
from megatron_fapo.observe.settings import ObserveSettings
from megatron_fapo.policy.settings import PolicySettings
from megatron_fapo.publish.settings import PublishSettings
from megatron_fapo.records import Role
from megatron_fapo.rollout.settings import EvaluationSettings, RolloutSettings
from megatron_fapo.run.settings import CheckpointSettings
from megatron_fapo.serving.bays import Bays, lending_problem
from megatron_fapo.serving.settings import EndpointSettings, ServerSettings, SharedSettings
from megatron_fapo.settings import Settings, load
from megatron_fapo.tasks.settings import ClockSettings, TaskSettings


class TrainSettings(Settings):
    """The run as a whole."""

    arm: str = "fapo"
    """Name of the method in reports: runs of one arm and different seeds are averaged."""
    steps: Annotated[int, Field(gt=0)] = 200
    """Steps of the run."""
    seed: int = 1
    """Seeds prompts, rollouts, batch order and initial states; every rollout's seed follows from it and its id."""
    max_lead: Annotated[int, Field(ge=0)] = 0
    """Steps that generation may run ahead of training: no token is trained on that was drawn with weights more than
    this many steps old (docs/asynchronous.md). 0 is on-policy."""
    deterministic: bool = False
    """Results independent of arrival and batch composition (CPU): two runs give the same metrics to the last digit."""


def _kind_of_judge(given: Any) -> str:
    """Which section this is, by the key that it cannot be without."""
    keys = given if isinstance(given, Mapping) else type(given).model_fields if isinstance(given, Settings) else ()
    return "outside" if "endpoint" in keys else "shared" if "shares" in keys else "servers"


class ServersSettings(Settings):
    """Generation servers by role."""

    policy: ServerSettings
    """Servers that draw the rollouts."""
    judge: (
        Annotated[
            Annotated[ServerSettings, Tag("servers")]
            | Annotated[EndpointSettings, Tag("outside")]
            | Annotated[SharedSettings, Tag("shared")],
            Discriminator(_kind_of_judge),
        ]
        | None
    ) = None
    """Servers of the GenRM, an outside endpoint, or the policy itself as judge; needed while judge.enabled."""


class ClusterSettings(Settings):
    """Training ranks and Ray."""

    ranks: Annotated[int, Field(gt=0)] | None = None
    """Training ranks; must be the product of the sizes in policy.parallel. Null takes that product."""
    nodes: Annotated[int, Field(gt=0)] = 1
    """Nodes of the run. Rank 0 and the loop are on the first."""
    serving_nodes: Annotated[int, Field(ge=0)] = 0
    """Of these, nodes that only serve (`placement: split`). The ranks are spread over the others, equally many on each;
    with 0 the servers share the first node with them."""
    placement: Literal["split", "colocated"] = "split"
    """Whether ranks and servers have devices of their own, or share all of them in turn (`docs/colocation.md`)."""
    ray_address: str | None = None
    """Address of a running Ray cluster; null starts one on this machine for the run."""
    setup_deadline: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for all ranks to load the model."""
    phase_deadline: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds for one update, export or checkpoint of all ranks; past it the silent ranks are named and lost."""
    rank_deadline: Annotated[float, Field(gt=0)] = 60.0
    """Seconds within which each rank shows a sign of life, whatever it is doing; one that does not is frozen."""
    recoveries: Annotated[int, Field(ge=0)] = 3
    """When a rank is lost, all are started again from the last checkpoint, the servers kept: this many times in a row
    from the same checkpoint. 0 ends the run by name."""

    @property
    def training_nodes(self) -> int:
        """Nodes with ranks."""
        return self.nodes - self.serving_nodes

    @property
    def servers_elsewhere(self) -> bool:
        """Whether there are servers on other nodes than the first."""
        return self.serving_nodes > 0 or (self.placement == "colocated" and self.nodes > 1)


class Config(Settings):
    """Everything that a run is made of."""

    train: TrainSettings = TrainSettings()
    """The run as a whole."""
    task: TaskSettings = ClockSettings()
    """What is asked and when an answer is right."""
    rollout: RolloutSettings = RolloutSettings()
    """How many rollouts a step has and how they are drawn."""
    judge: JudgeSettings = JudgeSettings()
    """Which verdicts are asked, and what happens when they do not come."""
    algorithm: AlgorithmSettings = AlgorithmSettings()
    """Reward, advantage and loss."""
    batch: BatchSettings = BatchSettings()
    """How rollouts become updates and microbatches."""
    policy: PolicySettings
    """The trained model."""
    servers: ServersSettings
    """Generation servers by role."""
    publish: PublishSettings = PublishSettings()
    """How new weights reach the servers."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Held-out evaluation."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """When checkpoints are written and how many stay."""
    observe: ObserveSettings = ObserveSettings()
    """What is shown and recorded."""
    cluster: ClusterSettings = ClusterSettings()
    """Training ranks and Ray."""

    def server(self, role: Role) -> ServerSettings:
        """The servers of a role: deterministic when the run is, able to sleep when they share their devices."""
        settings = {"policy": self.servers.policy, "judge": self.servers.judge}.get(role)
        if not isinstance(settings, ServerSettings):
            raise ConfigError(f"servers.{role}: the run has no such servers of its own")
        if isinstance(self.servers.judge, SharedSettings):
            settings = settings.changed(priorities=True)
        settings = settings.changed(deterministic=self.train.deterministic or settings.deterministic)
        if self.cluster.placement == "split":
            return settings
        sglang = settings.sglang.changed(memory_saver=True) if settings.engine == "sglang" else settings.sglang
        # The policy is sent its weights after each sleep; nobody sends the judge its own.
        backup = settings.weights_cpu_backup or role == "judge"
        places = settings.places + Bays.of(dict(self.started_servers())).guests(role)
        return settings.changed(sglang=sglang, weights_cpu_backup=backup, restarts=0, max_count=places)

    @property
    def batching(self) -> BatchSettings:
        """`batch`, with nothing left out of the passes where the loss has a gradient without an advantage."""
        loss = self.algorithm.loss
        return self.batch.changed(skip_zero_advantage=False) if loss.gradient_without_advantage else self.batch

    @model_validator(mode="before")
    @classmethod
    def _importance_with_fp8(cls, values: Any) -> Any:
        """Rollouts in FP8 are drawn from other probabilities than the ones that are trained: corrected unless said."""
        if _at(values, "servers", "policy", "quantization") != "fp8":
            return values
        algorithm, loss = _at(values, "algorithm") or {}, _at(values, "algorithm", "loss") or {}
        if not isinstance(loss, dict) or "importance" in loss:
            return values
        return {**values, "algorithm": {**algorithm, "loss": {**loss, "importance": {}}}}

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        problems = (
            self._layout_problem(),
            *self._algorithm_problems(),
            *self._server_problems(),
            *self._judge_problems(),
            self._batch_problem(),
            lending_problem(dict(self.started_servers()), colocated=self.cluster.placement == "colocated"),
            *self._lead_problems(),
        )
        for problem in filter(None, problems):
            raise ValueError(problem)
        return self

    def _layout_problem(self) -> str:
        parallel, ranks = self.policy.parallel, self.cluster.ranks
        if ranks is not None and ranks != parallel.world:
            return (
                f"cluster.ranks = {ranks}, but policy.parallel asks for tensor {parallel.tensor} × "
                f"pipeline {parallel.pipeline} × context {parallel.context} × data {parallel.data} = "
                f"{parallel.world} ranks"
            )
        if self.cluster.serving_nodes >= self.cluster.nodes:
            return (
                f"cluster.serving_nodes = {self.cluster.serving_nodes} leaves the ranks none of "
                f"cluster.nodes = {self.cluster.nodes}"
            )
        if self.cluster.serving_nodes and self.cluster.placement == "colocated":
            return "cluster.serving_nodes needs cluster.placement = split: colocated servers share the ranks' nodes"
        if parallel.world % self.cluster.training_nodes:
            only = f", {self.cluster.serving_nodes} to serve," if self.cluster.serving_nodes else ""
            nodes = f"cluster.nodes = {self.cluster.nodes}{only}"
            return f"{nodes} does not divide the {parallel.world} ranks of policy.parallel"
        if self.cluster.nodes > 1 and self.cluster.ray_address is None:
            return f"cluster.nodes = {self.cluster.nodes} needs cluster.ray_address: a Ray that spans these nodes"
        if self.train.deterministic and not self.policy.deterministic:
            return "train.deterministic needs policy.deterministic"
        return ""

    def _algorithm_problems(self) -> list[str]:
        loss, advantage, reward, problems = self.algorithm.loss, self.algorithm.advantage, self.algorithm.reward, []
        if loss.kl is not None and not self.policy.reference:
            problems.append("algorithm.loss.kl needs policy.reference=true, which keeps the weights to stay near")
        if loss.entropy_bonus and not self.policy.entropy:
            problems.append("algorithm.loss.entropy_bonus needs policy.entropy=true")
        if loss.importance is not None and self.policy.rescore == "never":
            problems.append(
                "algorithm.loss.importance needs policy.rescore=always (or when_stale): without Megatron's own "
                "log-probs the ratio is to the engine's already, and there is nothing to correct"
            )
        if advantage.flaw == "first_wrong_step" and self.judge.cascade and self.judge.cascade.flawed_above is not None:
            problems.append(
                "algorithm.advantage.flaw = first_wrong_step needs judge.cascade.flawed_above = null: "
                "the cascade's short verdict does not know which step is wrong"
            )
        known = self.judge.rates is not None or self.judge.audit is not None
        if not known and (reward.correct_rates or advantage.all_right == "shrunk"):
            key = "reward.correct_rates" if reward.correct_rates else "advantage.all_right = shrunk"
            problems.append(f"algorithm.{key} needs the judge's error rates: set judge.rates, or measure (judge.audit)")
        if advantage.all_right == "agreed" and self.judge.votes == 1:
            problems.append("algorithm.advantage.all_right = agreed needs judge.votes > 1: a single vote always agrees")
        hard = self.judge.votes == 1 and self.judge.probability == "votes"
        if reward.penalty == "soft" and hard and not reward.correct_rates:
            problems.append(
                "algorithm.reward.penalty = soft needs judge.votes > 1 or judge.probability = token: "
                "with one vote p is 0 or 1, which is penalty hard"
            )
        return problems

    def _lead_problems(self) -> list[str]:
        lead, problems = f"train.max_lead = {self.train.max_lead}", []
        if not self.train.max_lead:
            return []
        if self.policy.rescore == "never" or self.algorithm.loss.importance is None:
            problems.append(
                f"{lead} trains on tokens of older weights: the loss must correct for them, by "
                "policy.rescore=when_stale (or always) and algorithm.loss.importance={} (truncated importance sampling)"
            )
        if self.train.deterministic:
            problems.append(
                f"{lead} with train.deterministic: the clock decides which token of an answer new weights reach, so "
                "two runs cannot agree to the last digit"
            )
        if self.cluster.placement == "colocated":
            problems.append(
                f"{lead} with cluster.placement = colocated: ranks and servers that share devices take turns; set "
                "placement = split"
            )
        if self.rollout.dynamic_sampling:
            problems.append(
                f"{lead} with rollout.dynamic_sampling = {self.rollout.dynamic_sampling}: how many prompts a step "
                "takes is then known only when it ends, and the next step has begun by then"
            )
        return problems

    def _batch_problem(self) -> str:
        rollout = self.rollout
        if rollout.group_size < 2:
            return "rollout.group_size = 1: a group advantage needs at least 2 rollouts a prompt"
        if rollout.temperature == 0.0:
            return "rollout.temperature = 0: greedy rollouts of a prompt are all the same; training needs more than 0"
        if rollout.prompts_per_step < self.batch.updates or rollout.prompts_per_step % self.batch.updates:
            return (
                f"rollout.prompts_per_step = {rollout.prompts_per_step} is not a multiple of "
                f"batch.updates = {self.batch.updates}: each update takes equally many prompts"
            )
        return ""

    def _server_problems(self) -> list[str]:
        rollout, policy, problems = self.rollout, self.servers.policy, []
        needed = rollout.max_prompt_tokens + rollout.max_new_tokens
        if policy.context_length < needed:
            problems.append(
                f"servers.policy.context_length = {policy.context_length} is less than "
                f"rollout.max_prompt_tokens + rollout.max_new_tokens = {needed}"
            )
        if policy.dtype != self.policy.dtype:
            problems.append(
                f"servers.policy.dtype = {policy.dtype}, but policy.dtype = {self.policy.dtype}: "
                "weights are published as they are trained"
            )
        if self.cluster.servers_elsewhere and self.publish.transport in ("shared_memory", "cuda_ipc", "delta"):
            problems.append(
                f"publish.transport = {self.publish.transport} reaches servers on the first rank's node alone, and "
                "cluster has some on others: set auto or group, or disk with a folder that all nodes see"
            )
        if self.publish.transport == "cuda_ipc" and (policy.engine != "sglang" or policy.sglang.on_cpu):
            problems.append(
                "publish.transport = cuda_ipc brings weights to SGLang on the GPUs of the ranks' machine, and "
                f"servers.policy is {'on a CPU' if policy.engine == 'sglang' else 'the embedded engine'}: "
                "set auto or shared_memory"
            )
        for role, server in self.started_servers():
            if self.cluster.placement == "colocated" and server.engine == "sglang" and server.sglang.on_cpu:
                problems.append(
                    f"cluster.placement = colocated needs servers to give memory back, and SGLang on a CPU cannot: "
                    f"leave servers.{role}.sglang.on_cpu out, or set servers.{role}.engine = embedded"
                )
        bays = Bays.of(dict(self.started_servers()))
        ports = [port for role, server in self.started_servers() for port in server.ports(bays.guests(role))]
        twice = sorted({port for port in ports if ports.count(port) > 1})
        if twice:
            problems.append(f"port {twice[0]} is given to two servers; set servers.ROLE.port apart, or 0 for free ones")
        return problems

    def _judge_problems(self) -> list[str]:
        judge, servers, key, problems = self.judge, self.servers.judge, "servers.judge", []
        if not judge.enabled:
            return []
        if servers is None:
            return ["judge.enabled needs servers.judge (its model); or set judge.enabled=false"]
        problems += self._label_problems()
        if judge.votes > 1 and judge.temperature == 0.0:
            problems.append("judge.votes > 1 needs judge.temperature > 0: greedy votes are all the same")
        if isinstance(servers, EndpointSettings):
            if judge.cascade is not None or judge.probability == "token":
                problems.append(
                    "judge.cascade and judge.probability = token need servers of the judge's own: chat completions "
                    "do not tell the probability of a verdict; leave servers.judge.endpoint out"
                )
            return problems
        if isinstance(servers, SharedSettings):
            servers, key = self.servers.policy, "servers.policy"
        needed = self.rollout.max_new_tokens + judge.max_new_tokens
        if servers.context_length <= needed:
            problems.append(
                f"{key}.context_length = {servers.context_length} must be more than rollout.max_new_tokens + "
                f"judge.max_new_tokens = {needed}: the judge reads the whole solution before its verdict"
            )
        return problems

    def _label_problems(self) -> list[str]:
        judge, problems = self.judge, []
        if judge.refresh is not None and not isinstance(self.servers.judge, ServerSettings):
            problems.append("judge.refresh needs a model in servers.judge: an endpoint's weights cannot be trained")
        if judge.refresh is not None and not self.observe.rollouts:
            problems.append("judge.refresh needs observe.rollouts=true: the judge learns from recorded rollouts")
        if isinstance(self.task, ClockSettings):
            return problems
        if judge.refresh is not None and judge.refresh.labels == "oracle":
            problems.append(f"judge.refresh.labels = oracle: task {self.task.name} has none; name a labeller")
        if judge.audit is not None and judge.audit.reference == "oracle":
            problems.append(f"judge.audit.reference = oracle: task {self.task.name} has none; take votes or endpoint")
        return problems

    def started_servers(self) -> list[tuple[Role, ServerSettings]]:
        """The servers that this run starts, by role."""
        started: list[tuple[Role, ServerSettings]] = [("policy", self.servers.policy)]
        if self.judge.enabled and isinstance(self.servers.judge, ServerSettings):
            started.append(("judge", self.servers.judge))
        return started


def _at(values: Any, *keys: str) -> Any:
    """The value at a path of keys, None where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file with `section.key=value` overrides. Raises ConfigError."""
    return load(Config, path, overrides)


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, defaults included; reading it gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
