"""Every layout: the same weights in, the same updates, the same weights out.

Each life is three updates of the policy's loss on distinct, ragged samples, several microbatches a rank with different
numbers of tokens. Compared with one rank: log-probs, losses, gradient norms, each parameter's gradient as Megatron's
buffers hold it (gathered under its Hugging Face name by the export of weights), and the weights after the updates.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_fapo.errors import PolicyError
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.weights import ALIGNMENT, digest
from tests.policy.lives import LAYOUTS, LOSS, Life, make_groups, policy_settings, scores, step_batch
from tests.policy.matrix import DENSE, MOE, Pool, Reference, compare, live, settings_of, with_other_tokens

every_layout = pytest.mark.parametrize("name", list(LAYOUTS))
Lives = Callable[[str], Life]


@every_layout
def test_weights_go_in_and_out_bit_for_bit(lives: Lives, qwen3: Path, name: str) -> None:
    ours, theirs = lives(name).before, load_file(qwen3 / "model.safetensors")
    assert sorted(ours.tensors) == sorted(theirs)
    for key, tensor in theirs.items():
        assert np.array_equal(ours.tensors[key], tensor), key


@every_layout
def test_digests_are_those_of_the_hugging_face_tensors(lives: Lives, qwen3: Path, name: str) -> None:
    tensors = load_file(qwen3 / "model.safetensors")
    before = lives(name).before
    assert before.digests == {key: digest(tensor.tobytes()) for key, tensor in tensors.items()}
    assert len(before.nbytes) > 2
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert total <= sum(before.nbytes) < total + ALIGNMENT * len(tensors)


@every_layout
def test_log_probs_equal_hugging_face(lives: Lives, qwen3: Path, name: str) -> None:
    import torch
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(qwen3)
    found = lives(name).scores
    groups = make_groups(0)
    assert len(found) == sum(len(group) for group in groups)
    for group in groups:
        for judged in group:
            tokens = torch.tensor(np.concatenate([group.prompt.token_ids, judged.rollout.token_ids]).astype(np.int64))
            with torch.no_grad():
                logits = model(tokens[None]).logits[0, :-1] / judged.rollout.temperature
            expected = torch.log_softmax(logits, -1).gather(-1, tokens[1:, None])[:, 0].numpy()
            ours = found[judged.rollout.id]
            assert ours[0] == 0.0
            np.testing.assert_allclose(ours[1:], expected, atol=1e-5)


def test_a_dense_model_lives_the_same_life_in_the_core_layouts(pool: Pool, dense: Reference) -> None:
    for name in ("tp2 sp", "pp2 vpp2", "cp2", "dp2", "cp2 dp2", "tp2 sp pp2 vpp2"):
        compare(live(pool, settings_of(dense.model, DENSE[name])), dense.life, name)


def test_a_mixture_of_experts_lives_the_same_life_in_the_core_layouts(pool: Pool, sparse: Reference) -> None:
    for name in ("ep2", "tp2 sp ep2", "cp2 ep2", "ep2 pp2 vpp2"):
        compare(live(pool, settings_of(sparse.model, MOE[name])), sparse.life, name)


@pytest.mark.long
@pytest.mark.parametrize("name", list(MOE))
def test_a_mixture_of_experts_lives_the_same_life_in_every_layout(pool: Pool, sparse: Reference, name: str) -> None:
    compare(live(pool, settings_of(sparse.model, MOE[name])), sparse.life, name)


@pytest.mark.long
@pytest.mark.parametrize("name", list(DENSE))
def test_a_dense_model_lives_the_same_life_in_every_layout(pool: Pool, dense: Reference, name: str) -> None:
    compare(live(pool, settings_of(dense.model, DENSE[name])), dense.life, name)


@pytest.mark.parametrize("name", ["tp2 sp", "cp2", "dp2", "pp2 vpp2", "ep2"])
def test_bfloat16_keeps_masters_and_reductions_in_float32(
    pool: Pool, dense: Reference, sparse: Reference, name: str
) -> None:
    import torch

    expected, chosen = (sparse, MOE[name]) if name in ("ep2",) else (dense, DENSE[name])
    with pool.set_up(settings_of(expected.model, chosen).changed(dtype="bfloat16")) as ranks:
        reports = [ranks.call("update", step_batch(step, ranks.layout), LOSS)[0] for step in range(3)]
        kept = ranks.call("dtypes")[0]
    assert kept == {"weights": {torch.bfloat16}, "gradients": {torch.float32}, "masters": {torch.float32}}
    for ours, reference in zip(reports, expected.life.reports, strict=True):
        assert ours.updates[0].loss == pytest.approx(reference.updates[0].loss, abs=0.02)
        assert ours.updates[0].grad_norm == pytest.approx(reference.updates[0].grad_norm, rel=0.15)


def test_no_token_sees_another_sample(pool: Pool, dense: Reference) -> None:
    """Change one sample of a microbatch: the log-probs of its neighbours keep every digit."""
    for name in ("tp2 sp", "cp2"):
        with pool.set_up(settings_of(dense.model, DENSE[name])) as ranks:
            batch = step_batch(0, ranks.layout, skip_zero_advantage=False)
            first = max(batch.minibatches[0].microbatches, key=lambda row: len(row[0].ids))[0]
            assert len(first.ids) > 2
            before = scores(ranks, batch)
            after = scores(ranks, with_other_tokens(batch, first.ids[1]))
        assert not np.allclose(before[first.ids[1]], after[first.ids[1]], atol=1e-2)
        for id_ in before.keys() - {first.ids[1]}:
            assert np.array_equal(before[id_], after[id_]), (name, id_)


def test_a_rank_that_dies_is_named_also_when_its_peer_fails_first(qwen3: Path) -> None:
    with LocalRanks(policy_settings(qwen3, data=2), seed=5) as ranks:
        victim = ranks._processes[1]
        batch = step_batch(0, ranks.layout)
        ranks._send("update", [(None, LOSS), (batch, LOSS)])  # rank 0 fails at once, rank 1 waits for it
        threading.Timer(0.5, victim.kill).start()
        with pytest.raises(PolicyError, match=r"a rank died in update\(\) with exit code -9 \(rank 1\)"):
            ranks.finish()
