"""`fapo servers`: more servers, or fewer, for a run that goes on."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_fapo.config import Config, read_config
from megatron_fapo.errors import ConfigError
from megatron_fapo.records import Role
from megatron_fapo.run.folder import RunFolder, Wanted

EXAMPLE = "Example: fapo servers runs/fapo-s1 --policy 4"


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that goes on.")],
    policy: Annotated[int | None, typer.Option(help="Servers that generate rollouts.", min=1)] = None,
    judge: Annotated[int | None, typer.Option(help="Servers that generate verdicts.", min=1)] = None,
) -> None:
    """Add or remove servers of a run while it goes on, from its next step on, and for as often as it is resumed.

    Those that come hold the present weights before they get work; those that leave finish what they were asked.
    """
    folder = RunFolder(run)
    if not folder.started():
        raise ConfigError(f"{run}: no run was started here")
    asked: dict[Role, int] = {}
    config = read_config(folder.config)
    if policy is not None:
        asked["policy"] = policy
    if judge is not None:
        asked["judge"] = judge
    if not asked:
        raise ConfigError("nothing is asked: add --policy N or --judge N")
    _check(config, asked)
    started = dict(config.started_servers())
    folder.ask_for_servers({role: Wanted(count=count, configured=started[role].count) for role, count in asked.items()})
    told = ", ".join(f"{count} for {role}" for role, count in asked.items())
    typer.echo(f"{run}: the run takes it up with its next step: {told}")


def _check(config: Config, asked: dict[Role, int]) -> None:
    """Raises ConfigError for what the run could not do."""
    if config.cluster.placement == "colocated":
        raise ConfigError(
            "cluster.placement = colocated: servers share the devices of the ranks, in a number that is fixed"
        )
    started = dict(config.started_servers())
    for role, count in asked.items():
        if role not in started:
            raise ConfigError(f"servers.{role}: the run has no such servers of its own")
        if count > (most := started[role].places):
            raise ConfigError(
                f"{count} servers for {role}: the run keeps ports and GPUs for {most} "
                f"(servers.{role}.max_count, which is set when it starts)"
            )
