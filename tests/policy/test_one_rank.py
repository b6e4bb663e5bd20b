"""What a single rank does: rescoring, skipping, refusing, other model families. One process serves all tests."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import load_file, save_file

from megatron_fapo.algorithm.settings import LossSettings
from megatron_fapo.batch.layout import Layout
from megatron_fapo.batch.pack import SupervisedExample, make_batch, make_supervised_batch
from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.compat.weight_group import WeightGroup, meet
from megatron_fapo.errors import DataError, Diverged, PolicyError
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import PolicySettings
from megatron_fapo.policy.supervised import train_supervised
from megatron_fapo.records import MicroBatch, StepBatch, StepReport, UpdateReport, floats, ints
from megatron_fapo.weights import digest, shared_memory_folder
from tests.policy.lives import (
    LOSS,
    VOCABULARY,
    export,
    make_advantages,
    make_groups,
    policy_settings,
    save_tiny,
    scores,
    step_batch,
)
from tests.policy.matrix import save_moe

Process = Callable[[PolicySettings], LocalRanks]


def one_microbatch(versions: int | None = None) -> StepBatch:
    """A step of two updates, one microbatch each, nothing skipped."""
    groups = make_groups(0, versions)
    settings = BatchSettings(updates=2, tokens_per_microbatch=10**6, skip_zero_advantage=False)
    return make_batch(groups, make_advantages(groups), Layout(), settings, seed=0)


def with_logprobs(batch: StepBatch, values: list[Any]) -> StepBatch:
    """The batch with the behaviour log-probs of its microbatches replaced."""
    minis = []
    for mini, row in zip(batch.minibatches, values, strict=True):
        ((micro,),) = mini.microbatches
        minis.append(dataclasses.replace(mini, microbatches=((dataclasses.replace(micro, logprobs=floats(row)),),)))
    return dataclasses.replace(batch, minibatches=tuple(minis))


def own_logprobs(ranks: LocalRanks, batch: StepBatch) -> list[Any]:
    return [ranks.call("score", mini.microbatches)[0][0] for mini in batch.minibatches]


def micro_of(batch: StepBatch, number: int) -> MicroBatch:
    return batch.minibatches[number].microbatches[0][0]


def test_without_rescoring_the_mismatch_is_that_of_the_first_minibatch(process: Process, qwen3: Path) -> None:
    ranks = process(policy_settings(qwen3))
    batch = one_microbatch()
    own = own_logprobs(ranks, batch)
    gaps = [np.abs(own[n] - micro_of(batch, n).logprobs)[micro_of(batch, n).loss_mask > 0] for n in (0, 1)]
    report: StepReport = ranks.call("update", batch, LOSS)[0]
    assert not report.rescored
    assert report.mismatch_mean == pytest.approx(gaps[0].mean(), rel=1e-5)
    assert report.mismatch_max == pytest.approx(gaps[0].max(), rel=1e-5)


def test_rescoring_puts_megatrons_own_log_probs_in_place(process: Process, qwen3: Path) -> None:
    batch = one_microbatch()
    ranks = process(policy_settings(qwen3))
    own = own_logprobs(ranks, batch)
    exact: StepReport = ranks.call("update", with_logprobs(batch, own), LOSS)[0]
    ranks = process(policy_settings(qwen3).changed(rescore="always"))
    rescored: StepReport = ranks.call("update", batch, LOSS)[0]
    assert rescored.rescored
    assert rescored.updates == exact.updates
    assert exact.mismatch_max == 0.0
    assert rescored.updates[0].kl_behaviour == 0.0
    gaps = np.concatenate(
        [np.abs(own[n] - micro_of(batch, n).logprobs)[micro_of(batch, n).loss_mask > 0] for n in (0, 1)]
    )
    assert rescored.mismatch_mean == pytest.approx(gaps.mean(), rel=1e-5)
    assert rescored.mismatch_max == pytest.approx(gaps.max(), rel=1e-5)


def test_when_stale_rescores_old_rollouts_only(process: Process, qwen3: Path) -> None:
    ranks = process(policy_settings(qwen3).changed(rescore="when_stale"))
    assert not ranks.call("update", one_microbatch(), LOSS)[0].rescored
    assert ranks.call("update", one_microbatch(versions=-1), LOSS)[0].rescored


def test_skipping_zero_advantages_changes_nothing(process: Process, qwen3: Path) -> None:
    results = []
    for skip in (False, True):
        ranks = process(policy_settings(qwen3))
        # six updates over six groups: two mini-batches have no advantage at all, and still step
        answer = ranks.call("update", step_batch(0, ranks.layout, updates=6, skip_zero_advantage=skip), LOSS)[0]
        results.append((answer.updates, export(ranks).tensors))
    (full, full_weights), (lean, lean_weights) = results
    assert sum(u.grad_norm == 0.0 for u in full) == sum(u.grad_norm == 0.0 for u in lean) == 2
    for ours, reference in zip(lean, full, strict=True):
        assert ours.loss == pytest.approx(reference.loss, rel=1e-5, abs=1e-9)
        assert ours.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
        assert ours.loss_tokens == reference.loss_tokens
    assert sum(u.tokens for u in lean) < 0.8 * sum(u.tokens for u in full)
    for key, expected in full_weights.items():
        np.testing.assert_allclose(lean_weights[key], expected, atol=1e-6, err_msg=key)


def test_one_update_equals_a_plain_torch_loop(process: Process, qwen3: Path) -> None:
    from transformers import Qwen3ForCausalLM

    settings = policy_settings(qwen3)
    chosen = settings.optimizer
    ranks = process(settings)
    batch = step_batch(0, ranks.layout, skip_zero_advantage=False)
    report: UpdateReport = ranks.call("update", batch, LOSS)[0].updates[0]

    model = Qwen3ForCausalLM.from_pretrained(qwen3)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": chosen.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=chosen.learning_rate / 2,  # the first of two warm-up steps
        betas=(chosen.beta1, chosen.beta2),
        eps=chosen.epsilon,
    )
    groups = make_groups(0)
    total = torch.tensor(0.0)
    for group, rows in zip(groups, make_advantages(groups), strict=True):
        for judged, advantages in zip(group, rows, strict=True):
            rollout, prompt = judged.rollout, group.prompt.token_ids
            tokens = torch.tensor(np.concatenate([prompt, rollout.token_ids]).astype(np.int64))
            logits = model(tokens[None]).logits[0, len(prompt) - 1 : -1] / rollout.temperature
            new = torch.log_softmax(logits, -1).gather(-1, tokens[len(prompt) :, None])[:, 0]
            ratio = (new - torch.tensor(np.array(rollout.logprobs))).exp()
            a = torch.tensor(np.array(advantages))
            loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.28))
            total = total + torch.where(a < 0, torch.minimum(loss, -10 * a), loss).sum()
    total = total / batch.minibatches[0].num_loss_tokens
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.clip_grad)
    optimizer.step()
    assert report.loss == pytest.approx(total.item(), rel=1e-5)
    assert report.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    ours = export(ranks).tensors
    for key, tensor in model.state_dict().items():
        if key != "lm_head.weight":
            np.testing.assert_allclose(ours[key], tensor.numpy(), atol=1e-6, err_msg=key)


def test_a_loss_that_is_not_finite_is_an_error_with_its_place(process: Process, qwen3: Path) -> None:
    ranks = process(policy_settings(qwen3))
    batch = with_logprobs(
        one_microbatch(), [np.full(len(micro_of(one_microbatch(), n).token_ids), np.nan) for n in (0, 1)]
    )
    with pytest.raises(Diverged, match=r"the loss is nan.*rank 0, update 0, step 0"):
        ranks.call("update", batch, LOSS)


def test_a_bucket_too_small_and_an_export_not_opened_are_named(process: Process, qwen3: Path, tmp_path: Path) -> None:
    ranks = process(policy_settings(qwen3))
    ranks.call("open_export")
    with pytest.raises(PolicyError, match=r"model.embed_tokens.weight need a bucket of \d+ bytes, the bucket has 100"):
        ranks.call("next_bucket", str(tmp_path / "segment"), 100)
    ranks = process(policy_settings(qwen3))
    with pytest.raises(PolicyError, match="open_export"):
        ranks.call("next_bucket", str(tmp_path / "segment"), 100)


def test_a_group_gets_the_buckets_of_the_first_rank_and_its_absence_is_named(process: Process, qwen3: Path) -> None:
    ranks = process(policy_settings(qwen3))
    path, nbytes = shared_memory_folder() / f"fapo-test-group-{os.getpid()}", 200000
    try:
        ranks.call("open_export")
        bucket = ranks.call("next_bucket", str(path), nbytes)[0]
        host, port = ranks.one(0, "open_group", "g", "127.0.0.1", "gloo", 30.0)
        with ThreadPoolExecutor(1) as pool:
            store = meet(host, port, 2, 30.0, first=False)
            joining = pool.submit(WeightGroup, store, 1, 2, "g", "gloo", 30.0)
            ranks.one(0, "join_group", 2)
            received = [torch.zeros(spec.shape) for spec in bucket.tensors]
            receiving = pool.submit(joining.result().broadcast, received)
            ranks.one(0, "send_bucket", bucket)
            receiving.result()
        assert [digest(tensor.numpy().tobytes()) for tensor in received] == [spec.digest for spec in bucket.tensors]
        ranks.one(0, "close_group")
        ranks.one(0, "open_group", "g", "127.0.0.1", "gloo", 0.3)
        assert "1 members of group g did not meet" in ranks.one(0, "join_group", 2)
    finally:
        path.unlink(missing_ok=True)


def test_a_rank_that_dies_is_named(process: Process, qwen3: Path) -> None:
    ranks = process(policy_settings(qwen3))
    with pytest.raises(PolicyError, match=r"AttributeError.*rank 0"):
        ranks.call("no_such_verb")
    ranks = process(policy_settings(qwen3))
    ranks._processes[0].kill()
    with pytest.raises(PolicyError, match=r"a rank died in update\(\) with exit code -9 \(rank 0\)"):
        ranks.call("update", one_microbatch(), LOSS)


def test_a_folder_that_does_not_hold_the_model_is_named(process: Process, qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config.json is missing"):
        process(policy_settings(tmp_path / "nowhere"))
    tensors = load_file(qwen3 / "model.safetensors")
    folder = Path(shutil.copytree(qwen3, tmp_path / "more"))
    save_file({**tensors, "model.layers.0.extra.weight": np.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"1 tensors .* model.layers.0.extra.weight"):
        process(policy_settings(folder))
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"1 tensors are missing, the first is model.norm.weight"):
        process(policy_settings(folder))


def test_the_plain_optimizer_does_what_the_distributed_one_does(process: Process, qwen3: Path, tmp_path: Path) -> None:
    settings = policy_settings(qwen3)
    seen = []
    for distributed in (True, False):
        chosen = settings.changed(optimizer=settings.optimizer.changed(distributed=distributed))
        ranks = process(chosen)
        folder = str(tmp_path / str(distributed))
        first = ranks.call("update", step_batch(0, ranks.layout), LOSS)[0].updates
        ranks.call("save", folder)
        second = ranks.call("update", step_batch(1, ranks.layout), LOSS)[0].updates
        ranks = process(chosen)
        ranks.call("load", folder)
        assert ranks.call("update", step_batch(1, ranks.layout), LOSS)[0].updates == second
        seen.append(first + second)
    for ours, reference in zip(*seen, strict=True):
        assert (ours.loss, ours.grad_norm) == pytest.approx((reference.loss, reference.grad_norm), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}), ("Qwen2", {}), ("Llama", {"head_dim": 8})],
)
def test_other_families_round_trip_and_score_like_hugging_face(
    process: Process, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny(kind, tmp_path / "hf", **changes)
    ranks = process(policy_settings(folder))
    ours, theirs = export(ranks).tensors, load_file(folder / "model.safetensors")
    assert sorted(ours) == sorted(theirs)
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    model = AutoModelForCausalLM.from_pretrained(folder)
    group = make_groups(0)[0]
    found = scores(ranks, step_batch(0, ranks.layout, skip_zero_advantage=False))
    for judged in group:
        tokens = torch.tensor(np.concatenate([group.prompt.token_ids, judged.rollout.token_ids]).astype(np.int64))
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1] / judged.rollout.temperature
        expected = torch.log_softmax(logits, -1).gather(-1, tokens[1:, None])[:, 0].numpy()
        np.testing.assert_allclose(found[judged.rollout.id][1:], expected, atol=1e-5)


def test_a_saved_hugging_face_folder_holds_the_trained_weights(process: Process, qwen3: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ranks = process(policy_settings(qwen3))
    ranks.call("update", step_batch(0, ranks.layout), LOSS)
    ranks.call("save_hf", str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (qwen3 / "tokenizer.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key, tensor in export(ranks).tensors.items():
        assert np.array_equal(model.state_dict()[key].numpy(), tensor), key
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_supervised_training_learns(process: Process, qwen3: Path) -> None:
    ranks = process(policy_settings(qwen3))
    rng = np.random.default_rng(0)
    examples = [
        SupervisedExample(id=str(n), prompt_ids=ints(rng.integers(1, VOCABULARY, 3)), response_ids=ints([5, 6, 7]))
        for n in range(8)
    ]
    batches = [make_supervised_batch(examples, ranks.layout, BatchSettings())] * 20
    seen: list[UpdateReport] = []
    last = train_supervised(ranks, batches, lambda number, report: seen.append(report))
    assert [len(seen), seen[-1]] == [20, last]
    assert seen[0].loss_tokens == 24
    assert seen[-1].loss < 0.5 * seen[0].loss


def test_bfloat16_follows_float32(process: Process, qwen3: Path) -> None:
    reports = []
    for dtype in ("float32", "bfloat16"):
        ranks = process(policy_settings(qwen3).changed(dtype=dtype))
        reports.append(ranks.call("update", step_batch(0, ranks.layout), LossSettings())[0].updates[0])
    assert reports[1].loss == pytest.approx(reports[0].loss, rel=0.1)
    assert reports[1].grad_norm == pytest.approx(reports[0].grad_norm, rel=0.1)


@pytest.mark.parametrize(
    "save", [lambda folder: save_tiny("Qwen3", folder, head_dim=16), save_moe], ids=["dense", "moe"]
)
def test_a_rank_that_shuts_down_gives_its_groups_back(save: Callable[[Path], Path], tmp_path: Path) -> None:
    settings = policy_settings(save(tmp_path))
    with LocalRanks(settings) as ranks:
        threads = []
        for _ in range(3):
            ranks.call("update", step_batch(0, ranks.layout), LOSS)
            ranks.call("shutdown")
            threads.append(psutil.Process(ranks._processes[0].pid).num_threads())
            ranks._meet(settings, seed=1)
    # Each life has about 50 threads, two or three for each process group. Four of them stay.
    assert threads[2] - threads[1] < 10, f"{threads} threads after each shutdown"
