"""One self-contained HTML page that compares runs.

The page asks for nothing outside itself, and its Content-Security-Policy would refuse it; served live (`live`), it
asks the server that it came from whether there is more. Text of models enters in two ways only: escaped
(`page.text`), or inside JSON (`page.data_script`) that browser.js shows as text nodes.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from string import Template

from megatron_fapo.errors import DataError
from megatron_fapo.observe.interface import files_of
from megatron_fapo.observe.report.arms import arms_of, labels
from megatron_fapo.observe.report.browser import browser
from megatron_fapo.observe.report.curves import WINDOW, constants, curves
from megatron_fapo.observe.report.findings import failures_table, findings_list
from megatron_fapo.observe.report.gantt import gantt
from megatron_fapo.observe.report.overview import (
    differences,
    headline,
    measured_by,
    phases,
    run_details,
    table,
    tiles,
)
from megatron_fapo.observe.report.page import data_script, element, text
from megatron_fapo.observe.runs import LAST, RunRecord

ASSETS = Path(__file__).parents[1] / "assets"
SCRIPTS = ("charts.js", "gantt.js", "browser.js")


def write_report(runs: Sequence[RunRecord], out: Path) -> None:
    """Write the page that compares `runs`. Raises DataError when rollouts are damaged or `out` cannot be written."""
    page = render(runs)
    with files_of(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")


def render(runs: Sequence[RunRecord], live: str = "") -> str:
    """The page. Served live, `live` is the state of the runs' files that it shows (`live.version`)."""
    if not any(run.steps for run in runs):
        raise DataError("nothing to report: no training step is finished in any of the runs")
    arms = arms_of(runs)
    in_order = [run for arm in arms for run in arm.runs]
    labelled = list(zip(labels(in_order), in_order, strict=True))
    names = (*SCRIPTS, "live.js") if live else SCRIPTS
    script = "".join((ASSETS / name).read_text(encoding="utf-8") for name in names)
    still = constants(arms)
    _, words = measured_by(arms)
    finding = headline(arms)
    basis = f"Share of right answers that are flawed by {words}; means" if words else "Means"
    return Template((ASSETS / "page.html").read_text(encoding="utf-8")).substitute(
        title=text(finding),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        connect="connect-src 'self'; " if live else "",
        live=element("p", id="live", role="status", data_version=live, class_="soft") if live else "",
        findings=findings_list(labelled),
        failures=failures_table(labelled),
        constants=element("p", text(f"Never moved: {still}."), class_="soft") if still else "",
        gantt_data=data_script("gantt-data", gantt(in_order)),
        differences=differences(in_order),
        style=(ASSETS / "style.css").read_text(encoding="utf-8"),
        headline=text(finding),
        basis=text(f"{basis} over the last {LAST} steps."),
        glance="glance many" if len(arms) > 3 else "glance",
        tiles=tiles(arms),
        table=table(arms),
        curves_note=text(
            f"Thin: one run each. Bold: the arm's mean over its seeds, running mean of {WINDOW} steps. "
            "Point at a chart, or focus it and use the arrow keys, to read values."
        ),
        phases=phases(in_order),
        runs=run_details(in_order),
        curves_data=data_script("curves-data", curves(arms)),
        rollouts_data=data_script("rollouts-data", browser(in_order)),
        script=script,
    )
