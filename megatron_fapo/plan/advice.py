"""What holds a step up, by name, and what to change."""

from collections.abc import Iterator

from megatron_fapo.config import Config
from megatron_fapo.plan.assumptions import GIGA
from megatron_fapo.plan.estimate import Plan
from megatron_fapo.plan.memory import activations, engine_weights

CAUSES = {
    "weights": "reading the weights for few samples",
    "cache": "reading keys and values",
    "arithmetic": "arithmetic",
    "fixed": "launches and all-reduces",
    "prefill": "prefill",
}
"""What decode time goes to, in words."""

REMEDIES = {
    "activations": "policy.recompute=full, a smaller batch.tokens_per_microbatch, or a larger policy.parallel.tensor "
    "with sequence=true",
    "logits": "a smaller policy.logits_megabytes",
    "optimizer": "more policy.parallel.data, or policy.optimizer.cpu_offload",
    "gradients": "a larger policy.parallel.tensor or pipeline",
    "parameters": "a larger policy.parallel.tensor or pipeline",
    "policy server": "a larger servers.policy.sglang.tensor_parallel",
    "judge": "a larger servers.judge.sglang.tensor_parallel",
    "KV cache": "a smaller sglang.memory_fraction",
    "buckets": "a smaller publish.bucket_megabytes",
}
"""{owner of memory: what makes it smaller}."""

NOTHING = 1.0
"""Seconds that are not worth a word."""

LONG_TAIL = 0.5
"""Share of generation with a tenth of the samples left, from which on it is worth a word."""


def bottleneck(plan: Plan) -> str:
    """The phase that takes longest, and what most of its time goes to."""
    parts = {
        "generate": plan.generate.seconds,
        "judge": plan.judge.seconds if plan.judge else 0.0,
        "update": plan.update.seconds,
        "publish": plan.publish,
        "switch": plan.switch,
    }
    name = max(parts, key=lambda part: parts[part])
    serving = {"generate": plan.generate, "judge": plan.judge}.get(name)
    if serving is not None and serving.causes:
        tail = f", {serving.tail:.0%} of it with a tenth of the samples left" if serving.tail > LONG_TAIL / 2 else ""
        return f"{name}: {CAUSES[next(iter(serving.causes))]}{tail}"
    if name == "update":
        costs = {
            "matrix products": plan.update.compute,
            "the pipeline's bubble": plan.update.bubble,
            "reducing gradients": plan.update.gradients,
            "the optimizer": plan.update.optimizer,
            "rescoring": plan.update.rescore,
        }
        return f"update: {max(costs, key=lambda cost: costs[cost])}"
    return name


def advice(plan: Plan, config: Config) -> Iterator[str]:
    """Sentences on what to change, the most pressing first."""
    yield from _on_memory(plan)
    yield from _on_serving(plan, config)
    yield from _on_the_update(plan, config)


def _on_memory(plan: Plan) -> Iterator[str]:
    made = plan.deployment
    for phase, excess in plan.overfull.items():
        owners = {owner: size for owner, size in plan.memory[phase].items() if owner in REMEDIES}
        largest = max(owners, key=lambda owner: owners[owner])
        yield (
            f"{phase} lacks {excess / GIGA:.1f} GB, and most of it is {largest} ({owners[largest] / GIGA:.1f} GB): "
            f"take {REMEDIES[largest]}"
        )
    for role, servers in (("policy", made.policy), ("judge", made.judge)):
        if servers is not None and plan.cache[role] < servers.context_length:
            yield (
                f"servers.{role}: {plan.cache[role]} tokens of KV cache do not hold one context of "
                f"{servers.context_length}: take a larger sglang.tensor_parallel or memory_fraction"
            )
    if engine_weights(made.policy) > made.policy.memory_fraction * made.card.memory / 2:
        yield "weights fill half of a policy server's memory: a larger sglang.tensor_parallel leaves its cache more"


def _on_serving(plan: Plan, config: Config) -> Iterator[str]:
    made = plan.deployment
    each = config.rollout.prompts_per_step * config.rollout.group_size / made.policy.count
    mean = plan.generate.tokens / each / made.policy.count
    if each > made.policy.max_running and made.policy.max_running * mean < plan.cache["policy"]:
        yield (
            f"servers.policy.max_running = {made.policy.max_running}, but {each:.0f} rollouts come to a server, and "
            "its cache holds more"
        )
    if plan.judge is not None and plan.judge.seconds > plan.generate.seconds + NOTHING:
        yield (
            f"the judge needs {plan.judge.seconds:.0f} s beside {plan.generate.seconds:.0f} s of generation: give it "
            "more GPUs (servers.judge.count), judge.cascade, or take a judge with shorter verdicts"
        )
    if plan.generate.tail > LONG_TAIL and plan.generate.seconds > plan.update.seconds + NOTHING:
        yield (
            f"{plan.generate.tail:.0%} of generation waits for the last tenth of the rollouts: a larger "
            "servers.policy.sglang.tensor_parallel writes them faster, more servers do not"
        )


def _on_the_update(plan: Plan, config: Config) -> Iterator[str]:
    made = plan.deployment
    if plan.update.bubble > 0.15 * plan.update.compute:
        yield "the pipeline's bubble is long: fewer batch.updates, fewer tokens_per_microbatch, virtual_pipeline"
    if config.policy.recompute == "full" and plan.fits:
        settings = config.policy.changed(parallel=made.parallel.model_dump(), recompute="none", recompute_layers=None)
        whole = activations(made.shape, settings, config.batch.tokens_per_microbatch, 0)
        more = whole - plan.memory["update"]["activations"]
        room = made.card.memory - sum(plan.memory["update"].values())
        if more < 0.9 * room:
            yield (
                f"policy.recompute=none needs {more / GIGA:.0f} GB more where {room / GIGA:.0f} are free, and saves "
                f"{plan.update.compute / 4:.0f} s a step"
            )
