"""Drawing tokens. A draw depends on the sample's seed, the position and the logits: never on the batch."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Seeds = npt.NDArray[np.uint64]

_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_30, _27, _31, _11 = (np.uint64(x) for x in (30, 27, 31, 11))


def _mix(x: Seeds) -> Seeds:
    """The finaliser of splitmix64: a bijection whose output bits each depend on all input bits."""
    x = (x ^ (x >> _30)) * _MIX_1
    x = (x ^ (x >> _27)) * _MIX_2
    return x ^ (x >> _31)


def uniforms(seeds: Seeds, steps: Seeds) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) for [R] seeds and [R] token numbers: a counter-based generator."""
    mixed = _mix(_mix(seeds * _GOLDEN + _GOLDEN) ^ (steps * _MIX_1))
    return (mixed >> _11).astype(np.float64) * 2.0**-53


def draw(
    logits: Tensor,
    temperatures: Tensor,
    top_ps: Tensor | None,
    numbers: npt.NDArray[np.float64],
    greedy: Tensor | None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """One token a row, by inverse CDF, and its log-prob under softmax(logits / temperature), before top-p.

    `logits` [R, V], `temperatures` [R, 1] (1 where greedy), `top_ps` [R, 1] or None where none cuts, `numbers` [R]
    uniforms, `greedy` [R] flags or None where no row is greedy. The nucleus reads its tokens in another order, so
    rows that do not cut never go through it, whatever the others do.
    """
    scaled = logits / temperatures
    probabilities = scaled.softmax(-1)
    thresholds = torch.from_numpy(numbers)[:, None]
    tokens = _inverse_cdf(probabilities, thresholds)
    if top_ps is not None:
        tokens = torch.where(top_ps < 1, _nucleus(probabilities, top_ps, thresholds), tokens)
    if greedy is not None:
        tokens = torch.where(greedy[:, None], logits.argmax(-1, keepdim=True), tokens)
    logprobs = scaled.log_softmax(-1).gather(1, tokens)
    return tokens[:, 0].numpy(), logprobs[:, 0].numpy()


def _inverse_cdf(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """[R, 1] first index whose cumulated probability exceeds the number; float64, for large vocabularies."""
    cumulated = probabilities.cumsum(-1, dtype=torch.float64)
    tokens: Tensor = torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True)
    return tokens.clamp_(max=probabilities.shape[1] - 1)


def _nucleus(probabilities: Tensor, top_ps: Tensor, numbers: Tensor) -> Tensor:
    """Inverse CDF over the fewest most likely tokens whose probabilities reach `top_ps` [R, 1]."""
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    kept = ordered.masked_fill(before >= top_ps, 0.0)
    return ids.gather(1, _inverse_cdf(kept, numbers))
