"""A whole run on one GPU: Megatron's rank and an SGLang server take the device's memory in turn.

Needs Ray, and SGLang in an environment of its own, whose Python `FAPO_SGLANG` names. The judge is the embedded engine.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.gpu.probe import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

FAPO = "from megatron_fapo.cli.main import main; main()"
SETTINGS = {
    "inherits": str(ROOT / "configs/clock/fapo.yaml"),
    "train": {"steps": 4},
    "policy": {"dtype": "bfloat16", "rescore": "always"},
    "servers": {
        "policy": {
            "engine": "sglang",
            "dtype": "bfloat16",
            "sglang": {
                "memory_fraction": 0.1,
                "max_total_tokens": 65536,
                "memory_saver": True,
                "arguments": ["--attention-backend", "triton", "--sampling-backend", "pytorch", "--disable-cuda-graph"],
            },
        }
    },
    "cluster": {"placement": "colocated"},
}


@pytest.fixture(scope="module")
def sglang(card: str) -> str:
    """The Python of SGLang's environment."""
    found = os.environ.get("FAPO_SGLANG")
    if not found:
        pytest.skip("FAPO_SGLANG does not name the Python of SGLang's environment")
    return found


@pytest.mark.parametrize("transport", ["cuda_ipc", "shared_memory"])
def test_rank_and_server_take_turns_and_the_weights_are_proven(sglang: str, tmp_path: Path, transport: str) -> None:
    settings = json.loads(json.dumps(SETTINGS)) | {"publish": {"transport": transport, "bucket_megabytes": 1}}
    settings["servers"]["policy"]["sglang"]["python"] = sglang
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", FAPO, "train", str(tmp_path / "run.yaml"), "--run", str(run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    logs = "\n".join(path.read_text()[-3000:] for path in run.glob("logs/*policy*.log"))
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}\n{logs}"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(4))
    for step in steps:
        assert step["rollout/lag_max"] == 0  # each token was drawn with the weights of its step
        assert step["mismatch/mean"] < 2e-2  # BF16 on both sides
        assert step["train/grad_norm_max"] > 0
        assert not any(name.startswith("memory/generate/ranks_") for name in step)  # the rank holds nothing then
        assert step["memory/train/ranks_parameters"] > 0
    assert steps[-1]["rollout/right_share"] > 0.8
