"""The report: what it says (without a browser), and what a reader sees and does (in headless Chromium)."""

import json
import re
from itertools import pairwise
from pathlib import Path
from random import Random
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from megatron_fapo.config import dump_config
from megatron_fapo.critique.paragraphs import split
from megatron_fapo.errors import DataError
from megatron_fapo.observe.report.arms import arms_of, labels
from megatron_fapo.observe.report.browser import GROUPS, chosen_groups, chosen_steps
from megatron_fapo.observe.report.build import render, write_report
from megatron_fapo.observe.report.curves import mean_line, smooth
from megatron_fapo.observe.report.findings import failures, findings
from megatron_fapo.observe.report.live import serve_report
from megatron_fapo.observe.report.overview import differences, headline
from megatron_fapo.observe.report.trace import write_trace
from megatron_fapo.observe.rollouts import RolloutRow
from megatron_fapo.observe.runs import RunRecord, read_run
from megatron_fapo.observe.sinks import open_sinks
from megatron_fapo.observe.timeline import read_timeline
from megatron_fapo.records import Group, Judged, Outcome, Prompt, Rollout, Verdict, VersionSpan, floats, ints
from tests.observe.synthetic import HandClock, config_of, make_report, write_run, write_step

HOSTILE = (
    "<script>window.hacked = 1</script>\n\n</script><script>window.hacked = 2</script>\n\n"
    "<!-- <script> \u2028 & &lt;\n\n<img src=x onerror='window.hacked = 3'>\n\n\\boxed{1}"
)
STEPS = 20


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> list[RunRecord]:
    root = tmp_path_factory.mktemp("runs")
    return [
        read_run(write_run(root / f"{arm}-{seed}", arm, seed, STEPS)) for arm in ("grpo", "fapo") for seed in (1, 2)
    ]


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory) -> RunRecord:
    """A run whose model, task and arm all try to get out of the page."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    config = config_of("fapo", 1, "train.arm='</script><b>fapo</b>'")
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    rollouts = [
        Rollout(
            id=f"s0-p0-r{i}", prompt_id="p0", token_ids=ints([1, 2]), logprobs=floats([0.0, 0.0]), seed=1, text=HOSTILE,
            versions=(VersionSpan(start=0, version=0),), temperature=1.0, finish_reason="stop",
        )
        for i in range(2)
    ]  # fmt: skip
    right = Outcome(right=True, score=1.0, answer="</script>", why="equal")
    wrong = Outcome(right=False, score=-1.0, answer=None, why="no answer")
    verdict = Verdict(first_wrong=2, p_flawed=1.0, votes=1, tokens=3, text=HOSTILE)
    prompt = Prompt(id="p0", task="t", question=HOSTILE, messages=(), token_ids=ints([1]), reference_answer="<i>1</i>")
    members = (
        Judged(rollout=rollouts[0], outcome=right, verdict=verdict, oracle=1),
        Judged(rollout=rollouts[1], outcome=wrong, verdict=verdict, oracle=None),
    )
    group = Group(step=0, prompt=prompt, judged=members)
    clock, rng = HandClock(), Random(0)
    with open_sinks(config.observe, folder, config=config.model_dump(mode="json"), clock=clock) as sinks:
        write_step(sinks, clock, [group], make_report(0, 0.0, rng), config.algorithm, rng)
    return read_run(folder)


def embedded(page: str, name: str) -> list:
    """The JSON that an HTML parser would hand to the script: up to the first closing tag."""
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script', page, re.S)[1])


def test_the_page_is_one_file_that_names_no_address(runs):
    page = render(runs)
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!data:,|#)[a-z]+:", page)
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}


def test_the_headline_compares_the_last_ten_steps(runs):
    arms = arms_of(runs)
    assert [arm.name for arm in arms] == ["fapo", "grpo"]
    assert [run.info.seed for run in arms[0].runs] == [1, 2]
    fapo, grpo = (arm.mean("flawed/oracle") for arm in arms)
    assert fapo < grpo
    assert headline(arms) == f"FAPO: {100 * (1 - fapo / grpo):.0f} % fewer flawed right answers than GRPO"
    assert headline(arms[:1]) == f"Flawed right answers: FAPO {100 * fapo:.1f} %"


def test_many_arms_are_told_in_a_line_and_what_they_share_once(tmp_path):
    many = [f"arm-{number}" for number in range(6)]
    runs = [read_run(write_run(tmp_path / name, "fapo", 1, 2, f"train.arm={name}")) for name in many]
    assert re.fullmatch(
        r"Flawed right answers of 6 arms: [\d.]+ % \(arm-\d\) to [\d.]+ % \(arm-\d\)", headline(arms_of(runs))
    )
    for run in runs:
        (run.path / "failure.json").write_text(json.dumps({"error": "Diverged", "message": "nan", "at": "now"}))
    same = [runs[0]] * 3
    page = render(same)
    assert page.count('class="bad"') == 1
    assert " and 2 more" in page


def test_all_seeds_are_shown_and_alike_runs_get_their_folders_name(runs):
    curves = embedded(render(runs), "curves-data")
    assert curves[0]["metric"] == "flawed/oracle"
    for arm in curves[0]["arms"]:
        assert arm["seeds"] == [1, 2]
        assert [len(line) for line in arm["lines"]] == [STEPS, STEPS]
    assert labels([runs[0], runs[0], runs[1]]) == ["grpo seed 1 (grpo-1)", "grpo seed 1 (grpo-1)", "grpo seed 2"]


def test_mean_line_and_running_mean():
    assert mean_line([[(0, 1.0), (1, 3.0)], [(1, 5.0), (2, 7.0)]]) == [(0, 1.0), (1, 4.0), (2, 7.0)]
    line = [(step, float(step)) for step in range(20)]
    assert smooth(line)[2:-2] == line[2:-2]
    assert smooth(line)[0] == (0, 1.0)
    assert smooth(line[:14]) == line[:14]


def test_rollouts_kept_are_chosen_by_rule(runs):
    assert chosen_steps(list(range(0, 60, 2))) == [0, 30, 58]
    assert chosen_steps([4]) == [4]
    rows = runs[-1].rows(STEPS - 1)
    kept, total = chosen_groups(rows)
    assert (len(kept), total) == (GROUPS, 16)
    flawed = [any(r.right and (r.verdict == "flawed" or r.oracle not in (None, -1)) for r in group) for group in kept]
    assert flawed == sorted(flawed, reverse=True)
    assert True in flawed
    assert chosen_groups(rows) == (kept, total)


def test_long_texts_are_left_out_but_never_all():
    row = dict.fromkeys(RolloutRow.__dataclass_fields__) | {"text": "x" * 400_000, "right": False}
    rows = [RolloutRow(**{**row, "prompt_id": f"p{i}"}) for i in range(3)]
    assert [len(kept) for kept in chosen_groups(rows)[:1]] == [1]


def test_hostile_text_comes_back_as_it_was(hostile_run):
    page = render([hostile_run])
    assert "window.hacked" not in re.sub(r"<script type=\"application/json\".*?</script>", "", page, flags=re.S)
    rollout = embedded(page, "rollouts-data")[0]["steps"][0]["groups"][0]["rollouts"][0]
    assert rollout["paragraphs"] == list(split(HOSTILE))
    assert rollout["judgeText"] == HOSTILE


def test_damaged_rollouts_and_an_unwritable_place_are_named(runs, tmp_path):
    run = read_run(write_run(tmp_path / "run", "fapo", steps=1))
    run.rollouts[0].write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"step-000000\.parquet"):
        write_report([run], tmp_path / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        write_report(runs, tmp_path / "file" / "report.html")


def test_a_run_without_rollouts_and_without_an_oracle_has_a_page(tmp_path):
    run = write_run(tmp_path / "run", "fapo", 1, 3, "observe.rollouts=false", "observe.report=true")
    page = (run / "report.html").read_text()
    assert embedded(page, "rollouts-data") == []
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bare = [{n: v for n, v in line.items() if "oracle" not in n and "judge" not in n} for line in kept]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bare))
    assert "Right answers: FAPO" in render([read_run(run)])


def test_what_needs_a_look_is_said_with_what_to_do(tmp_path):
    folder = write_run(tmp_path / "run", "fapo", 1, 30)
    assert findings(read_run(folder)) == []
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    spoiled = {
        "audit/alarm": 1.0, "mismatch/mean": 0.2, "rollout/truncated_share": 0.4, "judge/asked": 50.0,
        "judge/failed": 5.0, "time/judge_exposed": 2.0, "time/step": 4.0, "train/imbalance": 2.0,
    }  # fmt: skip
    changed = [{**line, **(spoiled if line["step"] >= 20 else {})} for line in lines]
    changed[-1]["train/grad_norm_max"] = 1e4
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    (folder / "failure.json").write_text(json.dumps({"error": "Diverged", "message": "loss is nan", "at": "now"}))
    found = findings(read_run(folder))
    assert [finding.level for finding in found] == ["bad"] * 3 + ["look"] * 6
    for words in ("Diverged: loss is nan", "J's interval", "0.2 nats", "40 % of the rollouts", "10.0 % of the verdicts",
                  "50 % of a step", "2 times the mean", "has grown to", "step 29"):  # fmt: skip
        assert len([f for f in found if words in f.what]) == 1, words
    page = render([read_run(folder)])
    assert page.count('class="bad"') == 3
    assert "failed after step 29" in page


def test_failures_are_counted_by_name(runs):
    run = arms_of(runs)[0].runs[0]
    rows = [row for step in run.rollouts for row in run.rows(step)]
    failed = sum(row.verdict == "failed" for row in rows)
    assert failed
    found = failures(run)
    assert found["verdict failed", "no \\boxed{} in the last 300 characters"] == failed
    assert found["rollout cut off", "token limit"] == sum(row.finish_reason == "length" for row in rows)
    assert "no \\boxed{} in the last 300 characters" in render(runs)


def test_settings_that_differ_are_shown(runs):
    shown = differences(runs)
    assert "judge.enabled" in shown
    assert "train.seed" not in shown
    assert differences(runs[:2]) == ""


def test_a_trace_has_every_phase_in_order(runs, tmp_path):
    write_trace(runs, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == set(labels(runs))
    steps = [event for event in events if event["pid"] == 0 and event["ph"] == "X" and event["tid"] == 0]
    assert [event["name"] for event in steps] == [f"step {number}" for number in range(STEPS)]
    assert all(one["ts"] + one["dur"] <= other["ts"] + 1 for one, other in pairwise(steps))
    inside = [event for event in events if event["ph"] == "X" and event["pid"] == 0 and event["args"]["step"] == 7]
    whole = next(event for event in inside if event["tid"] == 0)
    assert {event["name"] for event in inside} == {"step 7", "publish", "generate", "update"}
    assert whole["dur"] == pytest.approx(1e6 * dict(runs[0].series("time/step"))[7], abs=5)
    assert sum(event["dur"] for event in inside) == pytest.approx(2 * whole["dur"], abs=5), "phases fill the step"
    assert {event["name"] for event in events if event["ph"] == "C"} >= {"flawed/oracle", "time/step_rate"}
    with pytest.raises(DataError, match="nothing to trace"):
        write_trace([], tmp_path / "none.json")


# --- in a browser

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
