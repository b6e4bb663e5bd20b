"""Log-probs and entropies of chosen tokens, from hidden states, a chunk of logits at a time.

The output projection is part of it. Logits of a whole microbatch would be the largest tensor of training (16384 tokens
of a vocabulary of 152064 are 10 GB in float32, several times over in the backward pass), so they are made for a chunk
of tokens, reduced to three numbers a token, and made again in the backward pass. Positions whose next token does not
count (prompts, padding) are never projected. Where one chunk is enough, its probabilities are kept instead, and nothing
is computed twice.

The vocabulary stays split over tensor-parallel ranks: what they exchange is [N], never a row of logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Projection:
    """The output layer as this rank has it, and what its logits are taken for."""

    vocabulary: int
    """True size; the rows of the whole weight from there on are padding and take no probability."""
    temperature: float = 1.0
    """Logits are divided by it."""
    chunk: int = 2**62
    """Most tokens whose logits exist at once."""
    entropy: bool = True
    """Whether the entropy is computed; zeros otherwise."""
    group: dist.ProcessGroup | None = None
    """Tensor-parallel ranks, each with as many consecutive rows of the weight; None where one rank has all."""
    sum_hidden_gradient: bool = True
    """Sum the gradient of the hidden states over `group`. Off where their gather does (sequence parallelism)."""

    def shard(self, rows: int) -> tuple[int, int]:
        """First token of this rank's `rows` rows of the weight, and how many of them are no padding."""
        first = 0 if self.group is None else dist.get_rank(self.group) * rows
        return first, min(max(self.vocabulary - first, 0), rows)


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, projection: Projection
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of `targets` and entropies of their distributions, both [N] in float32 and differentiable.

    With z = hidden weight^T / temperature over the true vocabulary and p = softmax(z): log p[target] and -sum p log p.
    `hidden` is [N, h], equal on all ranks of the group, `weight` this rank's [v, h], `targets` [N] of the whole
    vocabulary. Products are in the dtype of `weight`, everything after them in float32.
    """
    keep = torch.is_grad_enabled() and len(hidden) <= projection.chunk
    found: tuple[torch.Tensor, torch.Tensor]
    found = _TokenLogprobs.apply(hidden.to(weight.dtype), weight, targets, projection, keep)  # type: ignore[no-untyped-call]
    return found


class _TokenLogprobs(torch.autograd.Function):
    """With g and e the gradients of the log-prob and the entropy H of a token,

    dz = g (1[target] - p) - e p (log p + H),   dhidden = dz weight / temperature,   dweight = dz^T hidden / ...
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, projection: Projection, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first, real = projection.shard(len(weight))
        own, inside = weight[:real], targets - first
        mine = (inside >= 0) & (inside < real)
        index = inside.clamp(0, max(real - 1, 0)).unsqueeze(1)
        sums, chosen, means = hidden.new_zeros(3, len(hidden), dtype=torch.float32)
        kept = None
        if real == 0:
            sums.fill_(-torch.inf)
        for part in _chunks(len(hidden), projection.chunk if real else 0):
            logs = _logits(hidden[part], own, projection.temperature)
            sums[part] = torch.logsumexp(logs, -1)
            logs -= sums[part].unsqueeze(1)
            chosen[part] = logs.gather(1, index[part]).squeeze(1)
            if projection.entropy or keep:
                kept = logs.exp()
                if projection.entropy:
                    means[part] = torch.linalg.vecdot(kept, logs)
        total, logprobs, entropy = _over_ranks(sums, chosen, means, mine, projection)
        probabilities = None
        if keep and kept is not None:
            probabilities = kept if projection.group is None else kept.mul_((sums - total).exp().unsqueeze(1))
        ctx.save_for_backward(hidden, weight, index, mine, total, entropy, probabilities)
        ctx.projection = projection
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, index, mine, total, entropy, probabilities = ctx.saved_tensors
        for_logprobs, for_entropy = gradients
        projection: Projection = ctx.projection
        _, real = projection.shard(len(weight))
        own = weight[:real]
        to_hidden = torch.zeros_like(hidden)
        # summed in float32: a bfloat16 sum over many chunks would lose what the small ones add
        to_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part in _chunks(len(hidden), projection.chunk if real else 0):
            p = probabilities
            if p is None:
                p = _logits(hidden[part], own, projection.temperature).sub_(total[part].unsqueeze(1)).exp_()
            change = torch.zeros_like(p) if for_logprobs is None else p * -for_logprobs[part].unsqueeze(1)
            if for_logprobs is not None:
                at_target = change.gather(1, index[part]) + (for_logprobs * mine)[part].unsqueeze(1)
                change.scatter_(1, index[part], at_target)
            if for_entropy is not None:
                change -= for_entropy[part].unsqueeze(1) * (torch.xlogy(p, p) + p * entropy[part].unsqueeze(1))
            if projection.temperature != 1.0:
                change /= projection.temperature
            change = change.to(weight.dtype)
            torch.mm(change, own, out=to_hidden[part])
            to_weight[:real] += change.t() @ hidden[part]
        if projection.group is not None and projection.sum_hidden_gradient:
            dist.all_reduce(to_hidden, group=projection.group)
        return to_hidden, to_weight.to(weight.dtype), None, None, None


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)] if size else []


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = (hidden @ weight.t()).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _over_ranks(
    sums: torch.Tensor, chosen: torch.Tensor, means: torch.Tensor, mine: torch.Tensor, projection: Projection
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-sum-exp, log-prob and entropy over the whole vocabulary.

    From this rank's log-sum-exp, the target's log-prob and the mean log-prob within its own part; `mine` says where
    the target is there. Differences of log-sum-exps rather than of products keep what is small exact.
    """
    if projection.group is None:
        total, logprobs = sums, chosen
    else:
        ranks = dist.get_world_size(projection.group)
        every = [torch.empty_like(sums) for _ in range(ranks)]
        dist.all_gather(every, sums, group=projection.group)
        total = torch.logsumexp(torch.stack(every), 0)
        less = (sums - total).clamp(min=torch.finfo(torch.float32).min)  # a rank with nothing but padding has -inf
        together = torch.stack([(chosen + less) * mine, (means + less) * less.exp()])
        dist.all_reduce(together, group=projection.group)
        logprobs, means = together
    return total, logprobs, -means if projection.entropy else torch.zeros_like(total)
