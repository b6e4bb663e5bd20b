"""Every metric that a run can have, declared once: the name that all sinks, the report and the docs use."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from megatron_fapo.trace import KINDS

Unit = Literal["share", "count", "bytes", "tokens", "seconds", "tokens/s", "nats", "steps", ""]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A name with its meaning.  Example: `Metric(name="reward/mean", unit="", description="Mean reward.")`.

    `{k}` in a name stands for a number: `eval/pass_at/{k}` declares `eval/pass_at/8`. Shares are fractions of 1.
    What depends on the wall clock begins with `time/`, what depends on faults or on lent devices with `servers/`.
    """

    name: str
    unit: Unit
    description: str


def _by_both(name: str, unit: Unit, description: str) -> tuple[Metric, ...]:
    """The same metric by the task's oracle and by the judge."""
    judge = "as the reward sees it: right answers without a verdict count as clean"
    return (
        Metric(name=f"{name}_oracle", unit=unit, description=f"{description}, by the task's oracle."),
        Metric(name=f"{name}_judge", unit=unit, description=f"{description}, {judge}."),
    )


def _plain(unit: Unit, **descriptions: str) -> tuple[Metric, ...]:
    """Metrics of one unit; `a__b` spells the name `a/b`."""
    return tuple(Metric(name=n.replace("__", "/"), unit=unit, description=d) for n, d in descriptions.items())


OWNERS = (
    ("publish", "ranks_parameters", "the ranks' parameters"),
    ("publish", "policy_weights", "the policy servers' weights"),
    *(
        ("generate", f"{role}_{tag}", f"the {role} servers' {what}")
        for role in ("policy", "judge")
        for tag, what in (("weights", "weights"), ("kv_cache", "KV cache"))
    ),
    *(("train", f"ranks_{kind}", f"the ranks' {kind}") for kind in KINDS),
)
"""(phase, owner of device memory, in words)."""

