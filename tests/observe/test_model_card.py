"""The model card: what the hub's own reader finds in it, and what it must not tell."""

import json
from dataclasses import asdict
from random import Random

import pytest
import yaml
from huggingface_hub import ModelCard

from megatron_fapo.errors import DataError
from megatron_fapo.evaluate.kept import samples_of
from megatron_fapo.evaluate.scores import summarise
from megatron_fapo.observe.model_card import card, run_of, write_card
from megatron_fapo.observe.runs import read_run
from tests.observe.synthetic import make_groups, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 14 steps with an evaluation after 8 of them and after the last, on data and a model of the hub."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "mine", "fapo", 1, 14)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[8] |= {"eval/right_share": 0.5, "eval/prompts": 9.0}
    lines.append({"step": 14, "eval/right_share": 0.75, "eval/prompts": 9.0, "eval/verified_pass_at_oracle/8": 0.9})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["policy"]["model"] = "Qwen/Qwen2.5-32B"
    config["servers"]["judge"]["model"] = str(folder / "secret" / "genrm-4b")
    config["task"] = {"name": "math", "train": "open-r1/DAPO-Math-17k-Processed"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_the_hub_reads_base_data_and_results(run):
    read = ModelCard(card(read_run(run), "mine")).data
    assert (read.base_model, read.datasets) == ("Qwen/Qwen2.5-32B", ["open-r1/DAPO-Math-17k-Processed"])
    assert {(found.metric_type, found.metric_value) for found in read.eval_results} == {
        ("right_share", 0.75), ("verified_pass_at_oracle/8", 0.9),
    }  # fmt: skip


def test_it_tells_metrics_and_configuration_but_no_path_of_the_machine(run):
    text = card(read_run(run), "mine")
    record = read_run(run)
    assert f"| `flawed/oracle` | {100 * mean(record, 0):.1f} % | {100 * mean(record, 4):.1f} % |" in text
    assert "after 14 steps" in text
    assert "| judge | genrm-4b |" in text
    assert str(run.parent) not in text
    config = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert config["rollout"] == record.config["rollout"]


def mean(record, first: int) -> float:
    values = [metrics["flawed/oracle"] for step, metrics in record.steps if first <= step < first + 10]
    return sum(values) / len(values)


def test_a_checkpoints_card_knows_nothing_of_later_steps(run):
    text = card(read_run(run), "mine", step=8)
    assert "after 8 steps of reinforcement learning" in text
    assert "Held-out evaluation after 8 steps" in text
    assert "75.0 %" not in text


def test_results_of_fapo_eval_in_the_run_are_shown(run, tmp_path):
    groups = make_groups("fapo", 0, 0.5, Random(1))
    result = summarise([samples_of(group) for group in groups], True)
    (run / "eval").mkdir()
    (run / "eval" / "result.json").write_text(json.dumps({"aime24": asdict(result)}))
    model = tmp_path / "model"
    model.mkdir()
    write_card(run, model)
    text = (model / "README.md").read_text()
    interval = result.intervals["pass_at/8"]
    shown = f"{100 * interval.value:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    assert f"| aime24 | 16 × 8 | `pass_at/8` | {shown} |" in text
    assert text.splitlines()[text.splitlines().index("---", 1) + 2] == "# mine"
    (run / "eval" / "result.json").write_text("{]")
    with pytest.raises(DataError, match="not the result of an evaluation"):
        write_card(run, model)


def test_the_run_of_a_checkpoint_is_found_through_its_link(run, tmp_path):
    step = run / "checkpoints" / "step-000008"
    step.mkdir(parents=True)
    (run / "checkpoints" / "latest").symlink_to("step-000008")
    assert run_of(run / "checkpoints" / "latest") == run_of(step) == (run.resolve(), 8)
    assert run_of(tmp_path) is None
    assert run_of(run / "checkpoints") is None
