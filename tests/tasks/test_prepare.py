"""Training rows from raw ones: what is dropped, why, and that what is written is what the tasks read."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from megatron_fapo.cli.main import app
from megatron_fapo.errors import ConfigError, DataError
from megatron_fapo.tasks import rows
from megatron_fapo.tasks.critic import CritiqueTask
from megatron_fapo.tasks.maths import MathTask
from megatron_fapo.tasks.prepare import Overlap, Prepared, prepare
from megatron_fapo.tasks.settings import CritiqueSettings, MathSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer
from tests.conftest import lacking

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that loses nothing: a token a byte."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatTokenizer:
    return ChatTokenizer.load(folder)


QUESTIONS = [
    "A farmer has 17 sheep and buys 4 more every month for a whole year; how many sheep has the farmer at its end?",
    "Let $f(x) = x^2 - 3x + 2$. Find the sum of all real numbers $r$ with $f(r) = 0$ and explain each of your steps.",
    "How many ways are there to seat six people around a round table when two of them refuse to sit side by side?",
]


def raw(question: str, answer: object) -> dict[str, Any]:
    return {"problem": question, "answer": answer}


def clean(
    found: list[dict[str, Any]], tokenizer: ChatTokenizer, near: float = 0.8, against: tuple[str, ...] = (), **more: Any
) -> Prepared:
    benchmarks = Overlap(more.pop("words", 13))
    for number, question in enumerate(against):
        benchmarks.add(f"bench, row {number}", {"problem": question})
    placed = [(f"row {number}", row) for number, row in enumerate(found)]
    options = {"max_tokens": 2048, **more}
    return prepare(placed, "math", tokenizer, near=near, benchmarks=benchmarks, **options)


def dropped(result: Prepared) -> dict[str, str]:
    return {drop.place: drop.kind for drop in result.drops}


def test_every_row_is_kept_or_dropped_once_with_its_reason(tokenizer: ChatTokenizer) -> None:
    sheep, roots, table = QUESTIONS
    found = [
        raw(sheep, 65),
        raw(sheep.replace("every month", "EVERY  month"), "65"),  # equal but for case and spaces
        raw(sheep.replace("a whole year", "a full year"), 65),  # nearly
        raw(sheep.replace("17 sheep", "18 sheep"), 66),  # another problem of the same pattern
        raw(sheep.replace("17 sheep", "18 sheep"), 66),  # which comes twice
        raw(roots, 3),
        raw(table, 72),
        raw(table, 24),  # one of the two is wrong
        {"problem": "no answer"},
        raw("long " * 3000, 1),
    ]
    result = clean(found, tokenizer, against=(f"Warm-up. {roots}",), near=0.6)
    assert [item.place for item in result.items] == ["row 0", "row 3"]
    assert dropped(result) == {
        "row 1": "duplicate",
        "row 2": "duplicate",
        "row 4": "duplicate",
        "row 5": "overlap",
        "row 6": "contradiction",
        "row 7": "contradiction",
        "row 8": "bad",
        "row 9": "long",
    }
    assert result.counts() == {"kept": 2, "duplicate": 3, "overlap": 1, "contradiction": 2, "bad": 1, "long": 1}
    why = {drop.place: drop.why for drop in result.drops}
    assert why["row 1"] == "100% like row 0"
    assert why["row 4"] == "100% like row 3"
    assert "bench, row 0" in why["row 5"]
    assert why["row 6"] == "the question of row 7, whose answer is 24, here 72"
    assert result.tokens == [len(tokenizer.encode_chat(item.messages)) for item in result.items]
    assert result.lengths()["max"] == max(result.tokens)
    assert result.lengths()["min"] <= result.lengths()["p50"] <= result.lengths()["p99"]


def test_a_threshold_of_one_drops_equal_texts_only(tokenizer: ChatTokenizer) -> None:
    sheep = QUESTIONS[0]
    found = [raw(sheep, 65), raw(sheep.replace("a whole year", "a full year"), 65), raw(f" {sheep} ", 65)]
    assert dropped(clean(found, tokenizer, near=1.0)) == {"row 2": "duplicate"}


def test_overlap_wants_so_many_words_in_a_row_or_all_of_a_short_question(tokenizer: ChatTokenizer) -> None:
    bench = "one two three four five six seven eight nine ten"
    found = [
        raw("zero one two three four five six, and then other things", 1),
        raw("zero one two three four five, and then other things", 1),
        raw("What is 2 + 2?", 4),
        raw("What is 2 + 2? And what is its square?", 16),
    ]
    result = clean(found, tokenizer, against=(bench, "what is 2+2"), words=6)
    assert dropped(result) == {"row 0": "overlap", "row 2": "overlap"}


def test_near_duplicates_among_many_are_all_found_and_nothing_else(tokenizer: ChatTokenizer) -> None:
    """Against every pair compared exactly: what MinHash leaves out would be missed here."""
    draw = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in draw.integers(0, 400, 30)) for _ in range(150)]
    again = [f"{text} and more" for text in texts[:60]]
    result = clean([raw(text, "1") for text in (*texts, *again)], tokenizer)
    assert dropped(result) == {f"row {150 + number}": "duplicate" for number in range(60)}


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["prepare-data", *map(str, arguments)])
    if isinstance(result.exception, DataError | ConfigError):
        return str(result.exception)
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def test_bad_lines_are_named_and_what_is_written_is_what_the_task_reads(
    folder: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    lines = [json.dumps({"question_text": question, "final": 3}) for question in QUESTIONS]
    source, bench = tmp_path / "raw.jsonl", tmp_path / "bench.jsonl"
    source.write_text("\n".join([lines[0], "{broken", lines[1], '["a list"]', lines[2], "{}"]))
    bench.write_text(json.dumps({"problem": QUESTIONS[1], "answer": "3"}))
    out = tmp_path / "data" / "train.parquet"
    columns = ("--column", "problem=question_text", "--column", "answer=final")
    arguments = (source, "--model", folder, "--against", bench, *columns, "--out", out)
    refused = run(*arguments)
    assert "3 rows cannot be used" in refused
    for place, why in ((2, "not JSON"), (4, "must be a JSON object, found list"), (6, "prompt must be a list")):
        assert f"{source}, line {place}: {why}" in refused
    assert not out.exists()
    summary = json.loads(run(*arguments, "--skip-bad", "--json").splitlines()[-1])
    assert (summary["kept"], summary["bad"], summary["overlap"]) == (2, 3, 1)
    reasons = [json.loads(line) for line in Path(f"{out}.dropped.jsonl").read_text().splitlines()]
    assert {row["place"]: row["kind"] for row in reasons} == {
        f"{source}, line 2": "bad",
        f"{source}, line 3": "overlap",
        f"{source}, line 4": "bad",
        f"{source}, line 6": "bad",
    }
    table = run(*arguments, "--skip-bad")
    assert "kept" in table
    assert "prompts of min" in table
    written = pyarrow.parquet.read_table(out).to_pylist()
    assert [row["extra_info"]["place"] for row in written] == [f"{source}, line 1", f"{source}, line 5"]
    task = MathTask(MathSettings(train=str(out), held_out=str(out)), tokenizer, seed=1)
    assert {prompt.question for prompt in task.held_out(9)} == {QUESTIONS[0], QUESTIONS[2]}
    assert summary["prompt_tokens"]["max"] == max(len(prompt.token_ids) for prompt in task.held_out(9))
    # prepared rows prepared again are themselves
    again = tmp_path / "again.jsonl"
    run(out, "--model", folder, "--out", again)
    assert [row["prompt"] for _, row in rows.read(str(again))] == [row["prompt"] for row in written]


def test_a_data_set_laid_out_as_on_the_hub(folder: Path, tmp_path: Path) -> None:
    hub = tmp_path / "team" / "problems"
    (hub / "data").mkdir(parents=True)
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: all\n  data_files:\n  - split: train\n    path: data/*.parquet\n---\n"
    )
    made = pyarrow.Table.from_pylist([{"prompt": question, "solution": "3"} for question in QUESTIONS])
    pyarrow.parquet.write_table(made, hub / "data" / "train-00000.parquet")
    out = tmp_path / "out.jsonl"
    summary = json.loads(run(hub, "--model", folder, "--out", out, "--json").splitlines()[-1])
    assert summary["kept"] == 3
    assert "cannot be loaded" in run(hub, "--config", "other", "--model", folder, "--out", out)


def test_documents_of_a_megatron_data_set(folder: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def ids(text: str) -> Any:
        return torch.tensor([*tokenizer.encode(text), tokenizer.eos_ids[0]], dtype=torch.int32)

    prefix = tmp_path / "corpus"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for sequences in (
        (QUESTIONS[0], "65"),
        (QUESTIONS[1], "It has the roots 1 and 2, thus \\boxed{3}."),
        (f"{QUESTIONS[2]}\n\nAnswer: 72",),
        ("a text without an answer",),
    ):
        builder.add_document(torch.cat([ids(text) for text in sequences]), [len(ids(text)) for text in sequences])
    builder.finalize(f"{prefix}.idx")
    out = tmp_path / "out.jsonl"
    refused = run(prefix, "--model", folder, "--out", out)
    assert f"{prefix}.idx, document 4: " in refused
    run(prefix, "--model", folder, "--out", out, "--skip-bad")
    written = [row for _, row in rows.read(str(out))]
    assert [row["reward_model"]["ground_truth"] for row in written] == ["65", "3", "72"]
    assert [row["extra_info"]["question"] for row in written] == QUESTIONS
    Path(f"{prefix}.bin").unlink()
    assert "corpus.bin: no such file" in run(prefix, "--model", folder, "--out", out)


def test_wrong_calls(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "raw.jsonl"
    source.write_text(json.dumps(raw(QUESTIONS[0], 1)))
    assert "name a .parquet or .jsonl" in run(source, "--model", folder, "--out", tmp_path / "rows.csv")
    unnamed = run(source, "--model", folder, "--out", tmp_path / "a.jsonl", "--column", "problem")
    assert "OURS=THEIRS" in unnamed
    none = run(source, "--model", folder, "--out", tmp_path / "a.jsonl", "--against", source)
    assert "no row is left of 1: {'overlap': 1}" in none


def test_the_authors_rows_and_processbench(
    folder: Path, tokenizer: ChatTokenizer, fapo_critic_sample: Path, tmp_path: Path
) -> None:
    bench = Path(os.environ["FAPO_DATA"]) / "processbench"
    if not bench.is_dir():
        lacking(f"{bench}: no ProcessBench there")
    out = tmp_path / "critic.parquet"
    against = [argument for path in sorted(bench.glob("*.json")) for argument in ("--against", path)]
    arguments = ("--task", "critique", "--model", folder, "--max-prompt-tokens", 20000, "--out", out, "--json")
    alone = json.loads(run(fapo_critic_sample, *arguments).splitlines()[-1])
    assert sum(value for key, value in alone.items() if isinstance(value, int)) == 100
    twice = json.loads(run(fapo_critic_sample, fapo_critic_sample, *arguments).splitlines()[-1])
    assert twice["kept"] == alone["kept"]
    assert twice["duplicate"] == alone.get("duplicate", 0) + 100 - alone.get("contradiction", 0)
    apart = json.loads(run(fapo_critic_sample, *arguments, *against).splitlines()[-1])
    assert apart["kept"] <= alone["kept"]
    task = CritiqueTask(CritiqueSettings(train=out, held_out=out), tokenizer, seed=1)
    assert len(task.held_out(200)) == apart["kept"]
    questions = [
        rows.text_of(row, "problem") for path in sorted(bench.glob("*.json")) for _, row in rows.read(str(path))
    ]
    overlap = Overlap(13)
    for number, question in enumerate(questions[::20]):
        overlap.add(f"bench, row {number}", {"problem": question})
    assert all(overlap.find(question) for question in questions[::20])
    assert sum(overlap.find(question) is not None for question in questions) < len(questions) / 5
