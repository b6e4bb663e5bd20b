"""One self-contained HTML page that compares runs."""

from collections.abc import Sequence
from pathlib import Path

from megatron_fapo.observe.runs import RunRecord


def write_report(runs: Sequence[RunRecord], out: Path) -> None:
    """Write the page."""
    out.write_text("")
