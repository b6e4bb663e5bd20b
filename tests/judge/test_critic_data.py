"""Training data of the judge: what is kept, what is counted, what a second call asks, and who reads the rows."""

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_fapo.cli.main import app
from megatron_fapo.critique.prompt import judge_prompt, judge_prompt_of
from megatron_fapo.errors import ConfigError, DataError, ServerUnreachable
from megatron_fapo.judge.answerer import Answer, Question
from megatron_fapo.judge.bench import read_rows
from megatron_fapo.judge.critic_data import Solution, ask_labels, assemble, draw, oracle_labels
from megatron_fapo.judge.settings import JudgeSettings
from megatron_fapo.tasks import rows as task_rows
from megatron_fapo.tasks.critic import parse_row

MODELS = Path(__file__).parents[2] / "configs" / "clock" / "warm-start"
CLOCK = MODELS.parent / "fapo.yaml"


def solution(number: int, question: int = 0, oracle: int | None = None) -> Solution:
    return Solution(
        id=f"run/s0-p{question}-r{number}", source="run", question=f"question {question}", reference="7",
        text=f"step {number}\n\nstep b\n\n\\boxed{{7}}", oracle=oracle,
    )  # fmt: skip


class Labeller:
    """Answers as the script says by solution, three labels each; None is a server that is down."""

    def __init__(self, script: dict[str, list[str | None]]) -> None:
        self.script = script
        self.asked: list[str] = []

    async def answers(self, question: Question):
        name = question.ids[0].rsplit("-a", 1)[0]
        self.asked.append(name)
        for text in self.script[name]:
            if text is None:
                raise ServerUnreachable("down")
            yield Answer(text=text, complete=text != "\\boxed{0} and on", tokens=3)


SCRIPT: dict[str, list[str | None]] = {
    "run/s0-p0-r0": ["\\boxed{1}"] * 3,
    "run/s0-p0-r1": ["\\boxed{1}", "\\boxed{1}", "\\boxed{0}"],
    "run/s0-p0-r2": ["\\boxed{-1}", "no idea", "\\boxed{-1}"],
    "run/s0-p0-r3": ["\\boxed{0} and on", "\\boxed{0}", "\\boxed{0}"],
    "run/s0-p1-r4": ["\\boxed{-1}"] * 3,
    "run/s0-p1-r5": ["\\boxed{-1}"] * 3,
    "run/s0-p2-r6": [None],
}


async def test_only_agreement_is_kept_and_a_second_call_asks_only_what_is_missing(tmp_path):
    solutions = [solution(int(name[-1]), int(name[-4])) for name in SCRIPT]
    settings, out = JudgeSettings(votes=3, temperature=0.6, retries=1), tmp_path / "labels.jsonl"
    first = Labeller(SCRIPT)
    labels = await ask_labels(solutions, first, settings, name="strong", out=out)
    assert first.asked.count("run/s0-p2-r6") == 2  # asked again once
    dropped: Counter[str] = Counter()
    data = assemble(solutions, labels, balance=False, seed=0, dropped=dropped)
    assert {(one.id, index) for one, index in data.rows} == {
        ("run/s0-p0-r0", 1), ("run/s0-p1-r4", -1), ("run/s0-p1-r5", -1),
    }  # fmt: skip
    assert data.dropped == {"labels disagree": 1, "a label cannot be read": 2, "no answer from the labeller": 1}
    with out.open("a") as file:
        file.write('{"id": "run/s0-p2-r6", "lab')  # a call that was killed here
    again = Labeller({"run/s0-p2-r6": ["\\boxed{2}"] * 3})
    labels = await ask_labels(solutions, again, settings, name="strong", out=out)
    assert again.asked == ["run/s0-p2-r6"]
    assert labels["run/s0-p2-r6"] == (2, 2, 2)
    with pytest.raises(DataError, match="3 labels a solution by 'strong', not 1 by 'other'"):
        await ask_labels(solutions, again, settings.changed(votes=1), name="other", out=out)


