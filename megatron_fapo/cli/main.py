"""`fapo`: one file per command; a command's heavy imports happen when it runs, so that `--help` is light."""

import sys
from importlib.metadata import version as installed_version
from typing import Annotated

import typer
from rich.console import Console

from megatron_fapo.cli import (
    bench_judge,
    build_critic_data,
    convert,
    doctor,
    eval,
    plan,
    prepare_data,
    report,
    serve,
    servers,
    submit,
    train,
)
from megatron_fapo.errors import FapoError

app = typer.Typer(
    name="fapo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Reinforcement learning that makes reasoning models right for the right reasons: FAPO on Megatron-core.",
)
for command in (
    train,
    eval,
    serve,
    servers,
    convert,
    report,
    bench_judge,
    build_critic_data,
    prepare_data,
    submit,
    plan,
    doctor,
):
    app.command(name=command.__name__.rpartition(".")[2].replace("_", "-"), epilog=command.EXAMPLE)(command.command)


def _print_version(asked: bool) -> None:
    if asked:
        Console().print(installed_version("megatron-fapo"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Entry point: our own errors become one line on stderr and exit code 1."""
    try:
        app()
    except FapoError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: ", end="")
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
