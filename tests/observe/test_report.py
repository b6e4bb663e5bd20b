"""What the report says, without a browser."""

import json
import re
from itertools import pairwise

import pytest

from megatron_fapo.critique.paragraphs import split
from megatron_fapo.errors import DataError
from megatron_fapo.observe.report.arms import arms_of, labels
from megatron_fapo.observe.report.browser import GROUPS, chosen_groups, chosen_steps
from megatron_fapo.observe.report.build import render, write_report
from megatron_fapo.observe.report.curves import mean_line, smooth
from megatron_fapo.observe.report.findings import failures, findings
from megatron_fapo.observe.report.overview import differences, headline
from megatron_fapo.observe.report.trace import write_trace
from megatron_fapo.observe.rollouts import RolloutRow
from megatron_fapo.observe.runs import read_run
from tests.observe.synthetic import HOSTILE, STEPS, write_run


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
