"""Settings of the sampler."""

from typing import Annotated

from pydantic import Field

from megatron_fapo.settings import Settings


class RolloutSettings(Settings):
    """How many rollouts a step has and how they are drawn."""

    prompts_per_step: Annotated[int, Field(gt=0)] = 512
    """Prompts a step."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Rollouts a prompt."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; the policy scores tokens at the same one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the policy's sampling."""
    max_prompt_tokens: Annotated[int, Field(gt=0)] = 2048
    """Longer prompts are refused by name."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 8192
    """Response limit."""
