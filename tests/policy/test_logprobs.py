"""Log-probs and entropies in chunks, over ranks, with padding: those of the whole matrix of logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_fapo.policy.logprobs import Projection, token_logprobs

TOKENS, HIDDEN, VOCABULARY = 23, 8, 71
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def case(rows: int = VOCABULARY, vocabulary: int = VOCABULARY) -> Case:
    """Hidden states, a weight whose padding would win every softmax, targets, gradients of log-probs and entropies."""
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw)
    weight = torch.randn(rows, HIDDEN, generator=draw)
    weight[vocabulary:] = 1e3
    targets = torch.randint(vocabulary, (TOKENS,), generator=draw)
    targets[0], targets[1] = 0, vocabulary - 1
    return hidden, weight, targets, torch.randn(TOKENS, generator=draw), torch.randn(TOKENS, generator=draw)


def by_definition(temperature: float, rows: int = VOCABULARY, vocabulary: int = VOCABULARY) -> tuple[torch.Tensor, ...]:
    """Log-probs, entropies and both gradients in float64 from torch's own softmax."""
    hidden, weight, targets, g, e = (t.double() if t.is_floating_point() else t for t in case(rows, vocabulary))
    hidden.requires_grad_()
    weight.requires_grad_()
    table = torch.log_softmax(hidden @ weight[:vocabulary].t() / temperature, -1)
    logprobs, entropy = table.gather(-1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)
    ((logprobs * g).sum() + (entropy * e).sum()).backward()
    return tuple(t.detach() for t in (logprobs, entropy, hidden.grad, weight.grad))


def ours(projection: Projection, part: slice, rows: int = VOCABULARY) -> tuple[torch.Tensor, ...]:
    hidden, weight, targets, g, e = case(rows, projection.vocabulary)
    hidden.requires_grad_()
    shard = weight[part].clone().requires_grad_()
    logprobs, entropy = token_logprobs(hidden, shard, targets, projection)
    loss = (logprobs * g).sum() + ((entropy * e).sum() if projection.entropy else 0.0)
    loss.backward()
    return tuple(t.detach() for t in (logprobs, entropy, hidden.grad, shard.grad))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 10**6])
def test_chunks_give_what_the_definition_gives(chunk: int, temperature: float) -> None:
    projection = Projection(vocabulary=VOCABULARY, temperature=temperature, chunk=chunk)
    for found, expected in zip(ours(projection, slice(None)), by_definition(temperature), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_entropy_the_log_probs_and_gradients_are_the_same_to_the_last_digit() -> None:
    hidden, weight, targets, g, _ = case()
    seen = []
    for entropy in (True, False):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, values = token_logprobs(*inputs, targets, Projection(vocabulary=VOCABULARY, entropy=entropy))
        assert values.any() == entropy
        (logprobs * g).sum().backward()
        seen.append((logprobs.detach(), inputs[0].grad, inputs[1].grad))
    for with_it, without in zip(*seen, strict=True):
        assert torch.equal(with_it, without)


def test_nothing_chosen_is_nothing_and_has_no_gradient() -> None:
    hidden, weight, targets, *_ = case()
    weight.requires_grad_()
    logprobs, entropy = token_logprobs(hidden[:0], weight, targets[:0], Projection(vocabulary=VOCABULARY))
    assert len(logprobs) == len(entropy) == 0
    logprobs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_bfloat16_weights_sum_their_gradient_in_float32() -> None:
    hidden, weight, targets, g, _ = case()
    gradients = []
    for chunk in (1, 10**6):
        rough = weight.bfloat16().requires_grad_()
        logprobs, _ = token_logprobs(hidden.bfloat16(), rough, targets, Projection(vocabulary=VOCABULARY, chunk=chunk))
        assert logprobs.dtype == torch.float32
        (logprobs * g).sum().backward()
        assert rough.grad is not None
        gradients.append(rough.grad.float())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("temperature", [0.7])
@pytest.mark.parametrize(("vocabulary", "rows"), [(71, 72), (35, 72)], ids=["one row of padding", "a shard of padding"])
def test_two_ranks_with_a_padded_vocabulary_give_what_one_gives(
    tmp_path: Path, vocabulary: int, rows: int, temperature: float
) -> None:
    mp.spawn(_rank, (str(tmp_path), vocabulary, rows, temperature), nprocs=2)
    found: list[tuple[torch.Tensor, ...]] = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    logprobs, entropy, hidden, weight = by_definition(temperature, rows, vocabulary)
    for rank in (0, 1):
        expected = (logprobs, entropy, hidden, weight[rank * rows // 2 : (rank + 1) * rows // 2])
        for chunked in (found[rank][:4], found[rank][4:]):
            for value, wanted in zip(chunked, expected, strict=True):
                torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)


def _rank(rank: int, folder: str, vocabulary: int, rows: int, temperature: float) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    part = slice(rank * rows // 2, (rank + 1) * rows // 2)
    found: list[Any] = []
    for chunk in (5, 10**6):
        projection = Projection(vocabulary=vocabulary, temperature=temperature, chunk=chunk, group=dist.group.WORLD)
        found += ours(projection, part, rows)
    torch.save(tuple(found), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
