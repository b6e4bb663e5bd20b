"""One rank, TP2, PP2 and DP2: the same weights in, the same updates, the same weights out."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_fapo.errors import PolicyError
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.weights import ALIGNMENT, digest
from tests.policy.lives import LAYOUTS, LOSS, Life, make_groups, policy_settings, step_batch

every_layout = pytest.mark.parametrize("name", list(LAYOUTS))
other_layout = pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
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


@other_layout
def test_losses_and_gradient_norms_equal_those_of_one_rank(lives: Lives, name: str) -> None:
    one, other = lives("one"), lives(name)
    assert other.all_ranks_agree
    for ours, reference in zip(other.reports, one.reports, strict=True):
        for field in ("loss", "grad_norm", "learning_rate", "clipped_share", "kl_behaviour"):
            value, expected = getattr(ours.updates[0], field), getattr(reference.updates[0], field)
            assert value == pytest.approx(expected, rel=1e-5, abs=1e-7), field
        assert ours.updates[0].loss_tokens == reference.updates[0].loss_tokens
        assert ours.mismatch_mean == pytest.approx(reference.mismatch_mean, rel=1e-5)
        assert ours.mismatch_max == pytest.approx(reference.mismatch_max, rel=1e-5)


@other_layout
def test_weights_after_three_updates_equal_those_of_one_rank(lives: Lives, name: str) -> None:
    one, other = lives("one"), lives(name)
    moved = 0.0
    for key, expected in one.after.tensors.items():
        np.testing.assert_allclose(other.after.tensors[key], expected, atol=1e-5, err_msg=key)
        moved = max(moved, float(np.abs(expected - one.before.tensors[key]).max()))
    assert moved > 1e-2


def test_a_rank_that_dies_is_named_also_when_its_peer_fails_first(qwen3: Path) -> None:
    with LocalRanks(policy_settings(qwen3, data=2), seed=5) as ranks:
        victim = ranks._processes[1]
        batch = step_batch(0, ranks.layout)
        ranks._send("update", [(None, LOSS), (batch, LOSS)])  # rank 0 fails at once, rank 1 waits for it
        threading.Timer(0.5, victim.kill).start()
        with pytest.raises(PolicyError, match=r"a rank died in update\(\) with exit code -9 \(rank 1\)"):
            ranks.finish()
