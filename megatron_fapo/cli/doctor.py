"""`fapo doctor`: is this machine fit to run?"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_fapo.cli import doctor_machine, doctor_stack
from megatron_fapo.cli.arguments import Overrides
from megatron_fapo.cli.finding import Finding
from megatron_fapo.config import Config, read_config
from megatron_fapo.errors import ConfigError
from megatron_fapo.publish.settings import PublishSettings
from megatron_fapo.surroundings import lacking

EXAMPLE = "Example: fapo doctor configs/clock/fapo.yaml --port 30000"


def command(
    config: Annotated[Path | None, typer.Argument(help="Also check what this configuration needs.")] = None,
    overrides: Overrides = None,
    port: Annotated[list[int] | None, typer.Option(help="Also check that this port is free.")] = None,
    run: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs"),
    sglang: Annotated[
        str | None, typer.Option(help="Python of SGLang's environment. [default: the image's, or .venvs/sglang]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Check versions, GPUs, SGLang, memory, disks, limits and ports; exit code 1 when something cannot work."""
    settings = read_config(config, overrides or ()) if config else None
    findings = list(_examine(settings, port or [], run, sglang))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        table = Table("", "found", "what to do")
        colours = {"ok": "green", "warning": "yellow", "error": "red"}
        for finding in findings:
            table.add_row(f"[{colours[finding.state]}]{finding.what}[/]", finding.found, finding.advice)
        Console().print(table)
    if any(finding.state == "error" for finding in findings):
        raise typer.Exit(1)


def _examine(settings: Config | None, ports: list[int], run: Path, sglang: str | None) -> Iterator[Finding]:
    """All findings; those of a configuration first."""
    wanted = sglang is not None
    bucket = PublishSettings().bucket_megabytes
    if settings is not None:
        yield from _configuration(settings)
        servers = [server for _, server in settings.started_servers() if server.engine == "sglang"]
        wanted = wanted or bool(servers)
        sglang = sglang or next((server.sglang.python for server in servers), None)
        bucket = settings.publish.bucket_megabytes
        ports = [*ports, *(server.port for _, server in settings.started_servers() if server.port)]
    yield from doctor_stack.packages()
    installed = doctor_stack.ask(sys.executable)
    yield from doctor_stack.training(installed)
    yield from doctor_stack.serving(doctor_stack.environment_of(sglang), wanted, installed)
    gpus = 0 if isinstance(installed, str) else len(installed["gpus"])
    yield from doctor_machine.machine(run, int(bucket * 2**20), gpus)
    for number in dict.fromkeys(ports or [0]):
        yield doctor_machine.port(number)


def _configuration(settings: Config) -> Iterator[Finding]:
    try:
        lacks = lacking(settings)
    except ConfigError as error:
        yield Finding.of("configuration", "cannot run", error=str(error))
        return
    for lack in lacks:
        yield Finding.of("configuration", "missing", error=lack)
    if not lacks:
        ranks = settings.policy.parallel.world
        yield Finding.of("configuration", f"{ranks} training rank(s), everything that it needs is here")
