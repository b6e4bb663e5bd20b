"""The benches: scores worked out by hand, rows as they come, and a judge that is asked, interrupted and asked again."""

import json
from pathlib import Path

import pytest
from aiohttp import web
from typer.testing import CliRunner

from megatron_fapo.cli.main import app
from megatron_fapo.critique.prompt import judge_prompt, judge_prompt_of, process_bench_prompt
from megatron_fapo.errors import ConfigError, DataError, RequestRejected
from megatron_fapo.judge.answerer import OpenAI, Question
from megatron_fapo.judge.bench import Row, harmonic_mean, read_predictions, read_rows, score
from megatron_fapo.judge.bench_run import check_references, predict
from megatron_fapo.judge.settings import JudgeSettings
from megatron_fapo.records import Message
from megatron_fapo.tasks import clock_world
from megatron_fapo.tasks.clock import ClockTask
from megatron_fapo.tasks.settings import ClockSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer

JUDGE = Path(__file__).parents[2] / "configs" / "clock" / "warm-start" / "judge"


def row(name: str, label: int, right: bool, generator: str = "G", problem: str = "1 + 1?") -> dict[str, object]:
    steps = ["one", "two", "so \\boxed{2}"]
    return {
        "id": name, "generator": generator, "problem": problem, "steps": steps, "final_answer_correct": right,
        "label": label,
    }  # fmt: skip


ROWS = [
    row("a-0", -1, True),  # predicted -1: clean, seen
    row("a-1", -1, True),  # predicted 0: false flag
    row("a-2", 1, True),  # predicted 1: flawed, exact
    row("a-3", 2, True, "H"),  # predicted 0: flawed, another step
    row("a-4", 0, False),  # predicted -1: missed, not a right answer
    row("b-0", 1, True),  # predicted None: unreadable
    row("b-1", -1, True, "H"),  # predicted -1
    row("b-2", 2, False, "H"),  # predicted 2
]
PREDICTED = {"a-0": -1, "a-1": 0, "a-2": 1, "a-3": 0, "a-4": -1, "b-0": None, "b-1": -1, "b-2": 2}


def write(folder: Path, rows: list[dict[str, object]], name: str = "rows.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows))
    return path


def write_predictions(folder: Path, values: dict[str, int | None]) -> Path:
    path = folder / "predictions.jsonl"
    path.write_text("".join(json.dumps({"id": k, "prediction": v}) + "\n" for k, v in values.items()))
    return path


def test_scores_by_hand(tmp_path):
    report = score(read_rows([str(write(tmp_path, ROWS))]), PREDICTED)
    a, _ = report.subsets["a"]
    assert (a.error_rows, a.error_accuracy, a.clean_rows, a.clean_accuracy) == (3, 1 / 3, 2, 1 / 2)
    assert a.score == pytest.approx(2 / (3 + 2))
    b, _ = report.subsets["b"]
    assert (b.error_accuracy, b.clean_accuracy, b.score) == (1 / 2, 1.0, pytest.approx(2 / 3))
    assert report.processbench == pytest.approx((2 / 5 + 2 / 3) / 2)
    flaw = report.flawed_positive  # right answers: a-0 a-1 a-2 a-3 b-0 b-1
    assert (flaw.rows, flaw.true_positive, flaw.false_positive, flaw.false_negative, flaw.true_negative) == (
        6,
        2,
        1,
        1,
        2,
    )
    assert (flaw.precision, flaw.recall, flaw.f1) == (2 / 3, 2 / 3, pytest.approx(2 / 3))
    assert report.generators["H"][1].rows == 2
    assert report.unreadable == 1


def test_shares_without_a_denominator():
    rows = [
        Row(id="x", subset="s", generator="", problem="", steps=("a",), answer_right=True, label=-1, reference=None)
    ]
    report = score(rows, {"x": -1})
    assert report.processbench is None
    assert (report.flawed_positive.precision, report.flawed_positive.recall, report.flawed_positive.f1) == (0, 0, 0)
    assert harmonic_mean(0.0, 1.0) == 0.0
    with pytest.raises(DataError, match="no rows"):
        score([], {})


def test_a_row_without_a_prediction_is_an_error_and_more_predictions_are_not(tmp_path):
    rows = read_rows([str(write(tmp_path, ROWS))])
    score(rows, {**PREDICTED, "c-9": 3})
    with pytest.raises(DataError, match="1 of 8 rows have no prediction, the first is 'a-2'"):
        score(rows, {name: value for name, value in PREDICTED.items() if name != "a-2"})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "a"}', "must hold id"),
        ('{"id": "a", "prediction": "1"}', "must hold id"),
        ('{"id": "a", "prediction": true}', "must hold id"),
        ('{"id": "a", "prediction": -2}', "below -1"),
        ('{"id": "a", "prediction": 0}\n{"id": "a", "prediction": 0}', "predicted twice"),
        ("{", "not JSON"),
    ],
)
def test_a_prediction_that_is_none_is_refused_with_its_line(tmp_path, line, reason):
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=rf"p\.jsonl, line \d: .*{reason}"):
        read_predictions(path)


