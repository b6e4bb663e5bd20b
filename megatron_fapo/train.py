"""The loop, on one page.

The weights are published; prompts become groups of rollouts; right answers get a verdict; outcomes and verdicts
become rewards, rewards become advantages; the batch makes Megatron's updates.
"""

from megatron_fapo.algorithm.advantages import step_advantages
from megatron_fapo.algorithm.rewards import rewards
from megatron_fapo.batch.pack import make_batch
from megatron_fapo.cluster.cluster import Cluster
from megatron_fapo.config import Config
from megatron_fapo.errors import RankLost
from megatron_fapo.evaluate.held_out import evaluate
from megatron_fapo.observe.sinks import Sinks
from megatron_fapo.records import RunState, WeightVersion
from megatron_fapo.trace import Spans, SystemClock


async def train(config: Config, cluster: Cluster, state: RunState, sinks: Sinks) -> RunState:
    """Train from `state` to the last step, or until the run is asked to stop; returns where it ended.

    Waits for the servers (GENERATE, while the judge works beside it) and the ranks (TRAIN), which `train.max_lead` lets
    overlap; is unblocked early by `cluster.stop`, which ends generation at once and an update after it is done. A
    checkpoint is written then too.
    """
    algorithm, audit, limit = config.algorithm, cluster.sampler.judge.audit, config.rollout.max_new_tokens
    if audit is not None:
        audit.restore(state.audit)
    saved = state.step
    async with cluster.ahead(config.train) as ahead:
        while state.step < config.train.steps and not cluster.stop.is_set():
            spans = Spans(SystemClock())
            weights = await publish_and_evaluate(config, cluster, state.step, sinks, spans)
            with sinks.phase("generate", spans):
                drawn = await cluster.until_stopped(ahead.groups(state.step, state.cursor))
            if drawn is None:
                break
            groups, trained, rates, old = drawn.groups, drawn.trainable, drawn.rates, drawn.too_old
            given = [rewards(group, algorithm, max_tokens=limit, rates=rates) for group in trained]
            advantages = step_advantages(trained, given, algorithm, max_tokens=limit, rates=rates)
            with sinks.phase("update", spans):
                batch = make_batch(trained, advantages, cluster.policy.layout, config.batching, config.train.seed)
                report = await cluster.update(batch, algorithm.loss)
            found = None if audit is None else audit.found
            switches = cluster.switches()
            sinks.write(state.step, groups, trained, given, advantages, report, weights, spans, found, switches, old)
            state = state.after(prompts=len(groups), audit=audit.counts if audit else ())
            if config.checkpoint.due(state.step):
                saved = await cluster.save(state)
    if state.step == config.train.steps:
        await publish_and_evaluate(config, cluster, state.step, sinks, Spans(SystemClock()))
    if saved != state.step:
        await cluster.save(state)
    return state


async def train_to_the_end(config: Config, cluster: Cluster, state: RunState, sinks: Sinks) -> RunState:
    """`train`, taken up again from the last checkpoint whenever a rank is lost; then the policy for Hugging Face.

    Raises the loss once there were too many (`cluster.recoveries`).
    """
    while True:
        try:
            state = await train(config, cluster, state, sinks)
            await cluster.saves.finish()
            if state.step == config.train.steps and config.checkpoint.export_hf:
                await cluster.save_hf(cluster.folder.model)
            return state
        except RankLost as loss:
            state, recovered = await cluster.recover(loss)
            sinks.rewind(state.step, recovered)


async def publish_and_evaluate(
    config: Config, cluster: Cluster, step: int, sinks: Sinks, spans: Spans
) -> WeightVersion:
    """The weights after `step` steps to the servers; then, when due, the held-out evaluation of exactly these."""
    with sinks.phase("publish", spans):
        weights = await cluster.publish(step)
    if config.evaluation.due(step):
        with sinks.phase("evaluate", spans):
            held_out = cluster.task.held_out(config.evaluation.prompts)
            evaluation = await cluster.until_stopped(evaluate(cluster.evaluator, held_out, step))
        if evaluation is not None:
            sinks.write_evaluation(step, evaluation)
    return weights
