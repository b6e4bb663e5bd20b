import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_fapo.observe.glossary import METRICS, glossary, metric
from megatron_fapo.observe.metrics import declared, evaluation_metrics, step_metrics, without_time
from megatron_fapo.records import (
    Evaluation,
    Group,
    Judged,
    NotJudged,
    Outcome,
    Prompt,
    Rollout,
    StepReport,
    UpdateReport,
    Verdict,
    VersionSpan,
    WeightVersion,
    floats,
    ints,
)
from megatron_fapo.trace import Span, Spans
from tests.builders import make_group
from tests.observe.synthetic import HandClock

WEIGHTS = WeightVersion(step=5, checksum="c", tensors=1, nbytes=4)


def update(**changes) -> UpdateReport:
    plain = UpdateReport(
        loss=1.0, grad_norm=2.0, learning_rate=1e-3, clipped_share=0.1, kl_behaviour=0.2, entropy=0.7, loss_tokens=30,
        tokens=80, padded_tokens=100,
    )  # fmt: skip
    return replace(plain, **changes)


def report(*updates: UpdateReport) -> StepReport:
    return StepReport(
        step=5, updates=updates or (update(),), mismatch_mean=1e-6, mismatch_max=1e-5, rescored=True, seconds=4.0
    )


def judged(name: str, *, right=True, oracle=None, verdict=None, length=4, finish="stop", version=5) -> Judged:
    rollout = Rollout(
        id=name, prompt_id="p", token_ids=ints(range(length)), logprobs=floats([0.0] * length), temperature=1.0, seed=1,
        versions=(VersionSpan(start=0, version=version),), text=name, finish_reason=finish,
    )  # fmt: skip
    outcome = Outcome(right=right, score=1.0 if right else -1.0, answer="1", why="")
    return Judged(rollout=rollout, outcome=outcome, verdict=verdict or NotJudged(reason="wrong"), oracle=oracle)


def verdict(first_wrong: int, tokens: int = 10) -> Verdict:
    return Verdict(first_wrong=first_wrong, p_flawed=float(first_wrong != -1), votes=1, tokens=tokens, text="")


def group(*members: Judged) -> Group:
    prompt = Prompt(id="p", task="t", question="q", messages=(), token_ids=ints([1]), reference_answer="1")
    return Group(step=5, prompt=prompt, judged=members)


def metrics_of(*groups: Group, rewards=None, updates=(), spans=None) -> dict[str, float]:
    rewards = [floats([1.0, -1.0])] if rewards is None else rewards
    spans = spans or Spans(HandClock())
    return step_metrics(groups=groups, rewards=rewards, report=report(*updates), weights=WEIGHTS, spans=spans)


SHARED = verdict(2)
MIXED = group(
    judged("clean", oracle=-1, verdict=verdict(-1)),
    judged("false alarm", oracle=-1, verdict=verdict(0)),
    judged("caught", oracle=2, verdict=SHARED, length=8),
    judged("caught again", oracle=2, verdict=SHARED),
    judged("caught elsewhere", oracle=3, verdict=verdict(1)),
    judged("missed", oracle=1, verdict=verdict(-1)),
    judged("failed", oracle=1, verdict=NotJudged(reason="failed", why="timeout", tokens=7)),
    judged("wrong", right=False, finish="length", version=3),
)
LONELY = group(
    judged("skipped", oracle=0, verdict=NotJudged(reason="skipped", probe=verdict(0, tokens=5), tokens=5)),
    *[judged(f"wrong {i}", right=False) for i in range(7)],
)


def test_flawed_shares_are_of_right_answers_and_of_verdicts():
    found = metrics_of(MIXED, LONELY)
    assert found["rollout/right_share"] == 8 / 16
    assert found["flawed/oracle"] == 6 / 8  # all right answers have an oracle, judged or not
    assert found["flawed/judge"] == 4 / 6
    assert found["flawed/unjudged_share"] == 2 / 8  # one failed, one skipped
    assert found["flawed/probes"] == 1.0


def test_what_the_judge_did_is_counted_once_a_solution():
    found = metrics_of(MIXED, LONELY)
    assert found["judge/asked"] == 6  # five verdicts, one of them for two rollouts, and a failed one
    assert found["judge/judged"] == 6
    assert found["judge/failed"] == 1
    assert found["judge/skipped"] == 1
    assert found["judge/probes"] == 1
    assert found["judge/parsed_share"] == 5 / 6
    assert found["judge/tokens"] == 5 * 10 + 7 + 5


