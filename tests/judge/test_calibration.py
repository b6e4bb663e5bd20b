"""Thresholds keep what they promise, and the savings are counted rightly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.judge.audit import wilson
from megatron_fapo.judge.calibration import Scored, outcome, thresholds
from megatron_fapo.judge.settings import CascadeSettings

cases = st.lists(
    st.builds(Scored, p_flawed=st.floats(0, 1), flawed=st.booleans(), flagged=st.booleans(), tokens=st.just(20)),
    max_size=150,
)


@given(cases, st.floats(0.01, 0.5))
def test_each_side_errs_less_than_allowed_even_at_the_end_of_its_interval(found, max_error):
    chosen = thresholds(found, max_error)
    flawed = [case for case in found if case.flawed]
    clean = [case for case in found if not case.flawed]
    lost = sum(case.p_flawed < chosen.clean_below for case in flawed)
    false = sum(chosen.flawed_above is not None and case.p_flawed > chosen.flawed_above for case in clean)
    assert not lost or wilson(lost, len(flawed)).high <= max_error
    assert not false or wilson(false, len(clean)).high <= max_error


def test_too_few_cases_choose_nothing_and_many_separable_ones_end_all():
    few = [Scored(p_flawed=0.1, flawed=False, flagged=False, tokens=20)] * 5
    assert thresholds(few, 0.05) == CascadeSettings(clean_below=0.0, max_error=0.05)
    clean = [Scored(p_flawed=0.1, flawed=False, flagged=False, tokens=20)] * 200
    flawed = [Scored(p_flawed=0.9, flawed=True, flagged=True, tokens=20)] * 200
    chosen = thresholds(clean + flawed, 0.05)
    assert outcome(clean + flawed, chosen).long_verdicts == 0
    assert outcome(clean + flawed, chosen).f1 == 1.0


def test_calls_tokens_and_quality_by_hand():
    found = [
        Scored(p_flawed=0.01, flawed=True, flagged=True, tokens=30),  # ended as clean: lost
        Scored(p_flawed=0.5, flawed=True, flagged=True, tokens=20),
        Scored(p_flawed=0.5, flawed=False, flagged=None, tokens=10),  # failed: no flag
        Scored(p_flawed=0.99, flawed=False, flagged=False, tokens=40),  # ended as flawed: a false flag
    ]
    long, short = outcome(found, None), outcome(found, CascadeSettings(clean_below=0.1, flawed_above=0.9))
    assert (long.long_verdicts, long.tokens, long.f1) == (4, 100, 1.0)
    assert (short.long_verdicts, short.tokens) == (2, 4 + 30)
    assert (short.precision, short.recall, short.f1) == pytest.approx((0.5, 0.5, 0.5))
