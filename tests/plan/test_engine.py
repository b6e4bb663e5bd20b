"""The modelled engine against a loop that writes one token at a time."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.plan.engine import Engine, Sample, drain
from megatron_fapo.plan.times import Rates

RATES = Rates(fixed=0.1, weights=1.0, token=0.001, sample=0.05, prefill_token=0.0, prefill_square=0.0)
ROOM = 10**9


def token_by_token(lengths: list[int], prompt: int, rates: Rates) -> dict[str, float]:
    """When each ends, if all start together; memory of a step is that of its first half of a token on."""
    now, ended, running = 0.0, {}, dict(enumerate(lengths))
    written = 0
    while running:
        context = len(running) * (prompt + written + 0.5)
        memory = rates.weights + rates.token * context
        now += rates.fixed + max(memory, rates.sample * len(running))
        written += 1
        for index in [i for i, length in running.items() if length == written]:
            ended[str(index)] = now
            del running[index]
    return ended


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30),
    prompt=st.integers(0, 50),
    sample=st.sampled_from([0.0, 0.03, 0.1, 3.0]),
)
def test_responses_end_when_a_loop_over_tokens_says(lengths: list[int], prompt: int, sample: float) -> None:
    rates = replace(RATES, sample=sample)
    engine = Engine(rates, ROOM, max_running=10**6)
    for index, length in enumerate(lengths):
        engine.add(Sample(str(index), prompt, length, prompt))
    _, ended = drain(engine)
    expected = token_by_token(lengths, prompt, rates)
    assert ended.keys() == expected.keys()
    # where arithmetic becomes memory's within a token, the closed form changes over within it
    for name, when in ended.items():
        assert when == pytest.approx(expected[name], rel=2e-3, abs=0.01)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=20),
    pieces=st.lists(st.floats(0.01, 20.0), min_size=1, max_size=40),
)
def test_time_in_pieces_is_the_same_time(lengths: list[int], pieces: list[float]) -> None:
    """Whoever looks at a server in between does not change it: `_steps_within` inverts `_seconds`."""
    whole, cut = (Engine(replace(RATES, sample=0.2), ROOM, 10**6) for _ in range(2))
    for index, length in enumerate(lengths):
        for engine in (whole, cut):
            engine.add(Sample(str(index), 10, length, 10))
    seconds, _ = drain(whole)
    now = 0.0
    for piece in pieces:
        wait = cut.until_event()
        if wait is None:
            break
        cut.advance(min(piece, wait))
        now += min(piece, wait)
    rest, _ = drain(cut)
    assert now + rest == pytest.approx(seconds, rel=1e-6)
    assert cut.tokens == pytest.approx(sum(lengths))
    assert sum(cut.spent.values()) == pytest.approx(seconds, rel=1e-6)


def test_a_full_cache_sends_the_youngest_back_and_everything_is_written_once() -> None:
    engine = Engine(RATES, capacity=1000, max_running=100)
    for index in range(40):
        engine.add(Sample(str(index), 10, 200, 10))
    _, ended = drain(engine)
    assert len(ended) == 40
    assert engine.retracted > 0
    assert engine.tokens == pytest.approx(40 * 200)
    assert engine._context == pytest.approx(0, abs=1e-3)


def test_no_more_run_than_may_and_others_follow_in_their_order() -> None:
    engine = Engine(RATES, ROOM, max_running=2)
    for index in range(5):
        engine.add(Sample(str(index), 0, 10, 0))
    assert engine.running == 2
    _, ended = drain(engine)
    assert list(ended) == ["0", "1", "2", "3", "4"]
    assert ended["0"] == ended["1"] < ended["2"] == ended["3"] < ended["4"]


def test_prefill_comes_first_and_once_for_the_samples_of_a_prompt() -> None:
    rates = replace(RATES, prefill_token=0.5)
    engine = Engine(rates, ROOM, 10)
    engine.add(Sample("a", 100, 1, 100))
    engine.add(Sample("b", 100, 1, 0))
    seconds, _ = drain(engine)
    assert engine.spent["prefill"] == pytest.approx(50.0)
    assert seconds == pytest.approx(50.0 + 0.1 + 1.0 + 0.001 * 201, rel=1e-3)


def test_a_dropped_sample_frees_its_place() -> None:
    engine = Engine(RATES, ROOM, max_running=1)
    engine.add(Sample("a", 0, 1000, 0))
    engine.add(Sample("b", 0, 10, 0))
    engine.drop("a")
    _, ended = drain(engine)
    assert list(ended) == ["b"]
