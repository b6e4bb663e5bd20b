"""What a reader of the report sees and does, in headless Chromium."""

import json
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from megatron_fapo.critique.paragraphs import split
from megatron_fapo.observe.report.arms import arms_of
from megatron_fapo.observe.report.browser import chosen_groups
from megatron_fapo.observe.report.build import write_report
from megatron_fapo.observe.report.live import serve_report
from megatron_fapo.observe.rollouts import RolloutRow
from megatron_fapo.observe.runs import RunRecord
from megatron_fapo.observe.timeline import read_timeline
from tests.observe.synthetic import HOSTILE, STEPS, write_run

MARKS = """all => all.map(one => [one.dataset.id, [".by-judge", ".by-oracle"].map(kind =>
  [...one.querySelectorAll(kind)].map(p => [Number(p.dataset.index), p.querySelector(".words").textContent]))])"""

ADD_SCRIPT = """document.body.append(
  Object.assign(document.createElement("script"), {text: "window.hacked = 4"}))"""

UNNAMED = """[...document.querySelectorAll("button, select, input, [role=region], [role=img]")]
  .filter(one => !(one.getAttribute("aria-label") || one.labels?.length || one.textContent.trim()))
  .map(one => one.outerHTML)"""

COLOURED = (
    "h1", ".soft", "nav a", ".calm", ".why", "summary", ".tile h3", ".chip", ".words", ".index", ".facts", "button",
    ".name", ".about", ".stack i",
)  # fmt: skip

CONTRAST = """selector => {
  const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  return [...document.querySelectorAll(selector)].map(one => {
    let ground = one;
    while (/, 0\\)$|transparent/.test(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
    const colours = [getComputedStyle(one).color, getComputedStyle(ground).backgroundColor];
    const [low, high] = colours.map(light).sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  });
}"""
"""Contrast ratio of each element's text to what lies behind it (WCAG 2.1, 1.4.3)."""


@pytest.fixture(scope="module")
def chromium(require_tool):
    from playwright.sync_api import sync_playwright

    path = require_tool("chromium")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", *quiet]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


