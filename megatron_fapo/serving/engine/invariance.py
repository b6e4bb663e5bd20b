"""Which shapes make a row's arithmetic independent of the other rows, found by trying it on this machine.

A matrix product may sum in another order when its number of rows changes, since libraries choose kernels by shape.
They choose among few, so that multiples of some number of rows share one; which number is a fact about the machine.
"""

import logging

import numpy as np
import torch

from megatron_fapo.errors import ConfigError
from megatron_fapo.serving.engine.model import Model
from megatron_fapo.serving.engine.sampling import draw

CANDIDATES = (16, 32, 64)
_LENGTH = 13

log = logging.getLogger(__name__)


def find_granularity(model: Model, max_running: int) -> int:
    """The smallest number such that batches of any multiple of it, of any length, give each row the same bytes.

    Rows and lengths are padded to multiples of it, so a batch at most grows to the next one. Raises ConfigError when
    nothing but one fixed shape would do and even that does not.
    """
    for granularity in (*(c for c in CANDIDATES if c < max_running), max_running):
        if holds(model, granularity, max_running):
            log.info("deterministic: rows and lengths are padded to multiples of %d", granularity)
            return granularity
    raise ConfigError("deterministic: on this machine a row's results depend on its place in the batch")


@torch.inference_mode()
def holds(model: Model, granularity: int, max_running: int) -> bool:
    """Whether every multiple of `granularity` rows, every order and two lengths give each row the same bytes."""
    most = -(-max_running // granularity)
    sizes = sorted({granularity * blocks for blocks in (1, 2, 3, most) if blocks <= most}, reverse=True)
    generator = torch.Generator().manual_seed(0)
    rows, length = sizes[0], -(-_LENGTH // granularity) * granularity
    cache = model.new_cache()
    cache.reserve(rows, 2 * length, 0)
    cache.data.normal_(generator=generator)
    tokens = torch.randint(0, model.vocabulary, (rows,), generator=generator)
    positions = torch.randint(1, _LENGTH, (rows,), generator=generator)
    reference = _results(model.decode(tokens, positions, cache, length))
    for size in sizes:
        for longer in (length, 2 * length):
            part = _results(model.decode(tokens[:size], positions[:size], cache, longer))
            if not all(torch.equal(a, b[:size]) for a, b in zip(part, reference, strict=True)):
                return False
    order = torch.randperm(rows, generator=generator)
    cache.move(order, torch.arange(rows), cache.length)
    moved = _results(model.decode(tokens[order], positions[order], cache, length))
    alone = _results(reference[0][:1].clone())
    same_alone = all(torch.equal(a, b[:1]) for a, b in zip(alone, reference, strict=True))
    return same_alone and all(torch.equal(a, b[order]) for a, b in zip(moved, reference, strict=True))


def _results(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits, and what is drawn from them, by both ways of drawing."""
    rows = len(logits)
    nucleus, numbers = torch.full((rows, 1), 0.9), np.full(rows, 0.5)
    plain, cut = (draw(logits, torch.ones(rows, 1), top_ps, numbers, None) for top_ps in (None, nucleus))
    return logits.clone(), *(torch.from_numpy(array) for array in (*plain, *cut))
