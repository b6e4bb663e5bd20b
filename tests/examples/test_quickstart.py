"""The walk that a newcomer takes, with two steps an arm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEYS = {"arm", "seed", "steps", "right_share", "flawed_share_oracle", "flawed_share_judge", "seconds"}


def quickstart(out: Path, *overrides: str) -> str:
    command = [sys.executable, str(ROOT / "examples/clock/quickstart.py"), "--out", str(out), *overrides]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.long
def test_both_arms_run_once_and_the_report_compares_them(tmp_path):
    small = ("train.steps=2", "rollout.prompts_per_step=8")
    assert "step 2/2" in quickstart(tmp_path, *small)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(arm["arm"], arm["seed"], arm["steps"]) for arm in summary["arms"]] == [("fapo", 1, 2), ("grpo", 1, 2)]
    assert all(set(arm) == KEYS for arm in summary["arms"])
    assert summary["arms"][1]["flawed_share_judge"] is None
    assert all(0 < arm["right_share"] <= 1 for arm in summary["arms"])
    assert "<title>" in (tmp_path / "report.html").read_text()
    assert "step" not in quickstart(tmp_path, *small).replace(str(tmp_path), "")
