"""`fapo report`: a page that compares runs."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: fapo report runs/grpo-s1 runs/fapo-s1 --out report.html"


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("report.html"),
    summary: Annotated[Path | None, typer.Option(help="Also write the last ten steps' averages as JSON.")] = None,
) -> None:
    """Write one self-contained HTML file: curves of all runs, phase times, and a rollout browser."""
    import json

    from megatron_fapo.observe.report.build import write_report
    from megatron_fapo.observe.runs import read_run, summarise

    records = [read_run(path) for path in runs]
    write_report(records, out)
    if summary is not None:
        summary.write_text(json.dumps(summarise(records), indent=2) + "\n")
    typer.echo(f"{out}: {len(records)} run(s)")