class Reader:
    """A page that is open, with everything it complained about or asked for."""

    def __init__(self, chromium, path: Path, width: int = 1280, scheme: str = "light") -> None:
        size = {"width": width, "height": 900}
        self.page = chromium.new_page(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def shown(self) -> list[str]:
        return self.page.locator(".rollout").evaluate_all("all => all.map(one => one.dataset.id)")


@pytest.fixture(scope="session")
def report_file(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    write_report(runs, out)
    return out


@pytest.fixture
def reader(chromium, report_file):
    opened = Reader(chromium, report_file)
    yield opened
    assert opened.complaints == []
    assert {url for url in opened.requests if not url.startswith("data:")} == {report_file.as_uri()}
    opened.page.close()


def rows_shown(runs: list[RunRecord], run: int, step: int) -> list[RolloutRow]:
    """The rows that the page holds of a run and step, in its order; fapo's runs come first."""
    ordered = [r for arm in arms_of(runs) for r in arm.runs]
    return [row for group in chosen_groups(ordered[run].rows(step))[0] for row in group]


def test_curves_of_all_runs_are_drawn(reader, runs):
    charts = reader.page.locator("figure.chart")
    assert charts.count() >= 9
    for chart in charts.all():
        paths = chart.locator("path").evaluate_all("all => all.map(p => [p.getAttribute('d'), p.getTotalLength()])")
        assert paths
        assert all(length > 20 and "NaN" not in d for d, length in paths)
    assert reader.page.locator("[data-metric='classes/fapo'] path.area").count() == 3
    assert reader.page.locator("[data-metric='flawed/oracle'] path.line").count() == len(runs)
    assert reader.page.locator("[data-metric='flawed/oracle'] path.bold").count() == 2
    assert reader.page.locator(".phase .stack").count() == len(runs)


def test_a_chart_is_read_by_keyboard(reader, runs):
    chart = reader.page.locator("[data-metric='flawed/oracle']")
    chart.locator("svg").focus()
    assert chart.locator(".readout").inner_text().startswith(f"step {STEPS - 1}: FAPO ")
    reader.page.keyboard.press("ArrowLeft")
    assert chart.locator(".readout").inner_text().startswith(f"step {STEPS - 2}: ")
    reader.page.keyboard.press("Home")
    assert chart.locator(".readout").inner_text().startswith("step 0: ")


def test_filters_steps_runs_and_search_by_click(reader, runs):
    rows = rows_shown(runs, 0, STEPS - 1)
    assert reader.shown() == [row.rollout_id for row in rows]
    tests = {
        "flagged": lambda r: r.verdict == "flawed",
        "flawed": lambda r: r.right and r.oracle not in (None, -1),
        "wrong": lambda r: not r.right,
        "clean": lambda r: r.right and r.verdict != "flawed" and r.oracle == -1,
    }
    for name, test in tests.items():
        reader.page.locator(f"[data-filter={name}]").click()
        assert reader.shown() == [row.rollout_id for row in rows if test(row)]
        assert reader.page.locator("[aria-pressed=true][data-filter]").count() == 1
    reader.page.locator("[data-filter=all]").click()
    reader.page.locator("[data-step='0']").click()
    assert reader.shown() == [row.rollout_id for row in rows_shown(runs, 0, 0)]
    reader.page.locator("#run").select_option(label="grpo seed 2")
    rows = rows_shown(runs, 3, 0)
    assert reader.shown() == [row.rollout_id for row in rows]
    reader.page.locator("#search").fill(rows[9].rollout_id.upper())
    assert reader.shown() == [rows[9].rollout_id]
    assert "4 are left out" in reader.page.locator(".count").inner_text()


def test_filters_and_rollouts_by_keyboard(reader, runs):
    rows = rows_shown(runs, 0, STEPS - 1)
    reader.page.locator("[data-filter=all]").focus()
    reader.page.keyboard.press("Tab")
    reader.page.keyboard.press("Enter")
    flagged = [row.rollout_id for row in rows if row.verdict == "flawed"]
    assert reader.shown() == flagged
    focused = "document.activeElement.dataset.id"
    reader.page.keyboard.press("j")
    reader.page.keyboard.press("j")
    assert reader.page.evaluate(focused) == flagged[1]
    reader.page.keyboard.press("k")
    assert reader.page.evaluate(focused) == flagged[0]
    reader.page.keyboard.press("/")
    assert reader.page.evaluate("document.activeElement.id") == "search"
    reader.page.locator("[data-step='0']").focus()
    reader.page.keyboard.press("Space")
    assert reader.page.evaluate("document.activeElement.dataset.step") == "0"
    assert reader.page.locator("[data-step='0']").get_attribute("aria-pressed") == "true"


def test_the_first_wrong_step_is_marked_in_the_right_paragraph(reader, runs):
    reader.page.locator("[data-step='0']").click()
    found = dict(reader.page.locator(".rollout").evaluate_all(MARKS))
    rows = rows_shown(runs, 0, 0)
    assert len(found) == len(rows)
    for row in rows:
        for marks, index in zip(found[row.rollout_id], (row.first_wrong, row.oracle), strict=True):
            expected = [] if index in (None, -1) else [[index, split(row.text)[index]]]
            assert marks == expected, row.rollout_id
    differing = [row for row in rows if row.first_wrong not in (None, -1) and row.first_wrong != row.oracle]
    assert differing, "the fixture needs a rollout in which judge and oracle differ"
    both = reader.page.locator(".by-judge:not(.by-oracle)").first
    oracle = reader.page.locator(".by-oracle:not(.by-judge)").first
    assert both.inner_text().endswith("⚑ judge")
    assert oracle.inner_text().endswith("◆ oracle")


def test_scripts_in_model_text_are_shown_and_never_executed(chromium, hostile_run, tmp_path):
    write_report([hostile_run], tmp_path / "report.html")
    opened = Reader(chromium, tmp_path / "report.html")
    assert opened.page.evaluate("window.hacked") is None
    words = opened.page.locator(".rollout .words").evaluate_all("all => all.map(one => one.textContent)")
    assert words == list(split(HOSTILE)) * 2
    assert opened.page.locator("main img, main script").count() == 0
    for place in (".tile h3", ".name", ".phase span", "#run option"):
        assert "</script><b>fapo</b>" in opened.page.locator(place).first.text_content(), place
    assert opened.complaints == []
    opened.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 4'}))"
    )
    assert opened.page.evaluate("window.hacked") is None, "the policy must refuse scripts that are not the page's own"
    opened.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_no_horizontal_scroll_and_text_can_be_read(chromium, report_file, scheme):
    opened = Reader(chromium, report_file, width=360, scheme=scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 360
    assert opened.complaints == []
    for selector in COLOURED:
        values = opened.page.evaluate(CONTRAST, selector)
        assert values, selector
        assert min(values) >= 4.5, (selector, min(values))
    opened.page.close()


def test_the_gantt_shows_each_phase_where_it_was(reader, runs):
    chart = reader.page.locator(".gantt svg")
    assert reader.page.locator("#gantt [role=status]").inner_text() == f"steps {STEPS - 3} to {STEPS - 1}"
    reader.page.locator("[data-steps='1']").click()
    times = read_timeline(arms_of(runs)[0].runs[0].path)[-1]
    drawn = dict(
        chart.locator("rect").evaluate_all("all => all.map(b => [b.dataset.name, Number(b.getAttribute('x'))])")
    )
    began = {span.name: span.start for span in times.spans if span.name != "step"}
    scale = (drawn["update"] - drawn["publish"]) / (began["update"] - began["publish"])
    assert scale > 50, "pixels a second"
    for name, start in began.items():
        assert drawn[name] - drawn["publish"] == pytest.approx(scale * (start - began["publish"]), abs=2), name
    assert set(drawn) == {"publish", "generate", "judge", "judge_exposed", "update"}
    reader.page.locator("#earlier").click()
    assert reader.page.locator("#gantt [role=status]").inner_text() == f"step {STEPS - 2}"
    chart.focus()
    reader.page.keyboard.press("Home")
    assert chart.get_attribute("aria-label").startswith("step 0 takes ")
    assert reader.page.locator("#earlier").is_disabled()
    reader.page.locator("#gantt-run").select_option(label="grpo seed 1")
    assert chart.locator("rect[data-name=judge]").count() == 0, "plain GRPO asks no judge"


def test_a_view_of_the_rollouts_stands_in_the_address(reader, runs):
    reader.page.locator("#run").select_option(label="grpo seed 1")
    reader.page.locator("[data-step='0']").click()
    reader.page.locator("[data-filter=wrong]").click()
    reader.page.locator("#search").fill("clock")
    shown = reader.shown()
    assert shown
    reader.page.reload()
    assert reader.shown() == shown
    assert reader.page.locator("#run option:checked").inner_text() == "grpo seed 1"
    assert reader.page.locator("#search").input_value() == "clock"


def test_served_live_the_page_takes_new_steps(chromium, tmp_path):
    run = tmp_path / "run"
    with serve_report([run], 0) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            page = chromium.new_page()
            page.goto(address)
            assert "no such run folder" in page.locator("p").first.inner_text()
            write_run(run, "fapo", 1, 4)
            page.wait_for_selector("#follow")
            charts = page.locator("[data-metric='flawed/oracle'] svg")
            assert "complete" in page.locator("#runs").inner_text()
            lines = (run / "metrics.jsonl").read_text()
            (run / "metrics.jsonl").write_text(lines + lines.splitlines()[-1].replace('"step": 3', '"step": 4') + "\n")
            page.wait_for_function("document.querySelector('[data-metric=\"flawed/oracle\"] .readout') !== null")
            page.wait_for_function(
                "() => JSON.parse(document.getElementById('curves-data').textContent)[0].arms[0].lines[0].length === 5"
            )
            page.locator("#follow").uncheck()
            (run / "failure.json").write_text(json.dumps({"error": "Diverged", "message": "loss is nan", "at": "x"}))
            page.locator("#now").click()
            page.wait_for_selector("text=The run ended with Diverged: loss is nan")
            assert not page.locator("#follow").is_checked(), "the reader's choice is kept"
            assert charts.count() == 1
            page.close()
            foreign = Request(f"{address}/", headers={"Host": "evil.example:80"})
            with pytest.raises(HTTPError, match="403"):
                urlopen(foreign)
        finally:
            server.shutdown()
            thread.join()


def test_every_control_has_a_name(reader):
    assert reader.page.evaluate(UNNAMED) == []
    for link in reader.page.locator("nav a").evaluate_all("all => all.map(a => a.getAttribute('href'))"):
        assert reader.page.locator(f"section{link} > h2").count() == 1, link
    reader.page.locator("nav a", has_text="Time").click()
    assert abs(reader.page.locator("#time").bounding_box()["y"]) < 100
    assert reader.page.locator("h1").count() == 1
