"""`fapo convert` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAPO = str(Path(sys.executable).parent / "fapo")
POLICY = ROOT / "configs" / "clock" / "warm-start" / "policy"


def run(*arguments: object, status: int = 0) -> str:
    result = subprocess.run(list(map(str, arguments)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stderr if status else result.stdout


def test_there_and_back_with_logits_compared(tmp_path: Path) -> None:
    assert "logits differ by" in run(FAPO, "convert", POLICY, "--to", tmp_path / "megatron", "--verify")
    tool = (sys.executable, ROOT / "tools" / "convert.py")
    run(*tool, tmp_path / "megatron", "--to", tmp_path / "model", "--shard-gigabytes", "0.001")
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 1
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "model" / name).read_bytes() == (POLICY / name).read_bytes()


def test_fp8_for_sglang(tmp_path: Path) -> None:
    said = run(FAPO, "convert", POLICY, "--to", tmp_path / "fp8", "--quantize", "fp8", "--verify")
    assert "8 matrices are FP8 (blockwise); embedding, norms and k_proj, lm_head, q_proj, v_proj stay BF16" in said
    assert "% (root mean square), at most by 0.9" in said
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert (tmp_path / "fp8" / "tokenizer.json").read_bytes() == (POLICY / "tokenizer.json").read_bytes()


def test_check_shapes_as_table_and_as_json(tmp_path: Path) -> None:
    config = "configs/models/qwen3-4b.json"
    table = run(FAPO, "convert", config, "--check-shapes", "--pipeline", "2")
    assert "each of the checkpoint's 398 tensors exactly once" in " ".join(table.split())
    found = json.loads(run(FAPO, "convert", config, "--check-shapes", "--tensor", "2", "--json").splitlines()[-1])
    assert found["problems"] == []
    assert found["parameters"] == 4_022_468_096
    assert [part["layers"] for part in found["ranks"]] == [36, 36]
    table = run(FAPO, "convert", "configs/qwen2.5-math-7b.yaml", "--check-shapes")
    assert "7,615,616,512 parameters, tensor 2" in " ".join(table.split())
    twice = run(FAPO, "convert", "configs/qwen2.5-math-7b.yaml", "--check-shapes", "--tensor", "4", status=1)
    assert "says the layout itself" in twice


def test_a_wrong_call_says_what_to_do(tmp_path: Path) -> None:
    assert "--to FOLDER says where the result goes" in run(FAPO, "convert", POLICY, status=1)
    assert "is the folder that is read" in run(FAPO, "convert", POLICY, "--to", POLICY, status=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    said = run(FAPO, "convert", POLICY, "--to", tmp_path / "mine", status=1)
    assert "is there and is no model" in " ".join(said.split())
    assert (tmp_path / "mine" / "thesis.txt").is_file()
    assert "RUN/checkpoints/step-N" in run(FAPO, "convert", tmp_path, "--to", tmp_path / "x", status=1)
    assert "absent: no such folder" in run(FAPO, "convert", tmp_path / "absent", "--to", tmp_path / "x", status=1)