def test_a_balanced_set_has_as_many_of_each_and_questions_stand_together():
    solutions = [solution(n, question=n % 5, oracle=-1 if n % 4 else 0) for n in range(40)]
    dropped: Counter[str] = Counter()
    data = assemble(solutions, oracle_labels(solutions), balance=True, seed=3, dropped=dropped)
    assert (data.clean, len(data.rows)) == (10, 20)
    assert data.dropped == {"more than the other class": 20}
    order = [row["extra_info"]["question_index"] for row in data.critic()]
    assert order == sorted(order)
    other = assemble(solutions, oracle_labels(solutions), balance=True, seed=4, dropped=Counter())
    assert other.rows != data.rows


def test_repeated_solutions_count_once_and_a_limit_draws():
    solutions = [solution(n % 10) for n in range(30)]
    dropped: Counter[str] = Counter()
    drawn = draw(solutions, 4, 0, dropped)
    assert len({one.text for one in drawn}) == 4
    assert dropped == {"repeated": 20, "beyond the limit": 6}
    with pytest.raises(DataError, match="has no oracle"):
        oracle_labels(drawn)


def test_rows_have_the_fields_of_the_published_ones(fapo_critic_sample):
    published = json.loads(fapo_critic_sample.read_text().splitlines()[0])
    (row,) = assemble([solution(1)], {solution(1).id: (2, 2, 2)}, balance=False, seed=0, dropped=Counter()).critic()

    def shape(value: object) -> object:
        match value:
            case dict():
                return {key: shape(inner) for key, inner in value.items()}
            case list():
                return [shape(inner) for inner in value]
            case _:
                return type(value)

    assert shape(row) == shape(published)
    assert row["prompt"][0]["content"] == judge_prompt("question 0", "7", solution(1).text)[0].content
    assert (parse_row(row).first_wrong, parse_row(row).paragraphs) == (2, 3)


def build(*arguments: object) -> dict[str, object]:
    result = CliRunner().invoke(app, ["build-critic-data", *map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.output.splitlines()[-1])


def test_models_are_sampled_labelled_by_a_served_model_and_become_rows(tmp_path):
    """The whole road on real servers: the clock's policy, its judge as the labeller, the oracle to compare with."""
    out, bench = tmp_path / "critic.jsonl", tmp_path / "bench.json"
    sampled = ["--policy", MODELS / "policy", "--config", CLOCK, "--prompts", 12, "--samples", 2]
    labeller = ["--model", MODELS / "judge", "--set", "server.context_length=256", "--set", "max_new_tokens=96"]
    found = build(*sampled, *labeller, "--out", out)
    assert found["rows"] > 12
    assert found["rows"] == len(out.read_text().splitlines())
    parsed = [parse_row(row) for _, row in task_rows.read(str(out))]
    assert sum(case.first_wrong == -1 for case in parsed) == found["clean"]
    labelled = (tmp_path / "critic.labels.jsonl").read_text()
    assert build(*sampled, *labeller, "--out", out) == found
    assert (tmp_path / "critic.labels.jsonl").read_text() == labelled
    (tmp_path / "critic.solutions.jsonl").rename(tmp_path / "bench.solutions.jsonl")
    build(*sampled, "--oracle", "--rows", "processbench", "--out", bench)
    truth = {judge_prompt_of(row.problem, row.reference or "", row.steps): row.label for row in read_rows([str(bench)])}
    right = [truth[case.messages] == case.first_wrong for case in parsed]
    assert sum(right) >= 0.9 * len(right)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--oracle"], "name rollouts"),
        (["--run", "x"], "exactly one of --oracle, --model, --endpoint"),
        (["--run", "x", "--oracle"], "x: no such run folder"),
        (["--run", "configs", "--oracle"], "configs: no recorded rollouts"),
        (["--policy", "x", "--oracle"], "--policy needs --config"),
        (["--run", "x", "--oracle", "--steps", "a:b"], "write it as FIRST:END"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, arguments, reason):
    result = CliRunner().invoke(app, ["build-critic-data", *arguments, "--out", str(tmp_path / "out.jsonl")])
    assert isinstance(result.exception, ConfigError | DataError)
    assert reason in str(result.exception)
