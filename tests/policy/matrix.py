"""The life of a model in a layout, and how far it is from the life of one rank."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fapo.policy.local import LocalRanks, spawn
from megatron_fapo.policy.settings import PolicySettings
from megatron_fapo.records import Floats, MicroBatch, StepBatch, StepReport, ints
from tests.policy.lives import LOSS, VOCABULARY, export, policy_settings, save_tiny, scores, step_batch

Tensors = dict[str, np.ndarray[Any, Any]]
UPDATES = 3

DENSE: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "tp2 sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2 vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "dp2": {"data": 2},
    "dp2 plain optimizer": {"data": 2, "distributed": False},
    "pp4": {"pipeline": 4},
    "cp4": {"context": 4},
    "dp4": {"data": 4},
    "dp4 plain optimizer": {"data": 4, "distributed": False},
    "tp2 pp2": {"tensor": 2, "pipeline": 2},
    "tp2 sp pp2 vpp2": {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2},
    "tp2 cp2": {"tensor": 2, "context": 2},
    "tp2 sp cp2": {"tensor": 2, "sequence": True, "context": 2},
    "pp2 cp2": {"pipeline": 2, "context": 2},
    "pp2 vpp2 cp2": {"pipeline": 2, "virtual_pipeline": 2, "context": 2},
    "tp2 dp2": {"tensor": 2, "data": 2},
    "tp2 sp dp2": {"tensor": 2, "sequence": True, "data": 2},
    "pp2 dp2": {"pipeline": 2, "data": 2},
    "pp2 vpp2 dp2": {"pipeline": 2, "virtual_pipeline": 2, "data": 2},
    "cp2 dp2": {"context": 2, "data": 2},
    "cp2 dp2 plain optimizer": {"context": 2, "data": 2, "distributed": False},
}
"""Layouts of a dense model, on 2 and on 4 ranks."""


class Pool(LocalRanks):
    """Processes that take on one layout after the other, as many of them as it has ranks."""

    def __init__(self, size: int) -> None:
        self._every = self._pipes, self._processes = spawn(size, kind="tests.policy.probe:ProbedRank")
        self._running = ""

    @contextmanager
    def set_up(self, settings: PolicySettings, mutation: str | None = None) -> Iterator["Pool"]:
        """The first ranks, in a layout; with a bug of `tests.policy.mutations` planted where one is named."""
        if not len(self):
            self._every = self._pipes, self._processes = spawn(
                len(self._every[0]), kind="tests.policy.probe:ProbedRank"
            )
        self._pipes, self._processes = (every[: settings.parallel.world] for every in self._every)
        if mutation is not None:
            self.call("mutate", mutation)
        self._meet(settings, seed=5)
        yield self
        self.call("shutdown")

    def end(self) -> None:
        """End all processes, those that have no rank now too."""
        if len(self):
            self._pipes, self._processes = self._every
        super().end()


@dataclass(frozen=True)
class Lived:
    """What happened in a layout."""

    scores: dict[str, Floats]
    reports: tuple[StepReport, ...]
    all_ranks_agree: bool
    gradients: tuple[Tensors, ...]
    """Of each update, under Hugging Face names."""
    before: Tensors
    after: Tensors


def live(pool: Pool, settings: PolicySettings, mutation: str | None = None) -> Lived:
    """Three updates on ragged samples, several microbatches on each rank."""
    with pool.set_up(settings, mutation) as ranks:
        before = export(ranks).tensors
        found = scores(ranks, step_batch(0, ranks.layout, skip_zero_advantage=False))
        answers = [ranks.call("update", step_batch(step, ranks.layout), LOSS) for step in range(UPDATES)]
        after = export(ranks).tensors
        gradients = []
        for update in range(UPDATES):
            ranks.call("show_gradients", update)
            gradients.append(export(ranks).tensors)
            ranks.call("show_weights")
    return Lived(
        scores=found,
        reports=tuple(answer[0] for answer in answers),
        all_ranks_agree=all(a.updates == answer[0].updates for answer in answers for a in answer),
        gradients=tuple(gradients),
        before=before,
        after=after,
    )


@dataclass(frozen=True)
class Reference:
    """A model and its life on one rank, to which all others are compared."""

    model: Path
    life: Lived


def reference(pool: Pool, model: Path) -> Reference:
    """Live on one rank; the updates must move the weights."""
    life = live(pool, policy_settings(model))
    moved = max(float(np.abs(tensor - life.before[key]).max()) for key, tensor in life.after.items())
    assert moved > 1e-2
    return Reference(model=model, life=life)


TOLERANCES = {"log-probs": 1e-5, "loss": 1e-5, "gradient norm": 1e-5, "gradients": 1e-5, "weights": 1e-5}
"""In float32: log-probs and weights (of size 1) absolute, the others relative."""


def compare(ours: Lived, expected: Lived, name: str) -> None:
    """Fail with the quantities by which a life differs from the one expected."""
    wrong = differences(ours, expected)
    assert all(wrong[quantity] <= limit for quantity, limit in TOLERANCES.items()), (name, wrong)
    assert ours.all_ranks_agree, name
    for report, reference_report in zip(ours.reports, expected.reports, strict=True):
        a, b = report.updates[0], reference_report.updates[0]
        assert (a.loss_tokens, a.tokens) == (b.loss_tokens, b.tokens), name
        for value, other in ((a.clipped_share, b.clipped_share), (a.kl_behaviour, b.kl_behaviour)):
            assert abs(value - other) <= 1e-5 * abs(other), name
        for value, other in (
            (report.mismatch_mean, reference_report.mismatch_mean),
            (report.mismatch_max, reference_report.mismatch_max),
        ):
            assert abs(value - other) <= 1e-5 * abs(other), name


def differences(ours: Lived, expected: Lived) -> dict[str, float]:
    """How far two lives are apart at most, by quantity."""
    updates = [(a.updates[0], b.updates[0]) for a, b in zip(ours.reports, expected.reports, strict=True)]
    return {
        "log-probs": max(float(np.abs(ours.scores[key] - values).max()) for key, values in expected.scores.items()),
        "loss": max(abs(a.loss - b.loss) / abs(b.loss) for a, b in updates),
        "gradient norm": max(abs(a.grad_norm - b.grad_norm) / b.grad_norm for a, b in updates),
        "gradients": max(_apart(a, b) for a, b in zip(ours.gradients, expected.gradients, strict=True)),
        "weights": max(float(np.abs(ours.after[key] - tensor).max()) for key, tensor in expected.after.items()),
    }


def _apart(ours: Tensors, expected: Tensors) -> float:
    """The largest difference of a tensor, relative to its largest entry."""
    assert ours.keys() == expected.keys()
    return max(float(np.abs(ours[key] - tensor).max() / np.abs(tensor).max()) for key, tensor in expected.items())


def settings_of(model: Path, layout: dict[str, Any]) -> PolicySettings:
    """The settings of a layout of the matrix."""
    return policy_settings(model, **layout)


def with_other_tokens(batch: StepBatch, sample: str) -> StepBatch:
    """The same batch, but for the tokens of one sample."""

    def changed(micro: MicroBatch) -> MicroBatch:
        if sample not in micro.ids:
            return micro
        place = micro.ids.index(sample)
        tokens = np.array(micro.token_ids)
        part = slice(micro.bounds[place], micro.bounds[place + 1])
        tokens[part] = 1 + (tokens[part] + 6) % (VOCABULARY - 1)
        return dataclasses.replace(micro, token_ids=ints(tokens))

    minibatches = tuple(
        dataclasses.replace(mini, microbatches=tuple(tuple(map(changed, row)) for row in mini.microbatches))
        for mini in batch.minibatches
    )
    return dataclasses.replace(batch, minibatches=minibatches)


MOE: dict[str, dict[str, Any]] = {
    "ep2": {"expert": 2, "data": 2},
    "ep2 plain optimizer": {"expert": 2, "data": 2, "distributed": False},
    "dp2": {"data": 2},
    "cp2": {"context": 2},
    "cp2 ep2": {"context": 2, "expert": 2},
    "pp2": {"pipeline": 2},
    "tp2 sp etp2": {"tensor": 2, "sequence": True, "expert_tensor": 2},
    "tp2 sp ep2": {"tensor": 2, "sequence": True, "expert": 2},
    "ep4": {"expert": 4, "data": 4},
    "ep2 dp4": {"expert": 2, "data": 4},
    "ep2 dp4 plain optimizer": {"expert": 2, "data": 4, "distributed": False},
    "tp2 sp ep2 dp2": {"tensor": 2, "sequence": True, "expert": 2, "data": 2},
    "tp2 sp ep4 dp2": {"tensor": 2, "sequence": True, "expert": 4, "data": 2},
    "tp2 sp ep2 pp2": {"tensor": 2, "sequence": True, "expert": 2, "pipeline": 2},
    "ep2 pp2": {"expert": 2, "data": 2, "pipeline": 2},
    "ep2 pp2 vpp2": {"expert": 2, "data": 2, "pipeline": 2, "virtual_pipeline": 2},
    "cp2 ep2 dp2": {"context": 2, "expert": 2, "data": 2},
    "cp2 ep4 dp2": {"context": 2, "expert": 4, "data": 2},
}
"""Layouts of a mixture of experts, on 2 and on 4 ranks."""


def save_moe(folder: Path) -> Path:
    """A Qwen3-MoE of four layers with four experts each, two a token."""
    return save_tiny(
        "Qwen3Moe",
        folder,
        head_dim=16,
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
