"""Settings of the judge (GenRM)."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_fapo.settings import Settings


class CascadeSettings(Settings):
    """The judge's verdict without reasoning, by its probability: clear cases end there, at the cost of a prefill.

    `tools/calibrate_judge.py` chooses the thresholds from measured errors.
    """

    clean_below: Annotated[float, Field(ge=0, le=1)]
    """P(flawed) below which a solution counts as clean without a long verdict; 0 never."""
    flawed_above: Annotated[float, Field(ge=0, le=1)] | None = None
    """P(flawed) above which it counts as flawed; null never. The index is a guess then."""
    max_error: Annotated[float, Field(gt=0, lt=1)] | None = None
    """What the thresholds were chosen for: the most of the flawed solutions that may end as clean, and of the clean
    ones that may end as flawed, without a long verdict. `judge.audit` measures both and warns when one is surely
    more."""

    @model_validator(mode="after")
    def _leave_a_middle(self) -> Self:
        if self.flawed_above is not None and self.flawed_above < self.clean_below:
            raise ValueError(f"flawed_above = {self.flawed_above} is less than clean_below = {self.clean_below}")
        return self


class RatesSettings(Settings):
    """How often the judge flags, as measured before the run."""

    tpr: Annotated[float, Field(ge=0, le=1)]
    """Of flawed right answers: recall."""
    fpr: Annotated[float, Field(ge=0, le=1)]
    """Of clean right answers."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.tpr <= self.fpr:
            raise ValueError(f"tpr = {self.tpr} is not above fpr = {self.fpr}: such a judge's verdicts say nothing")
        return self


class ErrorSettings(Settings):
    """Errors made on purpose, for experiments on what a bad judge does to a run. Each vote errs by itself."""

    missed: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the flags that become "clean"."""
    invented: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the clean verdicts that become a flag, on a paragraph drawn at random."""


class AuditSettings(Settings):
    """The judge compared with a reference on a share of the policy's present rollouts."""

    reference: Literal["oracle", "votes", "endpoint"] = "votes"
    """Who is believed: the task's own oracle (clock), the majority of more votes of the judge itself, or a second
    judge behind an OpenAI-compatible endpoint."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the rollouts with a verdict that is audited."""
    votes: Annotated[int, Field(gt=0)] = 8
    """Votes of the reference, for `votes` and `endpoint`."""
    temperature: Annotated[float, Field(ge=0)] = 0.6
    """Of the reference's sampling."""
    endpoint: str | None = None
    """For `endpoint`: its URL, up to `/v1`."""
    model: str | None = None
    """For `endpoint`: the model's name there."""
    api_key_file: Path | None = None
    """For `endpoint`: a file with the key."""
    window: Annotated[int, Field(gt=0)] = 20
    """Steps over which the rates are taken."""
    enough: Annotated[int, Field(gt=0)] = 30
    """Flawed and clean rollouts each, from which on the measured rates replace `judge.rates`."""
    min_j: Annotated[float, Field(ge=0, le=1)] | None = None
    """Alarm when all of the 95 % interval of J = TPR - FPR is below this; null never."""
    stop: bool = False
    """Stop the run on an alarm, instead of a warning."""

    @model_validator(mode="after")
    def _endpoint_is_named(self) -> Self:
        if (self.reference == "endpoint") != (self.endpoint is not None and self.model is not None):
            raise ValueError("endpoint and model belong to reference 'endpoint', which needs both")
        if self.reference != "oracle" and self.votes > 1 and self.temperature == 0.0:
            raise ValueError("votes > 1 needs temperature > 0: greedy votes are all the same")
        return self


class RefreshSettings(Settings):
    """The judge trained again between steps, on the present policy's rollouts (after TANGO, arXiv:2505.15034).

    Every `every` steps the run stops as for a checkpoint; its recorded rollouts are labelled and become rows of task
    critique; the judge is trained on them by the loop, and the run goes on with it. docs/judge.md says what it costs.
    """

    every: Annotated[int, Field(gt=0)]
    """Steps of the policy between two refreshes."""
    config: Path
    """How the judge is trained: a configuration of task critique. Rows, model and seed come from the run."""
    labels: Literal["oracle", "model", "endpoint"] = "model"
    """Who labels: the task's own oracle (clock), a strong model served for it, or one behind an OpenAI-compatible
    endpoint."""
    model: str | None = None
    """For `model`: its folder, served as `servers.judge` says. For `endpoint`: its name there."""
    endpoint: str | None = None
    """For `endpoint`: its URL, up to `/v1`."""
    api_key_file: Path | None = None
    """For `endpoint`: a file with the key."""
    votes: Annotated[int, Field(gt=0)] = 3
    """Labels a solution; only solutions whose labels agree are learnt from."""
    temperature: Annotated[float, Field(ge=0)] = 0.6
    """Of the labels' sampling."""
    limit: Annotated[int, Field(gt=0)] = 4096
    """Different solutions that are labelled at most, drawn at random from those of the last `every` steps."""
    min_rows: Annotated[int, Field(gt=0)] = 128
    """Rows, half clean and half flawed, below which the judge stays as it is until the next refresh."""

    @model_validator(mode="after")
    def _labeller_is_named(self) -> Self:
        if (self.labels == "oracle") != (self.model is None) or (self.labels == "endpoint") != bool(self.endpoint):
            raise ValueError("labels 'model' needs model, 'endpoint' needs endpoint and model, 'oracle' neither")
        if self.labels != "oracle" and self.votes > 1 and self.temperature == 0.0:
            raise ValueError("votes > 1 needs temperature > 0: greedy labels are all the same")
        return self


class JudgeSettings(Settings):
    """Which verdicts are asked, how, and what happens when they do not come."""

    enabled: bool = True
    """Off is plain GRPO: no judge server is started, no verdict asked."""
    votes: Annotated[int, Field(gt=0)] = 1
    """Verdicts a solution."""
    vote_rule: Literal["majority", "agreement"] = "majority"
    """How votes decide: `majority` flags when at least half of them do, `agreement` when all of them do."""
    probability: Literal["votes", "token"] = "votes"
    """What P(flawed) is: the share of votes that flag, or the probability of the verdict's token after the reasoning
    (one more prefill)."""
    cascade: CascadeSettings | None = None
    """Score solutions by a prefill first, and ask for long verdicts only where that is not clear; off when null."""
    errors: ErrorSettings | None = None
    """Turn votes round at these rates; null leaves them as they are."""
    audit: AuditSettings | None = None
    """Measure the judge's error rates during training; off when null."""
    refresh: RefreshSettings | None = None
    """Train the judge again on the policy's own rollouts while the run goes on; off when null."""
    rates: RatesSettings | None = None
    """The judge's known error rates, until an audit has measured them; null takes it for perfect."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy; votes above 1 need more."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the judge's sampling."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 8192
    """A verdict cut here counts as failed."""
    concurrency: Annotated[int, Field(gt=0)] = 1024
    """Solutions in flight at the judge's servers. Groups that have a wrong rollout too get their places first."""
    queue: Annotated[int, Field(gt=0)] = 65536
    """Solutions that may wait for a place; one more counts as failed."""
    step_deadline: Annotated[float, Field(gt=0)] | None = None
    """Seconds from the end of a step's generation after which its outstanding verdicts count as failed; null waits."""
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
