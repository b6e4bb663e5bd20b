"""What flows through the system: small frozen records, nothing else crosses a process border.

Token ids and log-probabilities are numpy arrays, set read-only here because `frozen` is shallow. One id string
(`s12-p384-r3`: step, prompt, rollout) runs from the prompt to the last log line.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

Role = Literal["policy", "judge", "reference"]
"""Servers and Megatron models are named by the role they play."""

FinishReason = Literal["stop", "length", "abort"]


def ints(values: npt.ArrayLike) -> Ints:
    """A read-only int32 array."""
    array = np.array(values, np.int32)
    array.setflags(write=False)
    return array


def floats(values: npt.ArrayLike) -> Floats:
    """A read-only float32 array."""
    array = np.array(values, np.float32)
    array.setflags(write=False)
    return array


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat.  Example: `Message(role="user", content="What is 1 + 1?")`."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question as a task asks it.  Example id: `p384`, the 384th prompt of the stream."""

    id: str
    task: str
    question: str
    """The bare problem, as the judge reads it."""
    messages: tuple[Message, ...]
    """The chat that the policy sees."""
    token_ids: Ints
    """[P] `messages` under the chat template, generation prompt included."""
    reference_answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn.  Log-probs are of softmax(logits / temperature), before top-p cuts it."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """n samples of one prompt: one id and one seed each.

    Example: `GenerationRequest(ids=("s0-p3-r0", "s0-p3-r1"), token_ids=..., seeds=(11, 12), sampling=...)`.
    """

    ids: tuple[str, ...]
    token_ids: Ints
    seeds: tuple[int, ...]
    """Each in [0, 2**31)."""
    sampling: Sampling
    priority: int = 0
    """Of what waits at a server, the highest goes first."""
    drawn: int = 0
    """So many tokens at the end of `token_ids` are of the answer, whose drawing goes on after them."""

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.seeds):
            raise ValueError(f"{len(self.ids)} ids but {len(self.seeds)} seeds")


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """From token `start` on, up to the next span, the tokens were drawn with weights of this version."""

    start: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a server returns for one sample."""

    id: str
    token_ids: Ints
    """[T] end-of-sequence token included when there is one."""
    logprobs: Floats
    """[T] log-probability of each token when it was drawn."""
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        if self.token_ids.shape != self.logprobs.shape:
            raise ValueError(f"{self.id}: {self.token_ids.shape} tokens but {self.logprobs.shape} log-probs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A policy's answer to a prompt, with all that training on it needs."""

    id: str
    prompt_id: str
    token_ids: Ints
    """[T] response tokens."""
    logprobs: Floats
    """[T] behaviour log-probs at `temperature`."""
    versions: tuple[VersionSpan, ...]
    temperature: float
    seed: int
    text: str
    """The response decoded, special tokens left out."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the task's verifier says of an answer."""

    right: bool
    score: float
    """The outcome reward: +1 right, -1 wrong (FAPO Eq. 4); graded for task `critique` (Eq. 7)."""
    answer: str | None
    """The answer that was read from the text; None when there was none."""
    why: str
    """One of a few words per task: "equal", "different", "no answer", "timeout", ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the judge says of a right answer's solution."""

    first_wrong: int
    """0-based paragraph of the earliest error, -1 when clean."""
    p_flawed: float
    """Share of votes that flag, in [0, 1]."""
    votes: int
    tokens: int
    """Judge tokens spent on it, all votes and retries."""
    text: str
    """The judge's words (of the vote that decided)."""
    short: bool = False
    """Whether it is the cascade's, by the probability of the verdict without reasoning; its index is a guess."""

    @property
    def flawed(self) -> bool:
        """Whether the judge found an error."""
        return self.first_wrong != -1


@dataclass(frozen=True, slots=True, kw_only=True)
class NotJudged:
    """Why there is no verdict that counts for the reward.

    "off": no judge in this run; "wrong": the answer is wrong; "skipped": asking could not change an advantage;
    "failed": it was asked, and no usable verdict came (`why` says what happened).
    """

    reason: Literal["off", "wrong", "skipped", "failed"]
    why: str = ""
    probe: Verdict | None = None
    """A verdict asked of a skipped rollout for the metrics alone; the reward never sees it."""
    tokens: int = 0
    """Judge tokens spent in vain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A rollout with all that is known about it."""

    rollout: Rollout
    outcome: Outcome
    verdict: Verdict | NotJudged
    oracle: int | None
    """First wrong paragraph by the task's own oracle, -1 clean; None where the task has no oracle."""
    audit: int | None = None
    """First wrong paragraph by the reference that audits the judge, -1 clean; None where it was not asked."""
    wrong_from: int | None = None
    """First response token of the paragraph that the verdict names; None without a flag, or where nobody asks."""

    @property
    def flagged(self) -> bool:
        """Right by its answer, flawed by a verdict that counts."""
        return self.outcome.right and isinstance(self.verdict, Verdict) and self.verdict.flawed


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All rollouts of one prompt in one step, in the order of their ids."""

    step: int
    prompt: Prompt
    judged: tuple[Judged, ...]

    def __len__(self) -> int:
        return len(self.judged)

    def __iter__(self) -> Iterator[Judged]:
        return iter(self.judged)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Sequences packed end to end, without padding; sequence i is `[bounds[i], bounds[i + 1])`.

    Arrays over tokens are aligned with the token itself: `logprobs[t]` is the log-prob of `token_ids[t]` given
    what precedes it. Prompt tokens have `loss_mask` 0, and 0.0 in `advantages` and `logprobs`.
    """

    ids: tuple[str, ...]
    """[n] rollout ids (or example ids in supervised training)."""
    token_ids: Ints
    """[T]"""
    bounds: Ints
    """[n + 1], from 0 to T."""
    loss_mask: Floats
    """[T] 1.0 where the token counts in the loss."""
    advantages: Floats
    """[T]"""
    logprobs: Floats
    """[T] behaviour log-probs."""
    temperature: float
    versions: Ints = field(default_factory=lambda: ints([]))
    """[n] oldest weight version that a token of each rollout was drawn with; empty where there is none."""

    def __post_init__(self) -> None:
        tokens = len(self.token_ids)
        for name in ("loss_mask", "advantages", "logprobs"):
            if len(getattr(self, name)) != tokens:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {tokens} tokens")
        if len(self.bounds) != len(self.ids) + 1 or self.bounds[0] != 0 or self.bounds[-1] != tokens:
            raise ValueError(f"bounds {self.bounds.tolist()} do not cut {tokens} tokens into {len(self.ids)} sequences")


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """What one optimizer step consumes, over all data-parallel ranks."""

    microbatches: tuple[tuple[MicroBatch, ...], ...]
    """`microbatches[m][dp]`: the m-th microbatch of data-parallel rank dp; every rank has the same number."""
    num_loss_tokens: int
    """Loss tokens of the whole mini-batch: the denominator of the token mean, whatever the layout."""
    num_sequences: int
    """Sequences with loss tokens of the whole mini-batch: the denominator of the mean over sequences."""
    imbalance: float = 1.0
    """Largest over mean cost of the data-parallel ranks' sequences (`batch.balance`): they all wait for the largest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """All updates of one step, in order."""

    step: int
    minibatches: tuple[MiniBatch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """One optimizer step."""

    loss: float
    """The objective as `algorithm.loss.aggregation` averages it over the global mini-batch."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    clipped_share: float
    """Share of loss tokens whose gradient the PPO clip cut off."""
    kl_behaviour: float
    """k3 estimate of KL(behaviour ‖ current): mean of exp(d) - 1 - d, d = current - behaviour log-prob, over the loss
    tokens that went through the model."""
    entropy: float | None
    """Mean entropy in nats of the policy's distributions at the loss tokens that went through the model, at the
    sampling temperature, before the update; None where it is switched off."""
    loss_tokens: int
    tokens: int
    """Inputs that went through the model: every token of a sequence but its last."""
    padded_tokens: int
    """Token positions computed, padding included."""
    imbalance: float = 1.0
    """Largest over mean cost of the data-parallel ranks."""
    kl_reference: float = 0.0
    """Mean estimate of KL(current ‖ reference) over the same tokens; 0 without a KL penalty."""
    truncated_share: float = 0.0
    """Share of these tokens whose importance weight was cut at its cap; 0 without importance sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What the policy's update of one step did."""

    step: int
    updates: tuple[UpdateReport, ...]
    mismatch_mean: float
    """Mean |log-prob by the engine - by Megatron| over the loss tokens, same weights and temperature."""
    mismatch_max: float
    """The largest of them."""
    rescored: bool
    """Whether the behaviour log-probs were computed again by Megatron before the updates."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A number with its 95 % interval.  Example: `Interval(value=0.9, low=0.85, high=0.93)`."""

    value: float
    """NaN where there is nothing to estimate it from."""
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a held-out evaluation found; shares are of 1. Sound is an answer that is right, its process clean."""

    prompts: int
    samples: int
    right_share: float
    """avg@k: mean over prompts and samples."""
    pass_at: dict[int, float]
    """{k: share of prompts with at least one right among k samples}, unbiased (arXiv:2107.03374, Eq. 1)."""
    maj_at: dict[int, float] = field(default_factory=dict)
    """{k: share of prompts whose most frequent answer among k samples is right}, a tie broken by an even draw."""
    sound_share_judge: float | None
    """Right and clean by the judge, of all samples that have a verdict or are wrong; None without a judge."""
    verified_pass_at_judge: dict[int, float] | None
    """pass@k over sound rollouts, by the judge (CoT-Pass@K, arXiv:2506.14245)."""
    unjudged_share: float | None
    """Right rollouts whose verdict failed, of the right ones; they count as not sound above."""
    sound_share_oracle: float | None
    """The same by the task's own oracle; None where it has none."""
    verified_pass_at_oracle: dict[int, float] | None
    """The same by the task's own oracle."""
    intervals: dict[str, Interval] = field(default_factory=dict)
    """{"right_share", "pass_at/4", ...: 95 % interval}, under the names of the metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor inside a bucket, under its Hugging Face name."""

    name: str
    dtype: str
    """As torch spells it without the prefix: "float32", "bfloat16"."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the bucket."""
    digest: str
    """Of the tensor's bytes: `weights.digest`."""

    def to_json(self) -> dict[str, object]:
        """Its fields. A bucket has hundreds of tensors and everybody waits for their table: `asdict` takes ten times as
        long, copying each field in depth.
        """
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Tensors end to end in one piece of shared memory."""

    segment: str
    """Path of the shared-memory file."""
    nbytes: int
    tensors: tuple[TensorSpec, ...]

    def to_json(self) -> dict[str, object]:
        """Its fields."""
        return {"segment": self.segment, "nbytes": self.nbytes, "tensors": [spec.to_json() for spec in self.tensors]}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightVersion:
    """The weights of one step, as a server must hold them."""

    step: int
    checksum: str
    """Over the digests of all tensors, in the order of their names."""
    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeAudit:
    """The judge against a reference on the rollouts of the last steps."""

    audited: int
    """Rollouts of this step that both have spoken about."""
    tpr: Interval
    """Flagged, of those that the reference calls flawed."""
    fpr: Interval
    """Flagged, of those that it calls clean."""
    j: Interval
    """Youden's J = TPR - FPR."""
    alarm: bool
    """Whether all of J's interval is below what the settings ask for."""
    short: "ShortAudit | None"
    """The cascade's part of the errors; None without a cascade."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortAudit:
    """What the cascade's short verdicts get wrong."""

    missed: Interval
    """Ended as clean by a short verdict, of those that the reference calls flawed."""
    invented: Interval
    """Ended as flawed by one, of those that it calls clean."""
    alarm: bool
    """Whether either is surely more than the thresholds were chosen for."""


AuditCounts = tuple[tuple[int, int, int, int, int, int, float, float], ...]
"""What an audit counts in each of the last steps: `judge.audit.Counts`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """That ranks were lost and started again."""

    count: int
    """Times so far, since this process started."""
    steps: int
    """Steps made again so far."""
    seconds: float
    """From the loss to ranks that hold the checkpoint, the last time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run stands between two steps; beside the model's checkpoint it is all that resume needs."""

    step: int
    """Steps done."""
    cursor: int
    """Prompts of the training stream consumed."""
    audit: AuditCounts = ()
    """What the audit of the judge has counted; empty without one."""

    def __post_init__(self) -> None:
        # from JSON it comes as lists
        object.__setattr__(self, "audit", tuple(tuple(row) for row in self.audit))

    def after(self, prompts: int, audit: AuditCounts = ()) -> "RunState":
        """The state one step later, `prompts` further in the stream."""
        return RunState(step=self.step + 1, cursor=self.cursor + prompts, audit=audit)
