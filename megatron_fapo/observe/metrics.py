"""What a step is in numbers: pure functions from records to {metric name: value}.

A metric that a step does not define (the share of flawed among no right answers) is left out, never 0.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from megatron_fapo.observe.flops import ModelFlops
from megatron_fapo.observe.glossary import glossary as glossary
from megatron_fapo.observe.glossary import metric
from megatron_fapo.records import (
    Evaluation,
    Floats,
    Group,
    JudgeAudit,
    Judged,
    NotJudged,
    Recovered,
    Rollout,
    StepReport,
    Verdict,
    WeightVersion,
)
from megatron_fapo.trace import Span, Spans, Switch

log = logging.getLogger(__name__)

Metrics = dict[str, float]

PHASES = ("publish", "evaluate", "generate", "update")
"""Stretches of a step that follow each other, in their order."""


def step_metrics(
    *,
    groups: Sequence[Group],
    rewards: Sequence[Floats],
    report: StepReport,
    weights: WeightVersion,
    spans: Spans,
    advantages: Mapping[str, float] | None = None,
    too_old: int = 0,
) -> Metrics:
    """All metrics of one step.

    `groups` are all groups of the step, `rewards` the arrays [n] of those that were trained on, `advantages` the mean
    over its response by rollout id; `too_old` groups were left out because of their weights' age. Raises KeyError for a
    name that the glossary does not declare.
    """
    rollouts = [judged for group in groups for judged in group]
    lengths = [len(judged.rollout.token_ids) for judged in rollouts]
    return declared(
        {
            **_rollout_metrics(rollouts, lengths, weights),
            **_flaw_metrics(rollouts),
            **_shift_metrics(rollouts, advantages or {}),
            **_judge_metrics(groups),
            **_composition_metrics(groups),
            "group/dropped": float(len(groups) - len(rewards)),
            "group/too_old": float(too_old),
            **_reward_metrics(rewards),
            **_update_metrics(report),
            **time_metrics(spans, response_tokens=sum(lengths), report=report),
        }
    )


def evaluation_metrics(evaluation: Evaluation) -> Metrics:
    """The metrics of a held-out evaluation."""
    single = {
        "eval/prompts": float(evaluation.prompts),
        "eval/right_share": evaluation.right_share,
        "eval/sound_share_judge": evaluation.sound_share_judge,
        "eval/sound_share_oracle": evaluation.sound_share_oracle,
        "eval/unjudged_share": evaluation.unjudged_share,
    }
    by_k = {
        "eval/pass_at": evaluation.pass_at,
        "eval/maj_at": {k: share for k, share in evaluation.maj_at.items() if k > 2},  # two votes have no majority
        "eval/verified_pass_at_judge": evaluation.verified_pass_at_judge,
        "eval/verified_pass_at_oracle": evaluation.verified_pass_at_oracle,
    }
    many = {f"{name}/{k}": value for name, shares in by_k.items() for k, value in (shares or {}).items()}
    return declared({**{name: value for name, value in single.items() if value is not None}, **many})


def audit_metrics(audit: JudgeAudit | None) -> Metrics:
    """The judge against the reference of its audit; nothing without one."""
    if audit is None:
        return {}
    found = {"audit/rollouts": float(audit.audited), "audit/alarm": float(audit.alarm)}
    intervals = [("tpr", audit.tpr), ("fpr", audit.fpr), ("j", audit.j)]
    if audit.short is not None:
        found["audit/short_alarm"] = float(audit.short.alarm)
        intervals += [("short_missed", audit.short.missed), ("short_invented", audit.short.invented)]
    for name, interval in intervals:
        if not math.isnan(interval.value):
            found |= {f"audit/{name}{part}": value for part, value in (
                ("", interval.value), ("_low", interval.low), ("_high", interval.high))}  # fmt: skip
    return declared(found)


def switch_metrics(switches: Sequence[Switch]) -> Metrics:
    """What the changes of phase of a step cost and left with each owner; nothing where devices are not shared."""
    if not switches:
        return {}
    held = {f"memory/{s.phase}/{owner}": float(size) for s in switches for owner, size in s.resident.items() if size}
    return declared({**held, "time/switch": math.fsum(switch.seconds for switch in switches)})


def recovery_metrics(recovered: Recovered) -> Metrics:
    """That ranks were lost, in every step from then on; how long it took, in the first."""
    return declared(
        {
            "recover/count": float(recovered.count),
            "recover/steps": float(recovered.steps),
            "time/recover": recovered.seconds,
        }
    )


def declared(metrics: Metrics) -> Metrics:
    """The same, every name looked up in the glossary, NaN left out. Infinities are left out too, with a warning."""
    for name, value in metrics.items():
        metric(name)
        if math.isinf(value):
            log.warning("%s is %s and left out", name, value)
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def mfu(groups: Sequence[Group], report: StepReport, flops: ModelFlops, peak: float) -> Metrics:
    """The share of `peak` (FLOP/s of all ranks) that the step's updates used, at the groups' mean sequence length."""
    sequences = [len(group.prompt.token_ids) + len(one.rollout.token_ids) for group in groups for one in group]
    # a token's attention costs what its own sequence is long: long ones weigh more
    length = share(sum(tokens * tokens for tokens in sequences), sum(sequences))
    work = flops.per_token(length) * sum(update.tokens for update in report.updates)
    return declared({"time/mfu": share(work, report.seconds * peak)})


def without_time(metrics: Mapping[str, float]) -> Metrics:
    """What two deterministic runs agree in."""
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "servers/"))}


def time_metrics(spans: Spans, *, response_tokens: int, report: StepReport) -> Metrics:
    """Seconds by phase and tokens a second. Phases that did not happen are left out."""
    seconds = {name: spans.seconds(name) for name in {span.name for span in spans.ended}}
    found = {f"time/{name}": seconds[name] for name in (*PHASES, "step") if name in seconds}
    if "step" in seconds:
        found["time/other"] = max(0.0, seconds["step"] - sum(seconds.get(name, 0.0) for name in PHASES))
        found["time/step_rate"] = share(response_tokens, seconds["step"])
    if "judge_exposed" in seconds:
        found["time/judge_exposed"] = seconds["judge_exposed"]
    if "judge" in seconds:
        judging = [span for span in spans.ended if span.name == "judge"]
        last_landed = min((span.start for span in spans.ended if span.name == "judge_exposed"), default=math.inf)
        found["time/judge"] = _covered(judging)
        found["time/judge_hidden"] = _covered(judging, until=last_landed)
    found["time/generate_rate"] = share(response_tokens, seconds.get("generate", 0.0))
    found["time/update_rate"] = share(sum(update.tokens for update in report.updates), report.seconds)
    return found


def share(part: float, whole: float) -> float:
    """part / whole; NaN, which `declared` leaves out, when there is no whole."""
    return part / whole if whole else math.nan


def _rollout_metrics(rollouts: Sequence[Judged], lengths: Sequence[int], weights: WeightVersion) -> Metrics:
    versions = [span.version for judged in rollouts for span in judged.rollout.versions]
    return {
        "rollout/right_share": share(sum(judged.outcome.right for judged in rollouts), len(rollouts)),
        "rollout/length_mean": share(sum(lengths), len(lengths)),
        "rollout/length_max": float(max(lengths, default=0)),
        "rollout/truncated_share": share(sum(j.rollout.finish_reason == "length" for j in rollouts), len(rollouts)),
        "rollout/lag_max": float(weights.step - min(versions, default=weights.step)),
        "rollout/lag_mean": share(sum(_lags(judged.rollout, weights.step) for judged in rollouts), sum(lengths)),
    }


def _lags(rollout: Rollout, step: int) -> int:
    """Steps between the published weights and those that drew each token, summed over the tokens."""
    ends = [*(span.start for span in rollout.versions[1:]), len(rollout.token_ids)]
    return sum((end - s.start) * (step - s.version) for s, end in zip(rollout.versions, ends, strict=True))


def _flaw_metrics(rollouts: Sequence[Judged]) -> Metrics:
    right = [judged for judged in rollouts if judged.outcome.right]
    known = [judged.oracle for judged in right if judged.oracle is not None]
    verdicts = [judged.verdict for judged in right if isinstance(judged.verdict, Verdict)]
    probes = [j.verdict.probe for j in right if isinstance(j.verdict, NotJudged) and j.verdict.probe is not None]
    return {
        "flawed/oracle": share(sum(first != -1 for first in known), len(known)),
        "flawed/judge": share(sum(verdict.flawed for verdict in verdicts), len(verdicts)),
        "flawed/unjudged_share": share(len(right) - len(verdicts), len(right)),
        "flawed/probes": share(sum(probe.flawed for probe in probes), len(probes)),
    }


def _shift_metrics(rollouts: Sequence[Judged], advantages: Mapping[str, float]) -> Metrics:
    """How flagged right answers are treated: above ρ = 2/λ - 1 their advantage is negative."""
    flagged = [advantages[j.rollout.id] for j in rollouts if j.flagged and j.rollout.id in advantages]
    return {
        "flawed/advantage": _mean(flagged),
        "flawed/negative_share": share(sum(value < 0 for value in flagged), len(flagged)),
    }


def _judge_metrics(groups: Sequence[Group]) -> Metrics:
    """Counts are left out while the judge is off."""
    rollouts = [judged for group in groups for judged in group]
    reasons = [judged.verdict.reason for judged in rollouts if isinstance(judged.verdict, NotJudged)]
    if "off" in reasons:
        return {}
    # One verdict object serves all identical solutions of a group: what the judge did is counted once.
    verdicts = list({id(judged.verdict): judged.verdict for judged in rollouts}.values())
    judged = [j.verdict for j in rollouts if isinstance(j.verdict, Verdict)]
    asked = [v for v in verdicts if isinstance(v, Verdict) or v.reason == "failed"]
    return {
        "judge/asked": float(len(asked)),
        "judge/judged": float(len(rollouts) - len(reasons)),
        "judge/skipped": float(reasons.count("skipped")),
        "judge/failed": float(reasons.count("failed")),
        "judge/shared": float(len(judged) - len({id(verdict) for verdict in judged})),
        "judge/short": float(sum(isinstance(v, Verdict) and v.short for v in verdicts)),
        "judge/probes": float(sum(isinstance(j.verdict, NotJudged) and j.verdict.probe is not None for j in rollouts)),
        "judge/tokens": float(sum(verdict.tokens for verdict in verdicts)),
        "judge/parsed_share": share(sum(isinstance(v, Verdict) for v in asked), len(asked)),
        **_agreement(rollouts),
    }


def _agreement(rollouts: Sequence[Judged]) -> Metrics:
    """The judge against the oracle, over right answers that have both."""
    pairs = [
        (judged.verdict.first_wrong, judged.oracle, judged.verdict.short)
        for judged in rollouts
        if judged.outcome.right and isinstance(judged.verdict, Verdict) and judged.oracle is not None
    ]
    both = [(judge, oracle, short) for judge, oracle, short in pairs if judge != -1 and oracle != -1]
    named = [(judge, oracle) for judge, oracle, short in both if not short]
    flagged = sum(judge != -1 for judge, _, _ in pairs)
    flawed = sum(oracle != -1 for _, oracle, _ in pairs)
    return {
        "judge/precision": share(len(both), flagged),
        "judge/recall": share(len(both), flawed),
        "judge/f1": share(2 * len(both), flagged + flawed),
        "judge/same_step_share": share(sum(judge == oracle for judge, oracle in named), len(named)),
    }


def _composition_metrics(groups: Sequence[Group]) -> Metrics:
    """α, β, γ, ρ and the share of three-class groups, where FAPO's reward acts."""
    rollouts = [judged for group in groups for judged in group]
    by: dict[str, Callable[[Judged], bool]] = {}
    if any(judged.oracle is not None for judged in rollouts):
        by["oracle"] = lambda judged: judged.oracle is not None and judged.oracle != -1
    if any(isinstance(judged.verdict, Verdict) for judged in rollouts):
        by["judge"] = lambda judged: judged.flagged
    found: Metrics = {}
    for source, is_flawed in by.items():
        composition = np.array([_classes(group, is_flawed) for group in groups]) / [[len(group)] for group in groups]
        alpha, gamma, beta = composition.T
        present = (composition > 0).sum(axis=1)
        found |= {
            f"group/three_class_share_{source}": float((present == 3).mean()),
            f"group/two_class_share_{source}": float((present == 2).mean()),
            f"group/one_class_share_{source}": float((present == 1).mean()),
            f"group/alpha_{source}": float(alpha.mean()),
            f"group/beta_{source}": float(beta.mean()),
            f"group/gamma_{source}": float(gamma.mean()),
            f"group/rho_{source}": _mean((alpha[beta > 0] / beta[beta > 0]).tolist()),
        }
    return found


