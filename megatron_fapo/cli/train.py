"""`fapo train`: run the loop."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from megatron_fapo.cli.arguments import ConfigPath, Overrides
from megatron_fapo.config import Config, dump_config, read_config
from megatron_fapo.errors import ConfigError, ResumeError
from megatron_fapo.records import RunState
from megatron_fapo.refresh import train_with_refreshes
from megatron_fapo.run.folder import RunFolder
from megatron_fapo.settings import flatten
from megatron_fapo.surroundings import check_surroundings, lacking

STOPPED = os.EX_TEMPFAIL
"""Exit status of a run that was asked to stop before its last step; its checkpoint is written."""
EXAMPLE = "Example: fapo train configs/clock/fapo.yaml train.steps=20 --run runs/first"


def command(
    config: ConfigPath,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/CONFIG-sSEED]")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the configuration, say what this machine lacks for it, then stop.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's newest checkpoint.")] = False,
) -> None:
    """Train a policy. SIGTERM or Ctrl-C saves a checkpoint and ends the run with exit status 75: --resume goes on."""
    settings = read_config(config, overrides or ())
    folder = RunFolder(run or Path("runs") / f"{config.stem}-s{settings.train.seed}")
    if check:
        _report(config, settings, folder)
        return
    check_surroundings(settings)
    if folder.started() and not resume:
        raise ConfigError(f"{folder.path} holds a run already: add --resume to go on, or choose another with --run")
    if resume:
        check_same_run(folder, settings)
    state = asyncio.run(train_with_refreshes(settings, folder, run_training, resume=resume))
    if state.step < settings.train.steps:
        raise typer.Exit(STOPPED)


def _report(path: Path, config: Config, folder: RunFolder) -> None:
    """What was checked, and what cannot be on this machine. Raises ConfigError for what is wrong on any."""
    lacks = lacking(config)
    what = f"{path}: {config.policy.parallel.world} training rank(s), run folder {folder.path}"
    if not lacks:
        typer.echo(f"{what}: all checks passed")
        return
    typer.echo(f"{what}: passed, as far as can be checked here. The run also needs:")
    for lack in lacks:
        typer.echo(f"- {lack}")


MAY_CHANGE = ("train.steps", "observe.", "checkpoint.", "evaluation.", "cluster.", "policy.threads", "policy.timeout")
MAY_CHANGE_OF_SERVERS = (
    *("host", "port", "count", "lend", "threads", "timeout", "api_key_file", "log_folder"),
    *("deadline", "restarts", "health_interval", "router"),
)


def check_same_run(folder: RunFolder, config: Config) -> None:
    """Refuse to resume with a configuration that would make another run of it.

    What may change is how long the run is, what it shows and where it runs. Raises ResumeError naming every key.
    """
    if not folder.started():
        raise ResumeError(f"{folder.path}: no run was started here, so there is nothing to resume")
    before, now = flatten(read_config(folder.config).model_dump(mode="json")), flatten(config.model_dump(mode="json"))
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not key.startswith(MAY_CHANGE)
        and not (key.startswith("servers.") and key.endswith(MAY_CHANGE_OF_SERVERS))
    ]
    if changed:
        raise ResumeError(f"{folder.path} was started with another configuration: {'; '.join(changed)}")


async def run_training(
    config: Config, folder: RunFolder, *, resume: bool, of: Config | None = None, new_judge: bool = False
) -> RunState:
    """One run from start (or its newest whole checkpoint) to its end; returns where it ended. `of` and `new_judge`: as
    `refresh.Trainer`."""
    from megatron_fapo.cluster.cluster import open_cluster
    from megatron_fapo.cluster.serve_roles import Watcher
    from megatron_fapo.observe.model_card import write_card
    from megatron_fapo.observe.sinks import open_sinks
    from megatron_fapo.train import train_to_the_end

    folder.create()
    checkpoints = folder.resumable() if resume else []
    newest = checkpoints[0][1] if checkpoints else RunState(step=0, cursor=0)
    folder.config.write_text(dump_config(of or config))
    dumped = (of or config).model_dump(mode="json")
    with open_sinks(config.observe, folder.path, config=dumped, resume_step=newest.step) as sinks:
        watcher = Watcher(
            landed=sinks.progress,
            judged=sinks.judged,
            retried=sinks.retried,
            moved=sinks.moved,
            restarted=sinks.restarted,
            worked=sinks.worked,
        )
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with open_cluster(config, folder, watcher, stop) as cluster:
            state = await cluster.recovery.restore(cluster) if resume else newest
            if state != newest:  # it was damaged
                sinks.rewind(state.step)
            if new_judge:
                state = replace(state, audit=())
            state = await train_to_the_end(config, cluster, state, sinks)
    if state.step == config.train.steps and config.checkpoint.export_hf:
        write_card(folder.path, folder.model)
    return state
