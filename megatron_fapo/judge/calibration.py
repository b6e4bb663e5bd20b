"""The cascade's thresholds from measured errors, and what it would have saved."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fapo.judge.audit import Counts, wilson
from megatron_fapo.judge.settings import CascadeSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A right solution with all that is known about it."""

    p_flawed: float
    """By the prefill alone."""
    flawed: bool
    """In truth."""
    flagged: bool | None
    """By the long verdict; None when it failed."""
    tokens: int
    """Of the long verdict."""


def thresholds(cases: Sequence[Scored], max_error: float) -> CascadeSettings:
    """The widest thresholds whose errors are below `max_error` even at the upper end of their 95 % interval.

    Below `clean_below` lie at most that share of the flawed solutions, above `flawed_above` of the clean ones. Where
    nothing satisfies that, `clean_below` is 0 and `flawed_above` null: the cascade then ends no case.
    """
    flawed = sorted(case.p_flawed for case in cases if case.flawed)
    clean = sorted((case.p_flawed for case in cases if not case.flawed), reverse=True)
    lost = _most_allowed(len(flawed), max_error)
    false = _most_allowed(len(clean), max_error)
    below = 0.0 if lost is None else flawed[lost] if lost < len(flawed) else 1.0
    above = None if false is None else clean[false] if false < len(clean) else 0.0
    if above is not None and above < below:  # the two would overlap: each keeps to its side of the middle
        below = above = (above + below) / 2
    return CascadeSettings(clean_below=below, flawed_above=above, max_error=max_error)


def _most_allowed(trials: int, max_error: float) -> int | None:
    """The most errors of `trials` whose interval still ends below `max_error`; None when even none is too many."""
    allowed = [errors for errors in range(trials + 1) if wilson(errors, trials).high <= max_error]
    return max(allowed) if allowed and trials else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a way of judging does."""

    long_verdicts: int
    tokens: int
    """A prefill counts as one."""
    precision: float
    recall: float
    f1: float


def outcome(cases: Sequence[Scored], cascade: CascadeSettings | None) -> Outcome:
    """Calls, tokens and quality with a cascade, or without one; a failed long verdict flags nothing."""
    pairs, long, tokens = [], 0, 0
    for case in cases:
        short = None
        if cascade is not None:
            tokens += 1
            if case.p_flawed < cascade.clean_below:
                short = False
            elif cascade.flawed_above is not None and case.p_flawed > cascade.flawed_above:
                short = True
        if short is None:
            long, tokens = long + 1, tokens + case.tokens
        pairs.append((bool(case.flagged) if short is None else short, case.flawed))
    counts = Counts.of(pairs)
    flags = counts.tp + counts.fp
    return Outcome(
        long_verdicts=long,
        tokens=tokens,
        precision=counts.tp / flags if flags else 0.0,
        recall=counts.tp / counts.flawed if counts.flawed else 0.0,
        f1=2 * counts.tp / (flags + counts.flawed) if flags + counts.flawed else 0.0,
    )
