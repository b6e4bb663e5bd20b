"""What the tests of the policy share: a tiny model, ragged batches, and the scripted life of a layout."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fapo.algorithm.settings import LossSettings
from megatron_fapo.batch.layout import Layout
from megatron_fapo.batch.pack import make_batch
from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import OptimizerSettings, ParallelSettings, PolicySettings
from megatron_fapo.records import (
    Floats,
    Group,
    Judged,
    MicroBatch,
    NotJudged,
    Outcome,
    Prompt,
    Rollout,
    StepBatch,
    StepReport,
    VersionSpan,
    floats,
    ints,
)
from megatron_fapo.weights import Segment, shared_memory_folder

os.environ["OMP_NUM_THREADS"] = "1"

VOCABULARY = 71  # odd: two tensor-parallel ranks must pad it
LOSS = LossSettings()


def save_tiny(kind: str, folder: Path, **changes: Any) -> Path:
    """A small random model of a family, in Hugging Face format; no weight is 0 or 1, so that a mix-up shows."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            **changes,
        }
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def policy_settings(model: Path, distributed: bool = True, **parallel: int) -> PolicySettings:
    # a large epsilon: with Adam's usual one, gradients near zero turn rounding into steps of full size
    optimizer = OptimizerSettings(
        learning_rate=1e-2, warmup_steps=2, epsilon=1e-3, clip_grad=0.5, distributed=distributed
    )
    return PolicySettings(model=model, optimizer=optimizer, parallel=ParallelSettings(**parallel), timeout=60)


def make_groups(step: int, versions: int | None = None, temperature: float = 0.8) -> list[Group]:
    """Six ragged groups of four rollouts, each with tokens of its own; two groups agree, so their advantage is 0."""
    rng = np.random.default_rng([7, step])
    groups = []
    for number in range(6):
        prompt = ints(rng.integers(1, VOCABULARY, rng.integers(2, 12)))
        judged = []
        for r in range(4):
            tokens = ints(rng.integers(1, VOCABULARY, rng.integers(1, 30)))
            version = step if versions is None else versions
            rollout = Rollout(
                id=f"s{step}-p{number}-r{r}",
                prompt_id=f"p{number}",
                token_ids=tokens,
                logprobs=floats(-4.2 + 0.4 * rng.normal(size=len(tokens))),
                versions=(VersionSpan(start=0, version=version),),
                temperature=temperature,
                seed=0,
                text="",
                finish_reason="stop",
            )
            outcome = Outcome(right=True, score=1.0, answer=None, why="equal")
            judged.append(Judged(rollout=rollout, outcome=outcome, verdict=NotJudged(reason="off"), oracle=None))
        whole = Prompt(id=f"p{number}", task="t", question="", messages=(), token_ids=prompt, reference_answer="")
        groups.append(Group(step=step, prompt=whole, judged=tuple(judged)))
    return groups


def make_advantages(groups: list[Group]) -> list[list[Floats]]:
    rng = np.random.default_rng([8, groups[0].step])
    return [
        [floats(np.full(len(j.rollout.token_ids), (n not in (1, 4)) * rng.normal())) for j in group]
        for n, group in enumerate(groups)
    ]


def step_batch(step: int, layout: Layout, updates: int = 1, **changes: Any) -> StepBatch:
    """A step with several microbatches a rank."""
    groups = make_groups(step)
    settings = BatchSettings(updates=updates, tokens_per_microbatch=120, **changes)
    return make_batch(groups, make_advantages(groups), layout, settings, seed=1)


@dataclass(frozen=True)
class Exported:
    tensors: dict[str, np.ndarray[Any, Any]]
    digests: dict[str, str]
    nbytes: list[int]
    """Of each bucket."""


def export(ranks: LocalRanks, nbytes: int = 20000) -> Exported:
    """All weights through shared memory, as a server would read them."""
    path = shared_memory_folder() / f"fapo-test-{os.getpid()}"
    segment = Segment.create(path, nbytes)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    digests: dict[str, str] = {}
    nbytes_of: list[int] = []
    try:
        ranks.call("open_export")
        while (answers := ranks.call("next_bucket", str(path), nbytes))[0] is not None:
            assert all(answer is None for answer in answers[1:])
            nbytes_of.append(answers[0].nbytes)
            for spec in answers[0].tensors:
                assert spec.name not in tensors
                count = int(np.prod(spec.shape))
                view = np.frombuffer(segment.memory, spec.dtype, count=count, offset=spec.offset)
                tensors[spec.name] = view.reshape(spec.shape).copy()
                digests[spec.name] = spec.digest
        return Exported(tensors=tensors, digests=digests, nbytes=nbytes_of)
    finally:
        segment.remove()


def scores(ranks: LocalRanks, batch: StepBatch) -> dict[str, Floats]:
    """Log-probs of each rollout's tokens by its id."""
    grid = batch.minibatches[0].microbatches
    answers = ranks.call("score", grid)
    layout = ranks.layout
    found = {}
    for dp in range(layout.dp):
        column = answers[dp * layout.tp * layout.cp]  # ranks are numbered tensor, context, data, pipeline
        for row, values in zip(grid, column, strict=True):
            found.update(split(row[dp], values))
    return found


def split(micro: MicroBatch, values: Floats) -> dict[str, Floats]:
    bounds = zip(micro.ids, micro.bounds, micro.bounds[1:], strict=False)
    return {name: values[start:end] for name, start, end in bounds if name}


@dataclass(frozen=True)
class Life:
    """What a layout did: weights and scores before, three updates, weights after."""

    before: Exported
    scores: dict[str, Floats]
    reports: tuple[StepReport, ...]
    all_ranks_agree: bool
    after: Exported
    saved: Path
    resumed: tuple[StepReport, ...]
    """Two further updates, after `saved` was written."""


def live(settings: PolicySettings, folder: Path) -> Life:
    with LocalRanks(settings, seed=5) as ranks:
        before = export(ranks)
        found = scores(ranks, step_batch(0, ranks.layout, skip_zero_advantage=False))
        answers = [ranks.call("update", step_batch(step, ranks.layout), LOSS) for step in range(3)]
        after = export(ranks)
        ranks.call("save", str(folder))
        resumed = [ranks.call("update", step_batch(step, ranks.layout), LOSS)[0] for step in (3, 4)]
        return Life(
            before=before,
            scores=found,
            reports=tuple(answer[0] for answer in answers),
            all_ranks_agree=all(a.updates == answer[0].updates for answer in answers for a in answer),
            after=after,
            saved=folder,
            resumed=tuple(resumed),
        )


LAYOUTS = {"one": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "dp2": {"data": 2}}
