"""What samples of held-out prompts say: avg@k, maj@k, pass@k and verified pass@k, each with its 95 % interval.

Pure arithmetic over `Sample`s. Every score is a mean over prompts of a number in [0, 1], unbiased for k below the
number of samples; prompts are what was drawn at random, so they are what the intervals count.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_fapo.judge.audit import wilson
from megatron_fapo.records import Evaluation, Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer to a prompt, as far as the scores need it."""

    right: bool
    answer: str | None
    """What was read as the answer; None does not vote."""
    clean: bool | None = None
    """Whether the judge found nothing; None without a verdict that counts."""
    sound: bool | None = None
    """Whether the task's oracle found nothing; None where there is none, and for wrong answers."""


Samples = Sequence[Sample]
One = TypeVar("One")


def summarise(prompts: Sequence[Samples], judge: bool) -> Evaluation:
    """The scores of prompts with equally many samples each; `judge` says whether verdicts were asked at all."""
    right = [[one.right for one in samples] for samples in prompts]
    by_judge = [[one.right and one.clean is True for one in samples] for samples in prompts]
    by_oracle = [[one.right and one.sound is True for one in samples] for samples in prompts]
    oracle = any(one.sound is not None for samples in prompts for one in samples)
    found = [one for samples in prompts for one in samples if one.right]
    unjudged = sum(one.clean is None for one in found) / len(found) if found else 0.0
    avg, pass_at = _average(right), _by_k(right, pass_at_k)
    maj_at = _by_k(prompts, majority_at_k)
    sound_judge, sound_oracle = _average(by_judge), _average(by_oracle)
    verified_judge, verified_oracle = (_by_k(kind, pass_at_k) for kind in (by_judge, by_oracle))
    intervals = {"right_share": avg, **_named("pass_at", pass_at), **_named("maj_at", maj_at)}
    if judge:
        intervals |= {"sound_share_judge": sound_judge, **_named("verified_pass_at_judge", verified_judge)}
    if oracle:
        intervals |= {"sound_share_oracle": sound_oracle, **_named("verified_pass_at_oracle", verified_oracle)}
    return Evaluation(
        prompts=len(prompts),
        samples=len(prompts[0]),
        right_share=avg.value,
        pass_at=_values(pass_at),
        maj_at=_values(maj_at),
        sound_share_judge=sound_judge.value if judge else None,
        verified_pass_at_judge=_values(verified_judge) if judge else None,
        unjudged_share=unjudged if judge else None,
        sound_share_oracle=sound_oracle.value if oracle else None,
        verified_pass_at_oracle=_values(verified_oracle) if oracle else None,
        intervals=intervals,
    )


def pass_at_k(samples: Sequence[bool], k: int) -> float:
    """The chance that k of the samples, drawn without replacement, hold a success: 1 - C(n - c, k) / C(n, k).

    Unbiased for the chance of a success among k fresh samples (arXiv:2107.03374, Eq. 1).
    """
    n, successes = len(samples), sum(samples)
    return 1.0 - math.comb(n - successes, k) / math.comb(n, k)


def majority_at_k(samples: Samples, k: int) -> float:
    """The chance that the most frequent answer among k of the samples, drawn without replacement, is right.

    Answers that are right are one and the same (each equals the reference), wrong ones are told apart by their text; a
    tie is broken by an even draw, and who gave no answer does not vote. Exact: for each number r of right votes the
    subsets are counted in which no wrong answer has more, by how many of them tie.
    """
    right = sum(one.right for one in samples)
    wrong = Counter(one.answer for one in samples if not one.right and one.answer is not None)
    silent = len(samples) - right - wrong.total()
    won = 0.0
    for r in range(1, min(right, k) + 1):
        ways = {(0, 0): math.comb(right, r)}  # {(votes given to others, answers that tie): subsets}
        for size, limit, ties in [*((count, r, True) for count in wrong.values()), (silent, k, False)]:
            ways = _widened(ways, size, min(limit, size), k - r, r if ties else None)
        won += sum(count / (tied + 1) for (others, tied), count in ways.items() if others == k - r)
    return won / math.comb(len(samples), k)


def _widened(
    ways: dict[tuple[int, int], int], size: int, most: int, room: int, tie: int | None
) -> dict[tuple[int, int], int]:
    """`ways` after choosing up to `most` of `size` further samples; `tie` of them make one more answer tie."""
    found: dict[tuple[int, int], int] = {}
    for (others, tied), count in ways.items():
        for votes in range(min(most, room - others) + 1):
            key = (others + votes, tied + (votes == tie))
            found[key] = found.get(key, 0) + count * math.comb(size, votes)
    return found


def mean_interval(values: Sequence[float], draws: int) -> Interval:
    """The mean of prompts' scores in [0, 1] with its 95 % interval; each score rests on `draws` independent samples.

    Wilson's interval for the effective number of trials, p (1 - p) over the variance of the mean: between the number
    of prompts (the samples of a prompt say all the same) and that of all draws (they are independent). Where no
    variance shows, the number of prompts. Source: Franco, Little, Louis, Slud, "Comparative study of confidence
    intervals for proportions in complex sample surveys" (J. Survey Stat. Methodol. 7, 2019).
    """
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.fsum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else 0.0
    trials = min(max(mean * (1 - mean) * n / spread, n), n * draws) if spread > 0 else n
    interval = wilson(mean * trials, trials)
    return Interval(value=mean, low=interval.low, high=interval.high)


def _average(kinds: Sequence[Sequence[bool]]) -> Interval:
    return mean_interval([sum(samples) / len(samples) for samples in kinds], draws=len(kinds[0]))


def _by_k(prompts: Sequence[Sequence[One]], score: Callable[[Sequence[One], int], float]) -> dict[int, Interval]:
    """{k: interval} for the powers of two below the number of samples, and that number."""
    samples = len(prompts[0])
    powers = [2**power for power in range(samples.bit_length()) if 2**power < samples]
    return {k: mean_interval([score(group, k) for group in prompts], draws=samples // k) for k in [*powers, samples]}


def _named(name: str, by_k: dict[int, Interval]) -> dict[str, Interval]:
    return {f"{name}/{k}": interval for k, interval in by_k.items()}


def _values(by_k: dict[int, Interval]) -> dict[int, float]:
    return {k: interval.value for k, interval in by_k.items()}
