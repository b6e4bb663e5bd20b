"""`fapo submit`: a run as a Slurm job."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jinja2
import typer

from megatron_fapo.cli.arguments import ConfigPath, Overrides
from megatron_fapo.cli.train import STOPPED
from megatron_fapo.config import Config, read_config
from megatron_fapo.errors import ConfigError
from megatron_fapo.surroundings import check_surroundings

EXAMPLE = "Example: fapo submit configs/clock/fapo.yaml --nodes 2 --dry-run policy.parallel.data=2"
TEMPLATE = Path(__file__).parent / "assets" / "job.sbatch"
TIME_LIMIT = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
"""What sbatch takes: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS and so on."""
RAY_DEADLINE = 300
"""Seconds for Ray to start on the first node."""


def command(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus-per-node", min=0, help="GPUs of each node; 0 trains on CPUs.")] = 0,
    cpus: Annotated[int | None, typer.Option("--cpus-per-task", min=1, help="CPU cores of each node.")] = None,
    time: Annotated[
        str, typer.Option(help="Time limit in Slurm's notation; at its end the job queues itself again.")
    ] = ("04:00:00"),
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm quality of service.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run folder, seen by all nodes. [default: runs/CONFIG-sSEED]")
    ] = None,
    container: Annotated[str | None, typer.Option(help="Image for pyxis/enroot; without it the job runs bare.")] = None,
    mount: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE:TARGET", help="Folder to mount into the container.")
    ] = None,
    interface: Annotated[str, typer.Option(help="Network interface of Ray. [default: that of the node's name]")] = "",
    setup: Annotated[
        list[str] | None, typer.Option(metavar="LINE", help="Shell line before the run (modules, NCCL variables).")
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Any other option of sbatch, without dashes.")
    ] = None,
    warn_before: Annotated[
        int, typer.Option(min=1, help="Seconds before the time limit at which the run saves.")
    ] = 300,
    requeue: Annotated[bool, typer.Option(help="Queue the job again when its time limit comes before its end.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script and stop.")] = False,
) -> None:
    """Submit a run to Slurm: Ray on every node, the loop on the first; it saves, queues itself again, and resumes."""
    on_slurm = [*(overrides or ()), f"cluster.nodes={nodes}", "cluster.ray_address=set-by-the-job"]
    settings = read_config(config, on_slurm)
    if not TIME_LIMIT.fullmatch(time):
        raise ConfigError(f"--time {time}: write it as Slurm does: MINUTES, HOURS:MINUTES:SECONDS, or DAYS-HOURS")
    check_gpus(settings, gpus)
    if container is None:  # in a container other paths may hold
        check_surroundings(settings)
    folder = (run or Path("runs") / f"{config.stem}-s{settings.train.seed}").resolve()
    script = render(
        name=f"fapo-{folder.name}",
        nodes=nodes,
        ranks_per_node=settings.policy.parallel.world // settings.cluster.training_nodes,
        options=[*slurm_options(gpus, cpus, time, partition, account, qos), *(sbatch or ())],
        run=str(folder),
        workdir=str(Path.cwd()),
        config=str(config),
        overrides=overrides or (),
        interface=interface,
        setup=setup or (),
        container=container_flags(container, mount or ()),
        warn_before=warn_before,
        requeue=requeue,
        **programs(container),
    )
    if dry_run:
        typer.echo(script, nl=False)
        return
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not on the PATH: run this on a login node of a Slurm cluster, or add --dry-run")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.sbatch"
    path.write_text(script)
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"sbatch refused {path}: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]
    typer.echo(f"job {job}: {path}\nfollow it with: tail -F {folder}/slurm-{job}.log")


def check_gpus(config: Config, gpus: int) -> None:
    """Refuse a job whose nodes have GPUs, but fewer than ranks. Raises ConfigError."""
    ranks = config.policy.parallel.world // config.cluster.training_nodes
    if 0 < gpus < ranks:
        raise ConfigError(
            f"--gpus-per-node {gpus} is less than the {ranks} ranks that policy.parallel puts on each node"
        )


def slurm_options(
    gpus: int, cpus: int | None, time: str, partition: str | None, account: str | None, qos: str | None
) -> list[str]:
    """Options of sbatch, without dashes."""
    named = {"time": time, "partition": partition, "account": account, "qos": qos, "cpus-per-task": cpus}
    given = [f"{name}={value}" for name, value in named.items() if value is not None]
    return [*given, *([f"gpus-per-node={gpus}", "exclusive"] if gpus else [])]


def container_flags(image: str | None, mounts: Sequence[str]) -> list[str]:
    """What srun is told so that pyxis runs a step in the image. Raises ConfigError for a mount without a colon."""
    if image is None:
        if mounts:
            raise ConfigError("--mount needs --container")
        return []
    for mount in mounts:
        if not re.fullmatch(r"[^:,]+:[^:,]+(:[\w+]+)?", mount):
            raise ConfigError(f"--mount {mount}: SOURCE:TARGET is needed")
    own = [f"{Path.cwd()}:{Path.cwd()}", *mounts]
    return [
        f"--container-image={image}",
        f"--container-mounts={','.join(own)}",
        "--no-container-mount-home",
        f"--container-workdir={Path.cwd()}",
    ]


def programs(container: str | None) -> dict[str, str]:
    """The commands that the job calls: those of this environment, or the image's own."""
    folder = Path(sys.executable).parent
    return {name: name if container else str(folder / name) for name in ("fapo", "ray")}


def render(**values: Any) -> str:
    """The batch script."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["quote"] = shlex.quote
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(**values, stopped=STOPPED, ray_deadline=RAY_DEADLINE)
