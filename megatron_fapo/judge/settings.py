"""Settings of the judge (GenRM)."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_fapo.settings import Settings


class JudgeSettings(Settings):
    """Which verdicts are asked, how, and what happens when they do not come."""

    enabled: bool = True
    """Off is plain GRPO: no judge server is started, no verdict asked."""
    votes: Annotated[int, Field(gt=0)] = 1
    """Verdicts a solution."""
    vote_rule: Literal["majority", "agreement"] = "majority"
    """How votes decide: `majority` flags when at least half of them do, `agreement` when all of them do."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy; votes above 1 need more."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the judge's sampling."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 8192
    """A verdict cut here counts as failed."""
    concurrency: Annotated[int, Field(gt=0)] = 1024
    """Solutions in flight at the judge's servers."""
    deadline: Annotated[float, Field(gt=0)] = 600.0
    """Seconds from the moment a solution has a place among the `concurrency` to its verdict, all attempts together."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Further attempts after a server error, or after an unusable verdict when sampling (with another seed)."""
    skip: bool = True
    """Leave out verdicts that cannot change an advantage; switches itself off in groups where they can."""
    probe_share: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Share of the skipped rollouts that is judged for the metrics alone."""
    max_failed_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Above this share of failed verdicts in a step the run stops."""
