"""Each command as a user types it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAPO = str(Path(sys.executable).parent / "fapo")
COMMANDS = (
    "train",
    "eval",
    "serve",
    "servers",
    "convert",
    "report",
    "submit",
    "plan",
    "doctor",
    "build-critic-data",
    "prepare-data",
)


def fapo(*arguments: object, status: int = 0) -> str:
    result = subprocess.run(
        [FAPO, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "configs/clock/fapo.yaml", "--model", "runs/none"], "--model runs/none: no Hugging Face model there"),
        (["train", "configs/judge/clock.yaml", "--check", "task.train=README.md"], "rows are read from .parquet"),
    ],
)
def test_what_is_not_there_is_said_before_anything_starts(words, message):
    assert message in fapo(*words, status=1)


def test_help_lists_every_command_and_each_has_an_example():
    overview = fapo("--help")
    for command in COMMANDS:
        assert command in overview
        assert f"Example: fapo {command}" in " ".join(fapo(command, "--help").split())


def test_check_stops_before_anything_starts(tmp_path):
    output = fapo("train", "configs/clock/fapo.yaml", "train.steps=3", "--run", tmp_path / "run", "--check")
    assert "all checks passed" in output
    assert not (tmp_path / "run").exists()


def test_an_error_is_one_line_that_says_what_to_do():
    output = fapo("train", "configs/clock/fapo.yaml", "train.stpes=3", "--check", status=1)
    assert output.strip().endswith("unknown key 'train.stpes', did you mean 'steps'?")
    assert len(output.strip().splitlines()) == 1


def test_resume_needs_a_run(tmp_path):
    output = fapo("train", "configs/clock/fapo.yaml", "--run", tmp_path / "none", "--resume", status=1)
    assert "nothing to resume" in output


def test_eval_measures_right_and_sound_shares_on_held_out_prompts():
    small = ("evaluation.prompts=24", "evaluation.samples=4")
    result = json.loads(fapo("eval", "configs/clock/fapo.yaml", *small, "--json").splitlines()[-1])
    assert (result["prompts"], result["samples"]) == (24, 4)
    assert 0.5 < result["right_share"] <= 1.0
    assert set(result["pass_at"]) == {"1", "2", "4"}
    assert result["pass_at"]["1"] == pytest.approx(result["right_share"])
    assert result["pass_at"]["1"] <= result["pass_at"]["2"] <= result["pass_at"]["4"]
    for judged in (result["verified_pass_at_judge"], result["verified_pass_at_oracle"]):
        assert all(judged[k] <= result["pass_at"][k] for k in judged)
    assert result["sound_share_oracle"] < result["right_share"]


def test_eval_on_a_benchmark_keeps_its_samples(tmp_path):
    question = "Compute on a 20-hour clock: 17 + 8 - 9 = ? (mod 5)"
    (tmp_path / "aime.json").write_text(json.dumps([{"problem": question, "answer": 1}, {"problem": "?", "answer": 7}]))
    on = ("--on", f"aime24={tmp_path / 'aime.json'}", "--out", tmp_path / "out")
    table = fapo("eval", "configs/clock/fapo.yaml", "evaluation.samples=4", "judge.enabled=false", *on)
    assert "aime24: 2 prompts, 4 samples each" in " ".join(table.split())
    assert "maj@4" in table
    assert "sound" not in table, "without judge and oracle nobody knows"
    head, *prompts = map(json.loads, (tmp_path / "out" / "aime24.jsonl").read_text().splitlines())
    assert head["samples"] == 4
    assert {prompt["question"]: len(prompt["samples"]) for prompt in prompts} == {question: 4, "?": 4}
    result = json.loads((tmp_path / "out" / "result.json").read_text())["aime24"]
    assert result["right_share"] == sum(one["right"] for prompt in prompts for one in prompt["samples"]) / 8


def test_serve_answers_and_ends_when_told(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = "configs/clock/warm-start/policy"
    process = subprocess.Popen([FAPO, "serve", model, "--port", str(port), "--set", "context_length=128"], cwd=ROOT)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 100
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        body = json.dumps({"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 3, "temperature": 0}})
        request = urllib.request.Request(f"{url}/generate", body.encode(), {"Content-Type": "application/json"})
        assert 1 <= len(json.load(urllib.request.urlopen(request, timeout=30))["output_ids"]) <= 3
    finally:
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 0


def test_serve_refuses_an_open_address_without_a_key():
    output = fapo("serve", "configs/clock/warm-start/policy", "--host", "0.0.0.0", status=1)
    assert "api_key_file" in output
