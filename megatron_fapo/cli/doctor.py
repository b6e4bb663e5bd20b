"""`fapo doctor`: is this machine fit to run?"""

import json
import os
import platform
import shutil
import socket
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Literal

import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from megatron_fapo.weights import shared_memory_folder

EXAMPLE = "Example: fapo doctor --port 30000"
GIGABYTE = 2**30
ENOUGH_MEMORY = 2 * GIGABYTE
ENOUGH_SHARED_MEMORY = 0.5 * GIGABYTE
ENOUGH_FILES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's report."""

    what: str
    state: Literal["ok", "warning", "error"]
    found: str
    advice: str = ""


def command(
    port: Annotated[list[int] | None, typer.Option(help="Also check that this port is free.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Check versions, memory, shared memory, open files and ports; exit code 1 when something cannot work."""
    findings = [*_versions(), _memory(), _shared_memory(), _open_files(), *(_port(number) for number in port or [0])]
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


def _versions() -> list[Finding]:
    """Python and every dependency against what this package asks for."""
    python = platform.python_version()
    supported = sys.version_info[:2] in ((3, 11), (3, 12))
    findings = [
        Finding(
            what="python",
            state="ok" if supported else "error",
            found=python,
            advice="" if supported else "Python 3.11 or 3.12 is needed",
        )
    ]
    for line in requires("megatron-fapo") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            findings.append(
                Finding(what=requirement.name, state="error", found="missing", advice=f"pip install '{requirement}'")
            )
            continue
        fits = requirement.specifier.contains(found.partition("+")[0], prereleases=True)
        findings.append(
            Finding(
                what=requirement.name,
                state="ok" if fits else "warning",
                found=found,
                advice="" if fits else f"tested with {requirement.specifier}",
            )
        )
    return findings


def _memory() -> Finding:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    short = free < ENOUGH_MEMORY
    advice = "the clock example needs about 1.5 GB: end other programs" if short else ""
    return Finding(
        what="memory", state="warning" if short else "ok", found=f"{free / GIGABYTE:.1f} GB free", advice=advice
    )


def _shared_memory() -> Finding:
    folder = shared_memory_folder()
    free = shutil.disk_usage(folder).free
    if folder != Path("/dev/shm"):
        advice = "/dev/shm is missing or not writable: weights go through a disk folder (containers: --shm-size)"
    else:
        advice = "" if free >= ENOUGH_SHARED_MEMORY else "two weight buckets may not fit (containers: --shm-size)"
    return Finding(
        what="shared memory",
        state="warning" if advice else "ok",
        found=f"{folder}, {free / GIGABYTE:.1f} GB free",
        advice=advice,
    )


def _open_files() -> Finding:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    short = soft < ENOUGH_FILES
    return Finding(
        what="open files",
        state="warning" if short else "ok",
        found=str(soft),
        advice=f"ulimit -n {ENOUGH_FILES} or more" if short else "",
    )


def _port(number: int) -> Finding:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            return Finding(
                what=f"port {number}", state="error", found=str(error.strerror), advice="choose another port"
            )
    name = "loopback ports" if number == 0 else f"port {number}"
    return Finding(what=name, state="ok", found="free")
