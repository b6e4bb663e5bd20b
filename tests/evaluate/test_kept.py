"""Samples on disk: what was kept counts, what was cut off is drawn again, and another evaluation is refused."""

from random import Random

import pytest

from megatron_fapo.errors import DataError, ResumeError, TaskError
from megatron_fapo.evaluate.held_out import evaluate, evaluate_kept
from megatron_fapo.evaluate.kept import Kept, samples_of
from megatron_fapo.evaluate.scores import summarise
from tests.observe.synthetic import make_groups
from tests.rollout.test_sampler import Echo, clean, sampler_of
from tests.virtual_time import ModelledServer, run_virtual

IDENTITY = {"on": "held-out", "samples": 8, "policy": {"model": "m"}}


@pytest.fixture
def groups():
    return make_groups("fapo", 0, 0.5, Random(1))


def kept(path, groups=()):
    opened = Kept(path, IDENTITY, judge=True)
    for group in groups:
        opened.write(group)
    opened.close()
    return opened


def test_what_is_read_back_scores_the_same(tmp_path, groups):
    kept(tmp_path / "deep" / "samples.jsonl", groups[:5])
    again = kept(tmp_path / "deep" / "samples.jsonl", groups[5:])
    assert len(again) == len(groups)
    read = kept(tmp_path / "deep" / "samples.jsonl")
    straight = summarise([samples_of(group) for group in groups], judge=True)
    assert summarise([read.samples(group.prompt.id) for group in groups], judge=True) == straight
    assert 0 < straight.sound_share_oracle < straight.right_share


def test_a_half_last_line_is_drawn_again_and_a_damaged_one_is_named(tmp_path, groups):
    path = tmp_path / "samples.jsonl"
    kept(path, groups[:3])
    whole = path.read_text()
    path.write_text(whole[:-20])
    again = kept(path)
    assert [group.prompt.id in again for group in groups[:3]] == [True, True, False]
    assert kept(path, [groups[2]]).samples(groups[2].prompt.id) == samples_of(groups[2])
    assert path.read_text() == whole
    lines = whole.splitlines()
    path.write_text("\n".join([lines[0], "{", *lines[2:], ""]))
    with pytest.raises(DataError, match="line 2 is damaged"):
        kept(path)


def test_another_evaluation_is_refused_with_what_differs(tmp_path):
    kept(tmp_path / "samples.jsonl")
    with pytest.raises(ResumeError, match="samples was 8, is 4"):
        Kept(tmp_path / "samples.jsonl", {**IDENTITY, "samples": 4}, judge=True)
    with pytest.raises(ResumeError, match=r"another --out folder: policy\.model was m, is mine"):
        Kept(tmp_path / "samples.jsonl", {**IDENTITY, "policy": {"model": "mine"}}, judge=True)


def test_an_evaluation_that_was_cut_off_draws_only_what_is_missing(tmp_path):
    """Prompt p2's server dies; taken up again, only p2 is asked, and the scores are those of one that never broke."""
    prompts = [Echo().prompt(index) for index in range(4)]
    asked: list[str] = []

    def answers(request, index):
        asked.append(request.ids[index])
        broken = "p2" in request.ids[index] and len(asked) <= 8
        return ("!" if broken else "x" if index == 1 else "right"), 9.0 if broken else 1.0

    def run(path):
        policy, judge = ModelledServer(answers), ModelledServer(clean)
        samples = kept(path)
        opened = Kept(path, IDENTITY, judge=True)
        try:
            return run_virtual(evaluate_kept(sampler_of(policy, judge), prompts, opened)), len(samples)
        finally:
            opened.close()

    with pytest.raises(TaskError):
        run(tmp_path / "samples.jsonl")
    asked[:] = ["before"] * 9
    result, lay_there = run(tmp_path / "samples.jsonl")
    assert lay_there == 3
    assert asked[9:] == ["s0-p2-r0", "s0-p2-r1"]
    straight = run_virtual(evaluate(sampler_of(ModelledServer(answers), ModelledServer(clean)), prompts))
    assert result == straight
    assert (straight.right_share, straight.pass_at[2]) == (0.5, 1.0)
