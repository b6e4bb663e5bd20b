"""The judge against a reference: rates with intervals, what the reward makes of them, the alarm."""

import dataclasses
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.algorithm.rewards import Rates
from megatron_fapo.algorithm.settings import AlgorithmSettings
from megatron_fapo.errors import JudgeError
from megatron_fapo.judge.answerer import Served
from megatron_fapo.judge.ask import Asker
from megatron_fapo.judge.audit import Audit, Counts, difference, wilson
from megatron_fapo.judge.judge import Judge, Rules
from megatron_fapo.judge.settings import AuditSettings, CascadeSettings, JudgeSettings, RatesSettings
from megatron_fapo.observe.metrics import audit_metrics
from megatron_fapo.records import Group, Interval, RunState
from megatron_fapo.rollout.ahead import Ahead
from megatron_fapo.rollout.sampler import Sampler
from megatron_fapo.rollout.settings import RolloutSettings
from tests.builders import make_group
from tests.rollout.test_sampler import Echo
from tests.virtual_time import LoopClock, ModelledServer, Words, run_virtual


def audited(tp: int, fn: int, fp: int, tn: int) -> Group:
    """A group of right rollouts, each audited."""
    kinds = ["flawed"] * tp + ["clean"] * fn + ["flawed"] * fp + ["clean"] * tn
    labels = [1] * (tp + fn) + [-1] * (fp + tn)
    group = make_group(kinds)
    judged = (dataclasses.replace(one, audit=label) for one, label in zip(group, labels, strict=True))
    return dataclasses.replace(group, judged=tuple(judged))


def test_wilson_s_interval_as_published():
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20."""
    for hits, trials, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        found = wilson(hits, trials)
        assert (found.value, found.low, found.high) == pytest.approx((hits / trials, low, high), abs=1e-4)
    assert math.isnan(wilson(0, 0).value)


def test_the_interval_of_a_difference_as_published():
    """Newcombe 1998b, table II, method 10: 56/70 - 48/80 and 10/10 - 0/20."""
    for (a, m), (b, n), low, high in [((56, 70), (48, 80), 0.0524, 0.3339), ((10, 10), (0, 20), 0.6791, 1.0)]:
        found = difference(wilson(a, m), wilson(b, n))
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-3)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_rates_are_counted_from_what_both_said(tp, fn, fp, tn):
    audit = Audit(AuditSettings(enough=1), None)
    audit.note([audited(tp, fn, fp, tn)])
    found = audit.found
    assert found.audited == tp + fn + fp + tn
    if tp + fn:
        assert found.tpr.value == tp / (tp + fn)
    if fp + tn:
        assert found.fpr.value == fp / (fp + tn)
    if tp + fn and fp + tn:
        assert found.j.low <= found.j.value <= found.j.high


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = rng.binomial(40, 0.85, 2000), rng.binomial(60, 0.1, 2000)
    covered = 0
    for flawed, clean in zip(*hits, strict=True):
        found = difference(wilson(int(flawed), 40), wilson(int(clean), 60))
        covered += found.low <= 0.75 <= found.high
    assert 0.93 < covered / 2000 < 0.98


def test_the_window_forgets_and_the_state_goes_on_where_it_was():
    settings = AuditSettings(window=2, enough=1)
    audit = Audit(settings, None)
    for counts in [(0, 9, 9, 0), (5, 1, 0, 4), (3, 0, 1, 4)]:
        audit.note([audited(*counts)])
    assert audit.found.tpr.value == 8 / 9
    assert audit.rates == Rates(tpr=9 / 11, fpr=2 / 11)
    state = RunState(step=3, cursor=9).after(prompts=3, audit=audit.counts)
    state = RunState(**json.loads(json.dumps(asdict(state))))
    again = Audit(settings, None)
    again.restore(state.audit)
    assert again.counts == audit.counts
    assert again.rates == audit.rates
    assert state == RunState(step=4, cursor=12, audit=audit.counts)


def test_a_soft_penalty_is_corrected_by_the_mean_of_p_not_by_what_votes_decide():
    """Four votes of a judge with TPR .7 and FPR .2 decide with other rates, but p's means are .7 and .2."""
    rng = np.random.default_rng(0)
    labels = [1] * 4000 + [-1] * 4000
    flags = rng.binomial(4, [0.7 if label == 1 else 0.2 for label in labels])
    group = make_group(["flawed" if 2 * count >= 4 else "clean" for count in flags])
    judged = []
    for one, count, label in zip(group, flags, labels, strict=True):
        judged.append(
            dataclasses.replace(one, audit=label, verdict=dataclasses.replace(one.verdict, p_flawed=count / 4))
        )
    group = dataclasses.replace(group, judged=tuple(judged))
    hard, soft = Audit(AuditSettings(), None), Audit(AuditSettings(), None, soft=True)
    for audit in (hard, soft):
        audit.note([group])
    assert hard.rates.tpr == pytest.approx(0.916, abs=0.02)
    assert (soft.rates.tpr, soft.rates.fpr) == pytest.approx((0.7, 0.2), abs=0.02)
    assert hard.found == soft.found  # what is reported is how the verdicts do
    again = Audit(AuditSettings(), None, soft=True)
    again.restore(soft.counts)
    assert again.rates == soft.rates