def test_the_judge_against_the_oracle():
    found = metrics_of(MIXED)
    precision, recall = 3 / 4, 3 / 4
    assert found["judge/precision"] == precision
    assert found["judge/recall"] == recall
    assert found["judge/f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["judge/same_step_share"] == 2 / 3


def test_composition_of_groups():
    found = metrics_of(MIXED, LONELY)
    assert found["group/three_class_share_oracle"] == 0.5
    assert found["group/two_class_share_oracle"] == 0.5
    assert found["group/three_class_share_judge"] == 0.5
    assert found["group/alpha_oracle"] == pytest.approx((2 / 8 + 0 / 8) / 2)
    assert found["group/gamma_oracle"] == pytest.approx((5 / 8 + 1 / 8) / 2)
    assert found["group/beta_oracle"] == pytest.approx((1 / 8 + 7 / 8) / 2)
    assert found["group/rho_oracle"] == pytest.approx((2 / 1 + 0 / 7) / 2)
    assert found["group/gamma_judge"] == pytest.approx((4 / 8 + 0) / 2)
    for by in ("oracle", "judge"):
        assert sum(found[f"group/{greek}_{by}"] for greek in ("alpha", "beta", "gamma")) == pytest.approx(1.0)
        assert sum(found[f"group/{n}_class_share_{by}"] for n in ("one", "two", "three")) == pytest.approx(1.0)


def test_lengths_lag_and_truncation():
    found = metrics_of(MIXED)
    assert found["rollout/length_mean"] == (7 * 4 + 8) / 8
    assert found["rollout/length_max"] == 8
    assert found["rollout/truncated_share"] == 1 / 8
    assert found["rollout/lag_max"] == 2


def test_reward_and_update():
    found = metrics_of(
        MIXED,
        LONELY,
        rewards=[floats([1.0, 0.0, -1.0, -1.0])],
        updates=(update(), update(loss=2.0, grad_norm=6.0, learning_rate=2e-3, tokens=40)),
    )
    assert found["reward/mean"] == -0.25
    assert found["reward/std"] == pytest.approx(np.std([1, 0, -1, -1]))
    assert found["group/dropped"] == 1
    assert found["train/loss"] == 1.5
    assert (found["train/grad_norm_mean"], found["train/grad_norm_max"]) == (4.0, 6.0)
    assert found["train/learning_rate"] == 2e-3
    assert found["train/entropy"] == pytest.approx(0.7)
    assert found["train/loss_tokens"] == 60
    assert found["train/padding_share"] == pytest.approx(1 - 120 / 200)
    assert found["train/rescored"] == 1.0


def test_what_a_step_does_not_define_is_left_out():
    found = metrics_of(group(judged("a", right=False), judged("b", right=False)))
    for name in ("flawed/oracle", "flawed/judge", "flawed/unjudged_share", "judge/f1", "group/alpha_oracle"):
        assert name not in found
    assert found["judge/judged"] == 0.0
    assert all(math.isfinite(value) for value in found.values())


def test_without_a_judge_there_are_no_judge_metrics():
    found = metrics_of(group(judged("a", oracle=-1, verdict=NotJudged(reason="off")), judged("b", right=False)))
    assert not [name for name in found if name.startswith("judge/") or name.endswith("_judge")]
    assert found["flawed/oracle"] == 0.0
    assert found["flawed/unjudged_share"] == 1.0


def test_time_by_phase():
    spans = Spans(HandClock())
    spans.ended += [
        Span(name="publish", start=0.0, end=1.0),
        Span(name="generate", start=1.0, end=5.0),
        Span(name="judge", start=2.0, end=4.0),
        Span(name="judge", start=3.0, end=5.0),
        Span(name="judge_exposed", start=4.5, end=5.0),
        Span(name="update", start=5.0, end=9.0),
        Span(name="step", start=0.0, end=10.0),
    ]
    found = metrics_of(MIXED, spans=spans)
    assert found["time/judge"] == 3.0  # overlapping verdicts count once
    assert found["time/judge_hidden"] == 2.5
    assert found["time/judge_exposed"] == 0.5
    assert found["time/other"] == 1.0
    assert found["time/generate_rate"] == 36 / 4.0
    assert found["time/step_rate"] == 36 / 10.0
    assert found["time/update_rate"] == 80 / 4.0
    assert "time/evaluate" not in found
    assert without_time(found) == without_time(metrics_of(MIXED))


def test_evaluation_without_judge_and_oracle_leaves_them_out():
    evaluation = Evaluation(
        prompts=4, samples=2, right_share=0.5, pass_at={1: 0.5, 2: 0.75}, sound_share_judge=None,
        verified_pass_at_judge=None, unjudged_share=None, sound_share_oracle=0.25, verified_pass_at_oracle={2: 0.5},
    )  # fmt: skip
    assert evaluation_metrics(evaluation) == {
        "eval/prompts": 4.0,
        "eval/right_share": 0.5,
        "eval/sound_share_oracle": 0.25,
        "eval/pass_at/1": 0.5,
        "eval/pass_at/2": 0.75,
        "eval/verified_pass_at_oracle/2": 0.5,
    }


def test_an_undeclared_name_is_an_error_and_an_infinity_is_said_aloud(caplog):
    with pytest.raises(KeyError, match="reward/meen"):
        declared({"reward/meen": 1.0})
    with caplog.at_level(logging.WARNING):
        assert declared({"train/loss": math.inf, "train/kl": math.nan, "reward/mean": 1.0}) == {"reward/mean": 1.0}
    assert "train/loss is inf" in caplog.text


def test_names_are_declared_once_and_the_page_is_true():
    names = [m.name for m in METRICS]
    assert len(set(names)) == len(names)
    assert metric("eval/pass_at/8").name == "eval/pass_at/{k}"
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text() == glossary(), "run `make docs`"


def test_groups_of_other_builders_work_too():
    assert metrics_of(make_group(["clean", "flawed", "wrong", "failed"]))["judge/failed"] == 1.0
