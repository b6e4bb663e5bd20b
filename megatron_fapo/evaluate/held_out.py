"""Held-out evaluation: how often the policy is right, and how often it is right for the right reasons."""

from collections.abc import Sequence

from megatron_fapo.evaluate.kept import Kept, judged_at_all, samples_of
from megatron_fapo.evaluate.scores import summarise
from megatron_fapo.records import Evaluation, Prompt
from megatron_fapo.rollout.sampler import Sampler


async def evaluate(sampler: Sampler, prompts: Sequence[Prompt], step: int = 0) -> Evaluation:
    """Sample a group for each held-out prompt, check all rollouts, judge the right ones.

    `sampler` has the evaluation's temperature and group size, and its judge (if any) skips nothing: here every
    verdict counts.
    """
    groups = await sampler.sample(step, prompts)
    return summarise([samples_of(group) for group in groups], judge=judged_at_all(groups))


async def evaluate_kept(sampler: Sampler, prompts: Sequence[Prompt], kept: Kept) -> Evaluation:
    """The same, each prompt's samples written down as they are complete; those that lie there are not drawn again.

    A rollout's seed follows from its id, so an evaluation that was cut off and taken up gives the same samples.
    """
    await sampler.sample(0, [prompt for prompt in prompts if prompt.id not in kept], done=kept.write)
    return summarise([kept.samples(prompt.id) for prompt in prompts], judge=kept.judge)