def test_rows_that_are_none_are_refused_with_their_place(tmp_path):
    with pytest.raises(DataError, match=r"rows\.json, row 1: not a ProcessBench row"):
        read_rows([str(write(tmp_path, [ROWS[0], {**ROWS[1], "label": 3}]))])
    with pytest.raises(DataError, match="occurs more than once"):
        read_rows([str(write(tmp_path, [ROWS[0], ROWS[0]]))])
    with pytest.raises(DataError, match="no such file"):
        read_rows([str(tmp_path / "nothing.json")])


def test_the_reference_answer_comes_from_a_right_solution_of_the_same_problem(tmp_path):
    rows = read_rows([str(write(tmp_path, [*ROWS, row("c-0", 0, False, problem="2 + 2?")]))])
    assert {r.reference for r in rows[:-1]} == {"2"}
    assert rows[-1].reference is None
    check_references(rows, "original")
    with pytest.raises(DataError, match="1 of 9 rows name no reference answer"):
        check_references(rows, "fapo")


def test_the_bench_s_own_rows_are_counted_as_published(fapo_critic_sample):
    """facts: erroneous, clean, right, and flawed of the right."""
    rows = read_rows([str(fapo_critic_sample.parent / "processbench")])
    report = score(rows, {r.id: 0 for r in rows})
    published = {"gsm8k": (207, 193, 200, 7), "math": (594, 406, 500, 94), "olympiadbench": (661, 339, 500, 161)}
    for name, counts in published.items():
        process, flaw = report.subsets[name]
        flawed = flaw.true_positive + flaw.false_negative
        assert (process.error_rows, process.clean_rows, flaw.rows, flawed) == counts
    assert report.flawed_positive.f1 == pytest.approx(2 * 262 / (2 * 262 + 938))


def test_prompts_of_paragraphs_and_of_a_solution_agree():
    paragraphs = ["a", "b\nc"]
    assert judge_prompt_of("q", "3", paragraphs) == judge_prompt("q", "3", "\n\n".join(paragraphs))
    own = process_bench_prompt("q", paragraphs)[0].content
    assert "<paragraph_1>\nb\nc\n</paragraph_1>" in own
    assert "Ground Truth" not in own


def test_the_command_ends_with_json(tmp_path):
    data, predictions = write(tmp_path, ROWS), write_predictions(tmp_path, PREDICTED)
    result = CliRunner().invoke(app, ["bench-judge", "--data", str(data), "--predictions", str(predictions), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output.splitlines()[-1])
    assert found["processbench"] == pytest.approx((2 / 5 + 2 / 3) / 2)
    assert found["flawed_positive"]["f1"] == pytest.approx(2 / 3)
    table = CliRunner().invoke(app, ["bench-judge", "--data", str(data), "--predictions", str(predictions)])
    assert "53.3%" in table.output
    assert "1 verdicts could not be read" in " ".join(table.output.split())


def test_exactly_one_judge_must_be_named(tmp_path):
    result = CliRunner().invoke(app, ["bench-judge", "--data", str(write(tmp_path, ROWS))])
    assert isinstance(result.exception, ConfigError)
    assert "exactly one of" in str(result.exception)


class Endpoint:
    """An OpenAI-compatible endpoint that fails when told to: `answer(messages, number of the request)`."""

    def __init__(self, answer) -> None:
        self.answer = answer
        self.asked: list[str] = []

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body["messages"][0]["content"])
        status, text, reason = self.answer(body["messages"][0]["content"], len(self.asked))
        if status != 200:
            return web.Response(status=status, text="no")
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 7}})


async def ask(endpoint: Endpoint, rows: list[Row], out: Path, **settings) -> int:
    server = web.Application()
    server.router.add_post("/v1/chat/completions", endpoint.handle)
    runner = web.AppRunner(server)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    chosen = JudgeSettings(**{"retries": 1, "concurrency": 1, **settings})
    try:
        async with OpenAI(f"http://127.0.0.1:{port}/v1", "some-model") as judge:
            return await predict(rows, judge, chosen, judge="some-model", form="original", out=out)
    finally:
        await runner.cleanup()