METRICS: tuple[Metric, ...] = (
    *_plain(
        "share",
        rollout__right_share="Rollouts whose answer is right.",
        flawed__oracle="Right answers whose process is flawed by the task's oracle, of all right answers.",
        flawed__judge="Right answers that the judge flags, of those with a verdict.",
        flawed__unjudged_share="Right answers without a verdict that counts, of all right answers.",
        flawed__negative_share="Flagged right answers of negative advantage: where most are, the shift is past.",
        flawed__probes="Right answers that the judge flags among the skipped ones it was asked about for this metric.",
        rollout__truncated_share="Rollouts that reached the token limit.",
    ),
    *_plain(
        "tokens",
        rollout__length_mean="Mean length of a response.",
        rollout__length_max="Longest response.",
        judge__tokens="Tokens that the judge generated, failed verdicts, retries and probes included.",
    ),
    *_plain(
        "steps",
        rollout__lag_max="Steps between the published weights and the oldest ones that a token was drawn with.",
        rollout__lag_mean="The same for all tokens, on average.",
    ),
    *_plain(
        "count",
        judge__asked="Different solutions that the judge was asked about; identical ones of a group are asked once.",
        judge__judged="Rollouts with a verdict.",
        judge__skipped="Right answers not asked about, because no advantage could change.",
        judge__shared="Right answers that share the verdict of an identical solution of their group.",
        judge__short="Solutions whose verdict is the cascade's, by a prefill without reasoning.",
        judge__failed="Rollouts whose verdict did not come or could not be read.",
        judge__probes="Skipped rollouts judged for the metrics alone.",
        group__dropped="Groups left out of the update: a verdict failed, dynamic sampling replaced them, or too old.",
        group__too_old="Groups left out because a token was drawn with weights more than train.max_lead steps old.",
    ),
    *_plain(
        "share",
        judge__parsed_share="Solutions asked about that got a usable verdict.",
        judge__precision="Flagged right answers that the oracle calls flawed too, of all flagged.",
        judge__recall="Right answers flawed by the oracle that the judge flags, of those with a verdict.",
        judge__f1="Harmonic mean of precision and recall of `flawed`.",
        judge__same_step_share="Where judge and oracle both find a flaw: how often it is the same step.",
    ),
    *_plain("count", audit__rollouts="Rollouts of this step on which the judge was compared with its reference."),
    *_plain(
        "share",
        audit__tpr="Flagged, of those that the reference calls flawed, over the audit's window.",
        audit__tpr_low="Lower end of its 95 % interval.",
        audit__tpr_high="Upper end of its 95 % interval.",
        audit__fpr="Flagged, of those that the reference calls clean, over the audit's window.",
        audit__fpr_low="Lower end of its 95 % interval.",
        audit__fpr_high="Upper end of its 95 % interval.",
        audit__j="Youden's J = TPR - FPR: 1 for a perfect judge, 0 for one whose verdicts say nothing.",
        audit__j_low="Lower end of its 95 % interval.",
        audit__j_high="Upper end of its 95 % interval.",
        audit__alarm="1 while all of J's interval is below judge.audit.min_j, else 0.",
        audit__short_missed="Ended as clean by the cascade, of those that the reference calls flawed, over the window.",
        audit__short_missed_low="Lower end of its 95 % interval.",
        audit__short_missed_high="Upper end of its 95 % interval.",
        audit__short_invented="Ended as flawed by the cascade, of those that it calls clean, over the window.",
        audit__short_invented_low="Lower end of its 95 % interval.",
        audit__short_invented_high="Upper end of its 95 % interval.",
        audit__short_alarm="1 while all of either interval is above judge.cascade.max_error, else 0.",
    ),
    *_by_both("group/three_class_share", "share", "Groups with clean right, flawed right and wrong rollouts"),
    *_by_both("group/two_class_share", "share", "Groups with two of the classes clean right, flawed right, wrong"),
    *_by_both(
        "group/one_class_share", "share", "Groups whose rollouts are all of one class, from which nothing is learnt"
    ),
    *_by_both("group/alpha", "share", "α, the share of clean right rollouts of a group, mean over groups"),
    *_by_both("group/beta", "share", "β, the share of wrong rollouts of a group, mean over groups"),
    *_by_both("group/gamma", "share", "γ, the share of flawed right rollouts of a group, mean over groups"),
    *_by_both("group/rho", "", "ρ = α/β, the learning progress, mean over groups with a wrong rollout"),
    *_plain(
        "",
        reward__mean="Mean reward of the rollouts trained on.",
        reward__std="Standard deviation of these rewards.",
        flawed__advantage="Mean advantage of flagged right answers; it turns negative where the shift happens.",
        train__loss="Objective, mean over the step's updates.",
        train__grad_norm_mean="Gradient norm before clipping, mean over the step's updates.",
        train__grad_norm_max="Largest gradient norm before clipping.",
        train__learning_rate="Learning rate of the step's last update.",
        train__rescored="1 when Megatron computed the behaviour log-probs again before the updates, else 0.",
    ),
    *_plain("share", train__clipped_share="Loss tokens whose gradient the PPO clip cut off, mean over updates."),
    *_plain("nats", train__kl="k3 estimate of KL(behaviour ‖ current), mean over updates."),
    *_plain("nats", train__entropy="Entropy of the policy at the sampling temperature, mean over updates."),
    *_plain("nats", train__kl_reference="Estimate of KL(current ‖ reference), mean over updates; 0 without a penalty."),
    *_plain("share", train__truncated_share="Loss tokens whose importance weight was cut at its cap."),
    *_plain("tokens", train__loss_tokens="Tokens in the loss."),
    *_plain("", train__imbalance="Largest over mean cost of the data-parallel ranks, largest over updates."),
    *_plain("share", train__padding_share="Token positions computed that hold padding."),
    *_plain(
        "nats",
        mismatch__mean="Mean |log-prob by the engine - by Megatron|, same temperature; Megatron has the step's "
        "weights, the engine those that drew the token, the same where train.max_lead is 0.",
        mismatch__max="Largest of these differences.",
    ),
    *_plain(
        "count",
        servers__retries="Samples and verdicts asked again because their server died.",
        servers__restarts="Servers that died and were started again, of all roles.",
        servers__handovers="Times that devices went from one role's servers to the other's (servers.ROLE.lend).",
        servers__moved="Samples and verdicts that went on at another server because of that.",
    ),
    *_plain("count", train__updates="Optimizer steps.", eval__prompts="Held-out prompts."),
    *_plain(
        "share",
        eval__right_share="avg@k on held-out prompts.",
        eval__sound_share_judge="Right and clean by the judge, of the held-out samples.",
        eval__sound_share_oracle="Right and clean by the task's oracle, of the held-out samples.",
        eval__unjudged_share="Right held-out samples whose verdict failed, of the right ones.",
    ),
    Metric(name="eval/pass_at/{k}", unit="share", description="Prompts with a right answer among k samples, unbiased."),
    Metric(
        name="eval/maj_at/{k}",
        unit="share",
        description="Prompts whose most frequent answer among k samples is right; a tie is broken by an even draw.",
    ),
    Metric(
        name="eval/verified_pass_at_judge/{k}",
        unit="share",
        description="Prompts with a right answer and clean process (judge) among k samples, unbiased.",
    ),
    Metric(
        name="eval/verified_pass_at_oracle/{k}",
        unit="share",
        description="Prompts with a right answer and clean process (oracle) among k samples, unbiased.",
    ),
    *(
        Metric(
            name=f"memory/{phase}/{owner}",
            unit="bytes",
            description=f"Device memory of {whose} when the phase begins, as its owner counts it (co-located runs).",
        )
        for phase, owner, whose in OWNERS
    ),
    *_plain("bytes", servers__handover_bytes="KV cache memory that was given back for the other role's servers."),
    *_plain(
        "count",
        recover__count="Times that a training rank was lost and all were started again; left out while there was none.",
        recover__steps="Steps made again because of that, so far.",
    ),
    *_plain(
        "seconds",
        time__recover="From the loss of a rank to ranks that hold the last checkpoint, in the first step after it.",
        time__publish="Moving the weights to the servers and confirming them.",
        time__evaluate="Held-out evaluation.",
        time__generate="Generation, with the checks and verdicts that run beside it.",
        time__judge="While at least one verdict was being waited for.",
        time__judge_hidden="Of these, while rollouts were still being generated.",
        time__judge_exposed="After the step's last rollout landed, until its last check and verdict.",
        time__update="The step's updates, batch making included.",
        time__lent_to_policy="Work of policy servers on devices of the judge, summed over those.",
        time__lent_to_judge="Work of judge servers on devices of the policy, summed over those.",
        time__switch="Changes of phase where ranks and servers share devices; part of the phases that wait for them.",
        time__other="The rest of the step: rewards, sinks, the checkpoint written before it.",
        time__step="The whole step, from the end of the one before.",
    ),
    *_plain(
        "tokens/s",
        time__generate_rate="Response tokens a second of generation.",
        time__update_rate="Tokens through the model a second of update.",
        time__step_rate="Response tokens a second of the whole step.",
    ),
    Metric(
        name="time/mfu",
        unit="share",
        description="Model FLOPs of the step's updates a second, of the peak of all ranks (observe.peak_tflops).",
    ),
)


@cache
def metric(name: str) -> Metric:
    """The declaration of a name. Raises KeyError when there is none."""
    for declared in METRICS:
        if re.fullmatch(re.escape(declared.name).replace(r"\{k\}", r"\d+"), name):
            return declared
    raise KeyError(f"metric {name!r} is not declared in observe/glossary.py")


def glossary() -> str:
    """The page docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Generated from the code by `make docs`. The same names stand in `metrics.jsonl`, Weights & Biases,",
        "TensorBoard and the report. Shares are fractions of 1. A metric that a step does not define is left out,",
        "never 0. What depends on the wall clock begins with `time/`, what depends on faults or on lent devices with",
        "`servers/`; two deterministic runs agree in everything else.",
        "",
        "| name | unit | meaning |",
        "|---|---|---|",
    ]
    lines += ["| `{}` | {} | {} |".format(m.name, m.unit, m.description.replace("|", "\\|")) for m in METRICS]
    return "\n".join(lines) + "\n"
