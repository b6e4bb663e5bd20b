"""The engine's parts, alone: random numbers, sampling, packing of rows, and the models against Hugging Face."""

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.serving.engine.batch import Batch
from megatron_fapo.serving.engine.decoder import Decoder, Shape, supports
from megatron_fapo.serving.engine.folder import read_config
from megatron_fapo.serving.engine.hugging_face import HuggingFaceModel
from megatron_fapo.serving.engine.sample import Options, Sample
from megatron_fapo.serving.engine.sampling import draw, uniforms
from megatron_fapo.serving.engine.weights import Weights
from tests.serving.worlds import Reference, make_model

KINDS = ["qwen3", "qwen2", "llama", "llama3-rope", "gpt2"]


@pytest.fixture(scope="module", params=KINDS)
def model_and_reference(request, tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp(request.param), request.param, seed=7)
    config = read_config(folder)
    assert supports(config) == (request.param in ("qwen3", "qwen2", "llama"))
    if supports(config):
        model = Decoder(Shape.read(config), torch.float32, 256)
    else:
        model = HuggingFaceModel(folder, config, torch.float32, 256)
    Weights(model).load(folder)
    return model, Reference(folder)


def sample(prompt, seed=0, place=0, **options):
    return Sample(
        id=f"s{place}",
        index=place,
        prompt=np.array(prompt, np.int64),
        options=Options(**{"max_new_tokens": 20, **options}),
        seed=seed,
        stream=False,
        inbox=asyncio.Queue(),
    )


def run(batch, waves):
    """Add a wave of samples every few steps, run to the end: {id: answer}."""
    done = []
    for wave in waves:
        by_length = {}
        for s in wave:
            by_length.setdefault(len(s.context), []).append(s)
        for samples in by_length.values():
            done += batch.add(samples, 0)
        for _ in range(3):
            done += batch.step(0) if len(batch) else []
    while len(batch):
        done += batch.step(0)
    return {answer.sample.id: answer for answer in done}


def test_every_architecture_gives_the_logprobs_of_hugging_face(model_and_reference):
    model, reference = model_and_reference
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, 64, size) for size in (4, 9, 4, 1, 17)]
    waves = [
        [sample(p, seed=i, place=10 * w + i, max_new_tokens=5 + 7 * i) for i, p in enumerate(prompts)] for w in range(3)
    ]
    answers = run(Batch(model, 16, 1), waves)
    assert len(answers) == 15
    for answer in answers.values():
        prompt, tokens = answer.sample.prompt.tolist(), answer.tokens.tolist()
        np.testing.assert_allclose(answer.logprobs, reference.logprobs(prompt, tokens), atol=1e-5)


def test_parameters_are_those_of_hugging_face_and_what_is_computed_with(model_and_reference):
    model, reference = model_and_reference
    theirs = reference.tensors()
    assert model.parameters.keys() == theirs.keys()
    for name, tensor in model.parameters.items():
        assert torch.equal(tensor, theirs[name]), name


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30), st.integers(0, 5)), min_size=1, max_size=20))
def test_packing_of_rows_changes_no_answer(tmp_path_factory, shapes):
    """Samples that come and go in any pattern are drawn as each would be alone."""
    model = packing_model(tmp_path_factory)
    rng = np.random.default_rng(0)
    waves = [[] for _ in range(6)]
    for place, (length, new, wave) in enumerate(shapes):
        waves[wave].append(sample(rng.integers(2, 64, length), seed=place, place=place, max_new_tokens=new))
    together = run(Batch(model, 20, 1), waves)
    assert len(together) == len(shapes)
    for answer in together.values():
        (alone,) = run(Batch(model, 20, 1), [[answer.sample]]).values()
        assert alone.tokens.tolist() == answer.tokens.tolist()
        np.testing.assert_allclose(alone.logprobs, answer.logprobs, atol=1e-5)


_cached = []


def packing_model(tmp_path_factory):
    if not _cached:
        folder = make_model(tmp_path_factory.mktemp("packing"))
        model = Decoder(Shape.read(read_config(folder)), torch.float32, 64)
        Weights(model).load(folder)
        _cached.append(model)
    return _cached[0]