def _classes(group: Group, is_flawed: Callable[[Judged], bool]) -> tuple[int, int, int]:
    """How many are clean right, flawed right, wrong."""
    right = sum(judged.outcome.right for judged in group)
    flawed = sum(judged.outcome.right and is_flawed(judged) for judged in group)
    return right - flawed, flawed, len(group) - right


def _reward_metrics(rewards: Sequence[Floats]) -> Metrics:
    if not rewards:
        return {}
    together = np.concatenate(rewards).astype(np.float64)
    return {"reward/mean": float(together.mean()), "reward/std": float(together.std())}


def _update_metrics(report: StepReport) -> Metrics:
    updates = report.updates
    always = {
        "train/updates": float(len(updates)),
        "train/rescored": float(report.rescored),
        "mismatch/mean": report.mismatch_mean,
        "mismatch/max": report.mismatch_max,
    }
    if not updates:
        return always
    return {
        **always,
        "train/loss": _mean([update.loss for update in updates]),
        "train/grad_norm_mean": _mean([update.grad_norm for update in updates]),
        "train/grad_norm_max": max(update.grad_norm for update in updates),
        "train/learning_rate": updates[-1].learning_rate,
        "train/clipped_share": _mean([update.clipped_share for update in updates]),
        "train/kl": _mean([update.kl_behaviour for update in updates]),
        "train/entropy": _mean([update.entropy for update in updates if update.entropy is not None]),
        "train/kl_reference": _mean([update.kl_reference for update in updates]),
        "train/truncated_share": _mean([update.truncated_share for update in updates]),
        "train/loss_tokens": float(sum(update.loss_tokens for update in updates)),
        "train/imbalance": max(update.imbalance for update in updates),
        "train/padding_share": 1.0 - share(sum(u.tokens for u in updates), sum(u.padded_tokens for u in updates)),
    }


def _mean(values: Sequence[float]) -> float:
    return share(math.fsum(values), len(values))


def _covered(spans: Iterable[Span], until: float = math.inf) -> float:
    """Seconds before `until` in which at least one of the spans was open."""
    total, reached = 0.0, -math.inf
    for span in sorted(spans, key=lambda span: span.start):
        end = min(span.end, until)
        total += max(0.0, end - max(span.start, reached))
        reached = max(reached, end)
    return total
