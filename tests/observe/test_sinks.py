import json
from pathlib import Path
from random import Random

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_fapo.errors import DataError
from megatron_fapo.observe.interface import Sink, StepRecord
from megatron_fapo.observe.jsonl import JsonlSink, read_metrics
from megatron_fapo.observe.metrics import without_time
from megatron_fapo.observe.rollouts import RolloutsSink, read_rollouts, rollout_files
from megatron_fapo.observe.run_info import read_run_info
from megatron_fapo.observe.runs import read_run, summarise
from megatron_fapo.observe.sinks import open_sinks
from megatron_fapo.observe.tensorboard import TensorBoardSink
from megatron_fapo.observe.wandb import WandbSink
from megatron_fapo.records import NotJudged, Verdict
from tests.observe import wandb_files
from tests.observe.synthetic import config_of, make_groups, write_run

TRICKY = 0.1 + 0.2


def record(step: int, value: float = TRICKY) -> StepRecord:
    groups = tuple(make_groups("fapo", step, 0.5, Random(step))[:2])
    ids = [judged.rollout.id for group in groups[:1] for judged in group]
    return StepRecord(
        step=step,
        metrics={"reward/mean": value, "time/step": 1.5},
        groups=groups,
        rewards=dict.fromkeys(ids, 1.0),
        advantages=dict.fromkeys(ids, 0.25),
    )


class Kind:
    """A sink as the suite knows it: how to open one, and which steps lie in a folder."""

    def __init__(self, opened, steps, folder: Path) -> None:
        self._opened, self._steps, self.folder = opened, steps, folder

    def open(self, resume_step: int = 0) -> Sink:
        return self._opened(self.folder, resume_step)

    def steps(self) -> list[int]:
        return self._steps(self.folder)


def wandb_sink(folder: Path, resume_step: int) -> WandbSink:
    return WandbSink(folder, mode="offline", project="p", run_id="abc", name="n", group="g", config={"a": 1})


def tensorboard_steps(folder: Path) -> list[int]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [event.step for event in events.Scalars("reward/mean")]


def wandb_steps(folder: Path) -> list[int]:
    return sorted({int(row["step"]) for row in wandb_files.history(folder)})


KINDS = {
    "jsonl": (JsonlSink, lambda folder: [step for step, _ in read_metrics(folder / "metrics.jsonl")]),
    "rollouts": (RolloutsSink, lambda folder: list(rollout_files(folder))),
    "tensorboard": (TensorBoardSink, tensorboard_steps),
    "wandb": (wandb_sink, wandb_steps),
}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path) -> Kind:
    return Kind(*KINDS[request.param], tmp_path)


def test_conformance_steps_are_kept_and_close_may_come_twice(kind):
    sink = kind.open()
    for step in range(3):
        sink.write(record(step))
    sink.close()
    sink.close()
    assert kind.steps() == [0, 1, 2]


def test_conformance_a_run_taken_up_again_forgets_the_steps_done_again(kind):
    sink = kind.open()
    for step in range(5):
        sink.write(record(step))
    sink.close()
    sink = kind.open(resume_step=2)
    for step in range(2, 4):
        sink.write(record(step, value=9.0))
    sink.close()
    if isinstance(sink, WandbSink):  # it cannot forget; the later point of a step is the run's
        assert [row["step"] for row in wandb_files.history(kind.folder)] == [0, 1, 2, 3, 4, 2, 3]
    else:
        assert kind.steps() == [0, 1, 2, 3]


def test_conformance_a_step_without_rollouts_is_no_error(kind):
    sink = kind.open()
    sink.write(record(0))
    sink.write(StepRecord(step=1, metrics={"eval/right_share": 0.5}, rewards={}, advantages={}))
    sink.close()
    assert kind.steps()[0] == 0


def test_jsonl_floats_come_back_to_the_last_digit(tmp_path):
    sink = JsonlSink(tmp_path)
    sink.write(record(0))
    assert read_metrics(tmp_path / "metrics.jsonl") == [(0, {"reward/mean": TRICKY, "time/step": 1.5})]
    sink.close()


def test_jsonl_half_a_line_of_a_killed_run_is_repaired(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(tmp_path)
    for step in range(3):
        sink.write(record(step))
    sink.close()
    whole = path.read_bytes()
    for cut in (1, 5, 20):
        path.write_bytes(whole[:-cut])
        kept = [step for step, _ in read_metrics(path)]
        assert kept in ([0, 1], [0, 1, 2])
        JsonlSink(tmp_path, resume_step=2).close()
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])


def test_jsonl_damage_elsewhere_is_said_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "reward/mean": 1.0}\n{"step": 1, "rew\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2"):
        read_metrics(path)
    path.write_text('{"step": 1}\n{"step": 1}\n')
    with pytest.raises(DataError, match="step 1 after step 1"):
        read_metrics(path)