def test_the_cascade_s_own_errors_are_measured_and_named_once_they_are_sure(caplog):
    """Of 40 flawed ones the cascade ended 12 as clean, of 60 clean ones 1 as flawed; others err at length."""

    def group(short_fn: int) -> Group:
        whole = audited(tp=20, fn=20, fp=3, tn=57)
        short = [*range(20, 20 + short_fn), 40]
        judged = [
            dataclasses.replace(one, verdict=dataclasses.replace(one.verdict, short=True)) if place in short else one
            for place, one in enumerate(whole)
        ]
        return dataclasses.replace(whole, judged=tuple(judged))

    audit = Audit(AuditSettings(window=1), None, cascade=CascadeSettings(clean_below=0.1, max_error=0.1))
    audit.note([group(4)])
    assert (audit.found.short.missed.value, audit.found.short.invented.value) == (4 / 40, 1 / 60)
    assert not audit.found.short.alarm
    assert not caplog.text
    audit.note([group(12)])
    assert audit.found.short.alarm
    assert "30.0% of the flawed solutions as clean" in caplog.text
    metrics = audit_metrics(audit.found)
    assert (metrics["audit/short_missed"], metrics["audit/short_alarm"]) == (0.3, 1.0)
    assert Audit(AuditSettings(), None).found.short is None


def test_too_few_leave_the_known_rates_in_place_and_measured_ones_replace_them():
    settings = JudgeSettings(rates=RatesSettings(tpr=0.9, fpr=0.1), audit=AuditSettings(enough=10))
    rules = Rules(judge=settings, algorithm=AlgorithmSettings(), group_size=8, max_tokens=100)
    judge = Judge(None, rules, LoopClock(), Audit(settings.audit, None))
    assert judge.rates == Rates(tpr=0.9, fpr=0.1)
    judge.audit.note([audited(9, 0, 0, 30)])
    assert judge.rates == Rates(tpr=0.9, fpr=0.1)
    judge.audit.note([audited(9, 0, 6, 0)])
    assert judge.rates == Rates(tpr=19 / 20, fpr=7 / 38)


def test_the_alarm_waits_until_it_is_sure(caplog):
    settings = AuditSettings(min_j=0.8, window=50)
    audit = Audit(settings, None)
    audit.note([audited(3, 2, 0, 5)])  # J = 0.6, but it may as well be 0.9
    assert not audit.found.alarm
    assert not caplog.text
    for _ in range(10):
        audit.note([audited(3, 2, 0, 5)])
    assert audit.found.alarm
    assert "surely less than judge.audit.min_j = 0.8" in caplog.text
    strict = Audit(settings.changed(stop=True), None)
    with pytest.raises(JudgeError, match="refresh the judge"):
        strict.note([audited(3, 2, 0, 5)] * 11)


def test_a_judge_that_says_nothing_cannot_correct_a_reward():
    audit = Audit(AuditSettings(enough=5), None)
    audit.note([audited(5, 5, 6, 4)])
    with pytest.raises(JudgeError, match="say nothing"):
        _ = audit.rates


def sample(reference_says: str | None, share: float = 1.0) -> tuple[list[Group], Audit]:
    """Two right rollouts a prompt; the judge calls all clean, the reference is the task's oracle (None) or a judge."""
    policy = ModelledServer(lambda request, index: (request.ids[index], 1.0))
    judge_server = ModelledServer(lambda request, index: (r"\boxed{-1}", 1.0))
    algorithm, settings = AlgorithmSettings(), JudgeSettings(probe_share=0.0)
    reference = None
    if reference_says is not None:
        server = ModelledServer(lambda request, index: (reference_says, 1.0))
        reference = Asker(Served(server, Words()), settings, LoopClock(), seed=2)
    audit = Audit(AuditSettings(share=share, window=1), reference)

    async def work():
        rules = Rules(judge=settings, algorithm=algorithm, group_size=2, max_tokens=100)
        asker = Asker(Served(judge_server, Words()), settings, LoopClock(), seed=1)
        sampler = Sampler(
            task=Echo(), servers=policy, judge=Judge(asker, rules, LoopClock(), audit), tokenizer=Words(),
            settings=RolloutSettings(prompts_per_step=200, group_size=2), algorithm=algorithm, seed=1,
        )  # fmt: skip
        async with Ahead(sampler, max_lead=0, steps=1) as ahead:
            return (await ahead.groups(0, 0)).groups

    return run_virtual(work()), audit


def test_rollouts_are_audited_by_the_oracle_or_by_another_judge():
    groups, audit = sample(None)  # this task's oracle calls all clean
    assert audit.found.fpr.value == 0.0
    assert {judged.audit for group in groups for judged in group} == {-1}
    _, audit = sample(r"look: \boxed{0}")
    assert audit.found.tpr.value == 0.0
    groups, audit = sample("no verdict at all")
    assert audit.found.audited == 0


def test_only_the_share_that_was_asked_for_is_audited_whoever_comes_first():
    groups, audit = sample(r"\boxed{0}", share=0.25)
    again, _ = sample(r"\boxed{0}", share=0.25)
    labels = [[judged.audit for judged in group] for group in groups]
    assert labels == [[judged.audit for judged in group] for group in again]
    assert 60 < audit.found.audited < 140


def test_metrics_of_an_audit_leave_out_what_is_unknown():
    audit = Audit(AuditSettings(), None)
    audit.note([audited(0, 0, 1, 3)])
    found = audit_metrics(audit.found)
    assert found["audit/fpr"] == 0.25
    assert "audit/tpr" not in found
    assert "audit/j" not in found
    assert audit_metrics(None) == {}
    assert Counts(tp=1) + Counts(tn=2) == Counts(tp=1, tn=2)
    assert Interval(value=0.5, low=0.4, high=0.6).high == 0.6
