"""Every objective and term on a real Megatron rank against a plain torch loop over the same sequences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_fapo.algorithm.losses import Sequences, Tokens, denominator, policy_loss
from megatron_fapo.algorithm.settings import (
    CispoSettings,
    GspoSettings,
    ImportanceSettings,
    KlSettings,
    LossSettings,
)
from megatron_fapo.batch.layout import Layout
from megatron_fapo.errors import PolicyError
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import PolicySettings
from megatron_fapo.records import StepBatch, UpdateReport
from tests.policy.lives import export, make_advantages, make_groups, policy_settings, step_batch

Process = Callable[[PolicySettings], LocalRanks]

KL = KlSettings(coefficient=0.3, estimator="k3")
LOSSES = {
    "gspo": LossSettings(objective=GspoSettings(clip_low=0.1, clip_high=0.1), aggregation="sequence_mean"),
    "cispo": LossSettings(objective=CispoSettings(), aggregation="constant", constant_length=40),
    "kl": LossSettings(kl=KL),
    "entropy": LossSettings(entropy_bonus=0.05, aggregation="sequence_mean"),
    "importance": LossSettings(importance=ImportanceSettings(cap=1.3)),
    "importance of sequences": LossSettings(importance=ImportanceSettings(level="sequence", cap=3.0)),
}


def whole_batch(step: int, layout: Layout) -> StepBatch:
    return step_batch(step, layout, skip_zero_advantage=False)


def logits_of(model: Any, prompt: np.ndarray, response: np.ndarray, temperature: float) -> torch.Tensor:
    tokens = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))
    return torch.log_softmax(model(tokens[None]).logits[0, len(prompt) - 1 : -1] / temperature, -1)


def plain(model: Any, reference: Any, loss: LossSettings) -> tuple[float, float]:
    """Loss and gradient norm of the first step's batch, a sequence at a time."""
    total, tokens, sequences = torch.tensor(0.0), 0, 0
    groups = make_groups(0)
    for group, rows in zip(groups, make_advantages(groups), strict=True):
        for judged, advantages in zip(group, rows, strict=True):
            rollout = judged.rollout
            ids = torch.tensor(rollout.token_ids.astype(np.int64))[:, None]
            place = (group.prompt.token_ids, rollout.token_ids, rollout.temperature)
            logs = logits_of(model, *place)
            new = logs.gather(-1, ids)[:, 0]
            engine = torch.tensor(np.array(rollout.logprobs))
            behaviour = new.detach() if loss.importance else engine
            with torch.no_grad():
                old = logits_of(reference, *place).gather(-1, ids)[:, 0]
            one = Tokens(
                logprobs=new,
                behaviour=behaviour,
                advantages=torch.tensor(np.array(advantages)),
                sequences=Sequences(torch.zeros(len(new), dtype=torch.long), torch.tensor([len(new)])),
                reference=old,
                entropy=-(logs.exp() * logs).sum(-1),
                mismatch=behaviour - engine,
            )
            total = total + policy_loss(one, loss).loss.sum()
            tokens, sequences = tokens + len(new), sequences + 1
    total = total / denominator(loss, num_loss_tokens=tokens, num_sequences=sequences)
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    return total.item(), norm.item()


def settings_for(loss: LossSettings, model: Path, **parallel: int) -> PolicySettings:
    rescore = "always" if loss.importance else "never"
    return policy_settings(model, **parallel).changed(rescore=rescore, reference=loss.kl is not None)


@pytest.mark.parametrize("name", LOSSES)
def test_an_update_has_the_loss_and_gradient_of_a_plain_loop(process: Process, qwen3: Path, name: str) -> None:
    ranks = process(settings_for(LOSSES[name], qwen3))
    report: UpdateReport = ranks.call("update", whole_batch(0, ranks.layout), LOSSES[name])[0].updates[0]
    loss, norm = plain(Qwen3ForCausalLM.from_pretrained(qwen3), Qwen3ForCausalLM.from_pretrained(qwen3), LOSSES[name])
    assert report.loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert report.grad_norm == pytest.approx(norm, rel=1e-4)
    if LOSSES[name].importance:
        assert 0.0 < report.truncated_share < 1.0


def test_the_reference_stays_where_the_run_began(process: Process, qwen3: Path, tmp_path: Path) -> None:
    """Also after updates, and after a checkpoint was loaded: the KL is to the folder's weights, and nothing of the
    reference stays in the model."""
    ranks = process(settings_for(LOSSES["kl"], qwen3))
    first = ranks.call("update", whole_batch(0, ranks.layout), LOSSES["kl"])[0].updates[0]
    assert first.kl_reference == pytest.approx(0.0, abs=1e-6)
    ranks.call("update", whole_batch(0, ranks.layout), LOSSES["kl"])
    ranks.call("save", str(tmp_path / "checkpoint"))
    ranks.call("save_hf", str(tmp_path / "moved"))
    before = export(ranks).tensors
    ranks = process(settings_for(LOSSES["kl"], qwen3))
    ranks.call("load", str(tmp_path / "checkpoint"))
    after = export(ranks).tensors
    assert all(np.array_equal(before[name], after[name]) for name in before)
    again = ranks.call("update", whole_batch(0, ranks.layout), LOSSES["kl"])[0].updates[0]
    moved = Qwen3ForCausalLM.from_pretrained(tmp_path / "moved")
    loss, norm = plain(moved, Qwen3ForCausalLM.from_pretrained(qwen3), LOSSES["kl"])
    assert again.kl_reference > 1e-3
    assert again.loss == pytest.approx(loss, rel=1e-3, abs=1e-5)
    assert again.grad_norm == pytest.approx(norm, rel=1e-3)


def test_without_a_reference_a_kl_penalty_is_refused(process: Process, qwen3: Path) -> None:
    ranks = process(policy_settings(qwen3))
    with pytest.raises(PolicyError, match=r"policy\.reference"):
        ranks.call("update", whole_batch(0, ranks.layout), LOSSES["kl"])


@pytest.mark.parametrize("name", ["gspo", "importance of sequences", "kl"])
@pytest.mark.parametrize("parallel", [{"data": 2}, {"pipeline": 2}], ids=["dp2", "pp2"])
def test_two_ranks_do_what_one_does(process: Process, qwen3: Path, name: str, parallel: dict[str, int]) -> None:
    loss = LOSSES[name]
    one = process(settings_for(loss, qwen3))
    expected = one.call("update", whole_batch(0, one.layout), loss)[0].updates[0]
    with LocalRanks(settings_for(loss, qwen3, **parallel), seed=5) as ranks:
        answers = ranks.call("update", whole_batch(0, ranks.layout), loss)
    for answer in answers:
        assert answer.updates[0].loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-7)
        assert answer.updates[0].grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert answer.updates[0].truncated_share == pytest.approx(expected.truncated_share)