def test_random_numbers_depend_on_seed_and_step_alone_and_are_uniform():
    seeds, steps = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300, dtype=np.uint64), indexing="ij")
    numbers = uniforms(seeds.ravel(), steps.ravel())
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(np.unique(numbers)) == len(numbers)
    assert uniforms(seeds[7, :1], steps[0, 9:10])[0] == numbers.reshape(300, 300)[7, 9]
    counts = np.histogram(numbers, 100, (0, 1))[0]
    assert ((counts - 900) ** 2 / 900).sum() < 99 + 4 * np.sqrt(198)
    grid = numbers.reshape(300, 300) - 0.5
    for other in (np.roll(grid, 1, 0), np.roll(grid, 1, 1), np.roll(grid, (1, -1), (0, 1))):
        assert abs((grid * other).mean() * 12) < 4 / 300


def test_a_draw_inverts_the_cumulated_distribution():
    probabilities = torch.tensor([[0.1, 0.2, 0.0, 0.3, 0.4]])
    for number, token in ((0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 3), (0.6001, 4), (0.9999, 4)):
        tokens, logprobs = draw(probabilities.log(), torch.ones(1, 1), None, np.array([number]), None)
        assert tokens.tolist() == [token]
        np.testing.assert_allclose(np.exp(logprobs), probabilities[0, token], rtol=1e-5)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {4}), (0.5, {3, 4}), (0.75, {1, 3, 4}), (1.0, {0, 1, 3, 4})])
def test_top_p_keeps_the_fewest_likely_tokens_that_reach_it(top_p, kept):
    logits = torch.tensor([[0.1, 0.2, 0.0, 0.3, 0.4]]).log().repeat(500, 1)
    numbers = np.linspace(0, 0.9999, 500)
    tops = torch.full((500, 1), top_p)
    tokens, logprobs = draw(logits, torch.ones(500, 1), tops, numbers, None)
    assert set(tokens.tolist()) == kept
    np.testing.assert_allclose(logprobs, logits[0, torch.from_numpy(tokens)], rtol=1e-5)  # before top-p cuts


def test_a_row_is_drawn_alike_whatever_the_others_ask_for():
    """Plain, cut, tempered and greedy rows, drawn together and each alone: the same tokens and bytes."""
    rows = 256
    logits = torch.randn(rows, 40, generator=torch.Generator().manual_seed(1)) * 2
    temperatures = torch.tensor([[1.0], [0.5], [1.7]]).repeat(rows, 1)[:rows]
    top_ps = torch.tensor([[1.0], [0.7], [1.0], [0.95]]).repeat(rows, 1)[:rows]
    greedy, numbers = torch.arange(rows) % 5 == 0, uniforms(np.arange(rows, dtype=np.uint64), np.zeros(rows, np.uint64))
    tokens, logprobs = draw(logits, temperatures, top_ps, numbers, greedy)
    for row in range(rows):
        one = slice(row, row + 1)
        cut = top_ps[one] if top_ps[row] < 1 else None
        alone = draw(logits[one], temperatures[one], cut, numbers[one], greedy[one] if greedy[row] else None)
        assert (alone[0][0], alone[1][0]) == (tokens[row], logprobs[row])


def test_rows_that_were_freed_cost_nothing_and_ask_for_nothing(tmp_path_factory, monkeypatch):
    """Padded rows of a deterministic engine are computed: none of them may send the batch through the nucleus."""
    from megatron_fapo.serving.engine import batch as batch_module

    asked = []

    def seen(logits, temperatures, top_ps, numbers, greedy):
        asked.append((temperatures.unique().tolist(), top_ps, greedy))
        return draw(logits, temperatures, top_ps, numbers, greedy)

    monkeypatch.setattr(batch_module, "draw", seen)
    batch = Batch(packing_model(tmp_path_factory), 16, 16)
    options = ({"temperature": 1.7, "top_p": 0.5}, {"temperature": 0.0}, {"temperature": 0.3, "top_p": 0.9})
    run(batch, [[sample([5, 6], seed=i, place=i, max_new_tokens=4 + i, **options[i % 3]) for i in range(12)]])
    asked.clear()
    run(batch, [[sample([5, 6, 7], seed=1, max_new_tokens=9)]])
    assert asked == [([1.0], None, None)] * 9


def test_a_model_that_attends_to_a_window_is_refused_beyond_it(tmp_path):
    from megatron_fapo.errors import ConfigError

    folder = make_model(tmp_path, "llama3-rope")
    with pytest.raises(ConfigError, match="attends to 32 positions"):
        HuggingFaceModel(folder, {**read_config(folder), "sliding_window": 32}, torch.float32, 64)
