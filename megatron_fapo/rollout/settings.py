"""Settings of the sampler."""

from typing import Annotated

from pydantic import Field

from megatron_fapo.settings import Settings


class RolloutSettings(Settings):
    """How many rollouts a step has and how they are drawn."""

    prompts_per_step: Annotated[int, Field(gt=0)] = 512
    """Prompts a step."""
    group_size: Annotated[int, Field(ge=1)] = 8
    """Rollouts a prompt; training needs at least 2."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; the policy scores tokens at the same one, so training needs more than 0."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the policy's sampling."""
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0
    """Rounds of further prompts that replace groups whose rewards are all equal (DAPO); 0 trains on what came."""
    max_prompt_tokens: Annotated[int, Field(gt=0)] = 2048
    """Longer prompts are refused by name."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 8192
    """Response limit."""


class EvaluationSettings(Settings):
    """Held-out evaluation, during training and by `fapo eval`."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations during training; 0 evaluates never."""
    prompts: Annotated[int, Field(gt=0)] = 256
    """Held-out prompts, or all when there are fewer."""
    samples: Annotated[int, Field(gt=0)] = 8
    """Samples a prompt: the k of avg@k and the largest k of pass@k."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus."""

    def due(self, step: int) -> bool:
        """Whether an evaluation is due before step `step` (never before the first step of a run that has none)."""
        return self.every > 0 and step % self.every == 0