async def test_an_endpoint_is_asked_and_asked_again_only_about_what_is_missing(tmp_path):
    rows, out = read_rows([str(write(tmp_path, ROWS))]), tmp_path / "out" / "p.jsonl"
    down = Endpoint(lambda text, number: (200, "sure: \\boxed{1}", "stop") if number <= 3 else (503, "", ""))
    assert await ask(down, rows, out) == 5
    assert len(down.asked) == 3 + 5 * 2
    with out.open("a") as file:
        file.write('{"id": "a-4", "pred')  # a run that ended in the middle of a line
    well = Endpoint(lambda text, number: (200, "\\boxed{-1}", "stop"))
    assert await ask(well, rows, out) == 0
    assert len(well.asked) == 5
    predictions = read_predictions(out)
    assert [predictions[r.id] for r in rows] == [1, 1, 1, -1, -1, -1, -1, -1]
    with pytest.raises(DataError, match="name another file"):
        await predict(rows, None, JudgeSettings(), judge="some-model", form="fapo", out=out)


async def test_a_busy_endpoint_is_asked_again_when_it_says(tmp_path):
    """429 with Retry-After, then 503, then an answer; a refusal is not asked again."""
    turns = iter([(429, {"Retry-After": "0"}), (503, {"Retry-After": "0"}), (200, {}), (400, {})])
    asked = []

    async def handle(request):
        asked.append((await request.json(), request.headers["Authorization"]))
        status, headers = next(turns)
        if status != 200:
            return web.Response(status=status, text="not now", headers=headers)
        choice = {"message": {"role": "assistant", "content": "\\boxed{2}"}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 7}})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    judge = OpenAI(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", "some-model", "key", retries=2)
    question = Question(
        ids=("a",),
        seeds=(5,),
        messages=(Message(role="user", content="q"),),
        temperature=0.5,
        top_p=1,
        max_new_tokens=9,
    )
    assert [answer.text async for answer in judge.answers(question)] == ["\\boxed{2}"]
    with pytest.raises(RequestRejected, match="answered 400: not now"):
        _ = [answer async for answer in judge.answers(question)]
    assert len(asked) == 4
    sent = {"model": "some-model", "messages": [{"role": "user", "content": "q"}], "max_tokens": 9, "seed": 5}
    assert sent.items() <= asked[0][0].items()
    assert asked[0][1] == "Bearer key"
    await runner.cleanup()


async def test_a_verdict_that_cannot_be_used_is_a_prediction_of_none(tmp_path):
    rows, out = read_rows([str(write(tmp_path, ROWS[:3]))]), tmp_path / "p.jsonl"
    answers = [(200, "no idea", "stop"), (200, "\\boxed{1}", "length"), (400, "", "")]
    assert await ask(Endpoint(lambda text, number: answers[number - 1]), rows, out) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [None, None, None]
    assert [line["why"] for line in lines[:2]] == ["no box", "cut"]
    assert "refused" in lines[2]["why"]


async def test_votes_of_an_endpoint_are_counted_by_the_rule(tmp_path):
    rows = read_rows([str(write(tmp_path, ROWS[:1]))])
    for rule, expected in (("majority", 1), ("agreement", -1)):
        boxes = iter((1, 1, -1))
        endpoint = Endpoint(lambda text, number, boxes=boxes: (200, f"\\boxed{{{next(boxes)}}}", "stop"))
        out = tmp_path / f"{rule}.jsonl"
        await ask(endpoint, rows, out, votes=3, temperature=1.0, vote_rule=rule)
        assert read_predictions(out) == {"a-0": expected}


def test_the_clock_s_judge_is_served_and_benched(tmp_path):
    """The whole road: rows of the clock world, the demo's judge on a real server, scores."""
    task = ClockTask(ClockSettings(), ChatTokenizer.load(JUDGE), seed=7)
    rows = []
    for index in range(40):
        prompt, solution = task.teacher(index)
        steps = solution.split("\n\n")
        label = clock_world.first_wrong(clock_world.parse(prompt.question), solution)
        rows.append({**row(f"clock-{index}", label, True), "problem": prompt.question, "steps": steps})
    data, out = write(tmp_path, rows), tmp_path / "judge.jsonl"
    command = ["bench-judge", "--data", str(data), "--model", str(JUDGE), "--out", str(out), "--json"]
    options = ["--set", "server.context_length=256", "--set", "max_new_tokens=96"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output.splitlines()[-1])
    assert found["flawed_positive"]["f1"] > 0.8
    assert found["unreadable"] == 0
    assert {json.loads(line)["id"] for line in out.read_text().splitlines()} == {r["id"] for r in rows}
