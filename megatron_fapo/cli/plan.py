"""`fapo plan`: does it fit, how long will it take, and what does the judge cost?"""

import json
from dataclasses import asdict
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_fapo.cli.arguments import ConfigPath, Overrides
from megatron_fapo.config import Config, read_config
from megatron_fapo.errors import ConfigError
from megatron_fapo.plan.advice import advice, bottleneck
from megatron_fapo.plan.assumptions import GIGA, card, overridden
from megatron_fapo.plan.deployment import deployment, summary
from megatron_fapo.plan.estimate import Plan, estimate

if TYPE_CHECKING:
    from megatron_fapo.plan.simulate import Simulation

EXAMPLE = "Example: fapo plan configs/qwen2.5-32b.yaml --gpus 128 --simulate"


class Placement(Enum):
    """Of ranks and servers."""

    colocated = "colocated"
    split = "split"


class JudgePlace(Enum):
    """Of judge servers during generation."""

    slice = "slice"
    shared = "shared"
    after = "after"


def command(
    config: ConfigPath,
    overrides: Overrides = None,
    card_name: Annotated[str, typer.Option("--card", help="GPU: h100, h200, a100 or b200.")] = "h100",
    gpus: Annotated[
        int | None, typer.Option(min=1, help="On so many GPUs: scales data parallelism and servers.")
    ] = None,
    placement: Annotated[
        Placement | None,
        typer.Option(help="Ranks and servers in turn on the same GPUs, or apart. [default: as configured]"),
    ] = None,
    judge: Annotated[
        JudgePlace,
        typer.Option(help="The judge on GPUs of its own, beside every policy server, or after the last rollout."),
    ] = JudgePlace.slice,
    judge_gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of the judge's slice. [default: as configured]")
    ] = None,
    mean: Annotated[
        float | None,
        typer.Option("--mean-tokens", min=1, help="Tokens of a mean response. [default: 1/8 of the limit]"),
    ] = None,
    assume: Annotated[
        list[str] | None, typer.Option(help="NAME=NUMBER in place of an assumption (docs/planner.md).")
    ] = None,
    simulated: Annotated[
        bool,
        typer.Option("--simulate", help="Run the real sampler and judge in virtual time against modelled servers."),
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps to simulate.")] = 2,
    dead_server: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="A policy server dies so long into each step's generation."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON instead of tables; the last line has the shares.")
    ] = False,
) -> None:
    """Say whether a configuration fits its GPUs, how long a step takes, what holds it up and what to change.

    Needs neither GPU nor weights: models are known by their config.json, else by configs/models. Exit code 1 when it
    does not fit.
    """
    settings, assumptions = read_config(config, overrides or ()), overridden(assume or [])
    limit = settings.rollout.max_new_tokens
    if mean is not None and mean >= limit:
        raise ConfigError(
            f"--mean-tokens {mean:g}: must be below rollout.max_new_tokens = {limit}, where responses end"
        )
    if dead_server is not None and not simulated:
        raise ConfigError("--dead-server needs --simulate: nobody dies in a closed form")
    made = deployment(
        settings,
        card(card_name),
        gpus=gpus,
        placement=placement.value if placement else None,
        judge_place=judge.value,
        judge_gpus=judge_gpus,
    )
    plan = estimate(settings, made, assumptions, mean)
    simulation = None
    if simulated:
        from megatron_fapo.plan.simulate import simulate

        simulation = simulate(settings, made, assumptions, steps=steps, mean=mean, dead_server=dead_server)
    if as_json:
        typer.echo(json.dumps(_plan_json(plan, settings), default=float))
        if simulation is not None:
            typer.echo(json.dumps({"steps": [asdict(step) for step in simulation.steps]}, default=float))
            typer.echo(json.dumps(shares(plan, simulation)))
    else:
        _show(plan, settings, simulation)
    if not plan.fits:
        raise typer.Exit(1)


def shares(plan: Plan, simulation: "Simulation") -> dict[str, Any]:
    """What a step costs beyond a plain RLVR step that still generates and trains; fractions of 1."""
    return {
        "fits": plan.fits,
        "judge_overhead": round(simulation.judge_overhead, 4),
        "learning_share": round(simulation.learning_share, 4),
        "publish_share": round(simulation.publish_share, 4),
        "switch_share": round(simulation.switch_share, 4),
        "overhead": round(simulation.overhead, 4),
        "step_seconds": round(simulation.mean("seconds"), 1),
    }


