"""`fapo serve`: a generation server."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: fapo serve configs/clock/warm-start/policy --port 30000"


def command(
    model: Annotated[Path, typer.Argument(help="Folder of a Hugging Face model.")],
    host: Annotated[str, typer.Option(help="Address to bind; other than loopback needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 30000,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key of a `servers` section.")
    ] = None,
) -> None:
    """Serve a model with the embedded engine and the part of SGLang's HTTP API that training uses."""
    from megatron_fapo.serving.engine.main import serve
    from megatron_fapo.serving.settings import ServerSettings
    from megatron_fapo.settings import build

    serve(
        build(ServerSettings, {"model": str(model), "host": host, "port": port}, settings or ()),
        ready=lambda url: typer.echo(f"{model} is served at {url}"),
    )
