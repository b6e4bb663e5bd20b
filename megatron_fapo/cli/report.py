"""`fapo report`: a page that compares runs, written as one file or served while they go on."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: fapo report runs/grpo-s1 runs/fapo-s1 --out report.html"


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("report.html"),
    summary: Annotated[Path | None, typer.Option(help="Also write the last ten steps' averages as JSON.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Also write the phases as a Chrome trace, for ui.perfetto.dev.")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page on this machine instead, live while the runs go on.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0 picks a free one.")] = 8750,
) -> None:
    """Write one self-contained HTML file: what needs a look, curves, phases, failures, and a rollout browser."""
    import json

    from megatron_fapo.observe.report.build import write_report
    from megatron_fapo.observe.report.trace import write_trace
    from megatron_fapo.observe.runs import read_run, summarise

    if serve:
        _serve(runs, port)
        return
    records = [read_run(path) for path in runs]
    write_report(records, out)
    if summary is not None:
        summary.write_text(json.dumps(summarise(records), indent=2) + "\n")
    if trace is not None:
        write_trace(records, trace)
    typer.echo(f"{out}: {len(records)} run(s)")


def _serve(runs: list[Path], port: int) -> None:
    """Until Ctrl-C or SIGTERM."""
    import signal
    import threading

    from megatron_fapo.observe.report.live import serve_report

    with serve_report(runs, port) as server:
        typer.echo(
            f"http://{server.server_address[0]!s}:{server.server_port}/ shows {len(runs)} run(s); Ctrl-C ends it"
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            # shutdown waits for the serving loop, which this handler interrupts: another thread has to call it
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        server.serve_forever()