def test_rollouts_come_back_with_their_verdicts(tmp_path):
    written = record(4)
    sink = RolloutsSink(tmp_path)
    sink.write(written)
    rows = read_rollouts(rollout_files(tmp_path)[4])
    members = [(group, judged) for group in written.groups for judged in group]
    assert [row.rollout_id for row in rows] == [judged.rollout.id for _, judged in members]
    for row, (group, judged) in zip(rows, members, strict=True):
        assert (row.step, row.question, row.reference_answer) == (
            4,
            group.prompt.question,
            group.prompt.reference_answer,
        )
        assert (row.text, row.tokens, row.seed) == (
            judged.rollout.text,
            len(judged.rollout.token_ids),
            judged.rollout.seed,
        )
        assert (row.right, row.answer, row.oracle) == (judged.outcome.right, judged.outcome.answer, judged.oracle)
        assert row.versions == [4]
        if isinstance(judged.verdict, Verdict):
            assert (row.verdict, row.first_wrong) == (
                "flawed" if judged.verdict.flawed else "clean",
                judged.verdict.first_wrong,
            )
            assert row.judge_text == judged.verdict.text
        else:
            assert isinstance(judged.verdict, NotJudged)
            assert (row.verdict, row.first_wrong) == (judged.verdict.reason, None)
    half = len(written.groups[0])
    assert [row.reward for row in rows] == [1.0] * half + [None] * (len(rows) - half)  # the second group was dropped


def test_rollouts_damaged_or_foreign_files_are_named(tmp_path):
    RolloutsSink(tmp_path).write(record(0))
    path = rollout_files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"step-000000\.parquet"):
        read_rollouts(path)
    with pytest.raises(DataError, match=r"absent\.parquet"):
        read_rollouts(tmp_path / "absent.parquet")


def test_wandb_offline_writes_values_that_can_be_read_back_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    sink = wandb_sink(tmp_path, 0)
    sink.write(record(0))
    sink.close()
    assert wandb_files.history(tmp_path)[0]["reward/mean"] == TRICKY


def test_two_runs_of_the_same_steps_agree_but_for_the_clock(tmp_path):
    whole = read_run(write_run(tmp_path / "whole", "fapo"))
    killed = write_run(tmp_path / "killed", "fapo")
    write_run(killed, "fapo", first=4)
    again = read_run(killed)
    assert [(s, without_time(m)) for s, m in whole.lines] == [(s, without_time(m)) for s, m in again.lines]
    assert [whole.rows(5)] == [again.rows(5)]
    info = read_run_info(killed)
    assert len(info.resumed) == 1
    assert info.started <= info.resumed[0]


def test_an_evaluation_stands_in_its_step_and_the_last_one_alone(tmp_path):
    from megatron_fapo.config import dump_config
    from megatron_fapo.evaluate.kept import samples_of
    from megatron_fapo.evaluate.scores import summarise as summarise_evaluation

    config = config_of("fapo", 1, "observe.report=true")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    evaluation = summarise_evaluation(
        [samples_of(group) for group in make_groups("fapo", 0, 0.5, Random(1))], judge=True
    )
    with open_sinks(config.observe, tmp_path, config=config.model_dump(mode="json")) as sinks:
        sinks.write_evaluation(7, evaluation)
    assert [step for step, _ in read_metrics(tmp_path / "metrics.jsonl")] == [7]
    assert read_metrics(tmp_path / "metrics.jsonl")[0][1]["eval/right_share"] == evaluation.right_share
    assert not (tmp_path / "report.html").exists(), "a run without a step has nothing to report"


def test_a_failed_run_closes_its_files_and_raises_its_own_error(tmp_path):
    config = config_of("fapo", 1, "observe.report=true")
    with pytest.raises(ZeroDivisionError):
        with open_sinks(config.observe, tmp_path, config=config.model_dump(mode="json")):
            raise ZeroDivisionError
    assert not (tmp_path / "report.html").exists()


def test_the_judge_tail_is_measured_only_where_there_is_a_judge(tmp_path):
    fapo = read_run(write_run(tmp_path / "fapo", "fapo", steps=2))
    grpo = read_run(write_run(tmp_path / "grpo", "grpo", steps=2))
    seconds = {name: [value for _, value in fapo.series(f"time/{name}")] for name in ("judge_exposed", "judge_hidden")}
    assert seconds == {"judge_exposed": pytest.approx([0.2, 0.2]), "judge_hidden": pytest.approx([0.5, 0.5])}
    assert grpo.series("time/judge_exposed") == []


def test_summary_averages_the_last_ten_steps(tmp_path):
    runs = [read_run(write_run(tmp_path / arm, arm, seed=3, steps=13)) for arm in ("grpo", "fapo")]
    grpo, fapo = summarise(runs)["arms"]
    assert (grpo["arm"], grpo["seed"], grpo["steps"]) == ("grpo", 3, 13)
    last = [metrics["flawed/oracle"] for _, metrics in runs[0].steps[3:]]
    assert grpo["flawed_share_oracle"] == pytest.approx(sum(last) / 10)
    assert grpo["flawed_share_judge"] is None
    assert fapo["flawed_share_judge"] is not None
    assert fapo["seconds"] == pytest.approx(sum(metrics["time/step"] for _, metrics in runs[1].steps))
    assert json.loads(json.dumps(summarise(runs))) == summarise(runs)


def test_missing_and_damaged_parts_of_a_run_are_named(tmp_path):
    with pytest.raises(DataError, match="no such run folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(DataError, match="no run folder"):
        read_run(tmp_path)
    run = write_run(tmp_path / "run", "fapo", steps=2)
    with pytest.raises(DataError, match="no rollouts of step 9"):
        read_run(run).rows(9)
    for name, damage in (("run.json", "{"), ("config.yaml", "a: ["), ("metrics.jsonl", "")):
        kept = (run / name).read_text()
        (run / name).write_text(damage)
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            read_run(run)
        (run / name).unlink()
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            read_run(run)
        (run / name).write_text(kept)