def _plan_json(plan: Plan, config: Config) -> dict[str, Any]:
    return {
        "fits": plan.fits,
        "deployment": summary(plan.deployment),
        "memory": plan.memory,
        "capacity": plan.deployment.card.memory,
        "cache_tokens": plan.cache,
        "seconds": {
            "generate": plan.generate.seconds,
            "judge": plan.judge.seconds if plan.judge else 0.0,
            "update": plan.update.seconds,
            "publish": plan.publish,
            "switch": plan.switch,
            "step": plan.seconds,
        },
        "update": asdict(plan.update),
        "tokens": plan.tokens,
        "tokens_per_gpu_second": plan.tokens_per_gpu,
        "bottleneck": bottleneck(plan),
        "advice": list(advice(plan, config)),
    }


def _show(plan: Plan, config: Config, simulation: "Simulation | None") -> None:
    console = Console()
    words = summary(plan.deployment)
    console.print(
        f"{words['gpus']} x {words['card']}, {words['placement']}: {words['ranks']} ranks, policy servers "
        f"{words['policy_servers']}, judge servers {words['judge_servers']}",
        highlight=False,
    )
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    console.print(
        f"{plan.tokens_per_gpu:.0f} tokens a second and GPU. Bottleneck: {bottleneck(plan)}.", highlight=False
    )
    for line in advice(plan, config):
        console.print(f"- {line}", highlight=False, markup=False)
    if simulation is not None:
        console.print(_simulation_table(plan, simulation))


def _memory_table(plan: Plan) -> Table:
    owners = list(dict.fromkeys(owner for phase in plan.memory.values() for owner in phase))
    table = Table("GB on the fullest GPU", *plan.memory, title="Memory")
    for owner in owners:
        cells = [f"{phase[owner] / GIGA:.1f}" if owner in phase else "" for phase in plan.memory.values()]
        table.add_row(owner, *cells)
    capacity = plan.deployment.card.memory
    totals = [sum(phase.values()) for phase in plan.memory.values()]
    table.add_section()
    table.add_row(
        f"of {capacity / GIGA:.1f}",
        *(f"[{'green' if total <= capacity else 'red'}]{total / GIGA:.1f}[/]" for total in totals),
    )
    return table


def _time_table(plan: Plan) -> Table:
    hidden = "" if plan.judge is None else ", before the judge is hidden behind generation"
    table = Table("phase", "seconds", "", title=f"One step{hidden}")
    table.add_row("generate", f"{plan.generate.seconds:.1f}", f"no placement is faster than {plan.generate.floor:.1f}")
    if plan.judge is not None:
        table.add_row("judge", f"{plan.judge.seconds:.1f}", "all solutions at once")
    parts = {key: value for key, value in asdict(plan.update).items() if value}
    table.add_row("update", f"{plan.update.seconds:.1f}", ", ".join(f"{k} {v:.1f}" for k, v in parts.items()))
    table.add_row("publish", f"{plan.publish:.1f}", "")
    table.add_row("switch", f"{plan.switch:.1f}", "")
    table.add_section()
    table.add_row("step", f"{plan.seconds:.1f}", "")
    return table


def _simulation_table(plan: Plan, simulation: "Simulation") -> Table:
    table = Table("", "", title=f"Simulated: the mean of {len(simulation.steps)} steps")
    names = {
        "generate": "generate and judge, s",
        "rollouts_landed": "of it until the last rollout, s",
        "update": "update, s",
        "publish": "publish, s",
        "switch": "switch, s",
        "seconds": "step, s",
        "judged": "verdicts",
        "skipped": "verdicts that nothing needed",
        "failed": "verdicts that failed",
        "policy_busy": "policy servers at work",
        "judge_busy": "judge servers at work",
    }
    for name, words in names.items():
        value = simulation.mean(name)
        table.add_row(words, f"{value:.0%}" if name.endswith("busy") else f"{value:.1f}")
    table.add_row("plain RLVR step, s", f"{simulation.plain_seconds:.1f}")
    table.add_section()
    for name, share in shares(plan, simulation).items():
        if name not in ("fits", "step_seconds"):
            table.add_row(name.replace("_", " "), f"{share:.1%}")
    return table
