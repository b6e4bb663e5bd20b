"""YAML, overrides and cross-checks: what is refused, and what the message says."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_fapo.config import Config, dump_config, read_config
from megatron_fapo.errors import ConfigError
from megatron_fapo.surroundings import check_surroundings

ROOT = Path(__file__).parents[1]
CLOCK = ROOT / "configs/clock/fapo.yaml"


def shipped() -> list[Path]:
    return sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "train" in yaml.safe_load(p.read_text()))


OUTSIDE = "endpoint: 'http://127.0.0.1:9/v1', model: m"


@pytest.mark.parametrize("path", shipped(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_loads_and_survives_a_round_trip(path, tmp_path):
    config = read_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert read_config(copy) == config


def test_overrides_reach_any_key_and_win():
    config = read_config(
        CLOCK, ["train.steps=7", "algorithm.reward.flaw_penalty=1.5", "algorithm.reward.overlong={buffer: 8}"]
    )
    assert config.train.steps == 7
    assert config.algorithm.reward.flaw_penalty == 1.5
    assert config.algorithm.reward.overlong.buffer == 8


def test_inherits_takes_the_other_file_first(tmp_path):
    (tmp_path / "child.yaml").write_text(f"inherits: {CLOCK}\ntrain:\n  arm: child\n")
    child, parent = read_config(tmp_path / "child.yaml"), read_config(CLOCK)
    assert child.train == parent.train.changed(arm="child")
    assert child.rollout == parent.rollout
    (tmp_path / "loop.yaml").write_text("inherits: loop.yaml\n")
    with pytest.raises(ConfigError, match="inherits from itself"):
        read_config(tmp_path / "loop.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rolout.group_size=4", "unknown key 'rolout', did you mean 'rollout'"),
        ("rollout.groupsize=4", "unknown key 'rollout.groupsize', did you mean 'group_size'"),
        ("algorithm.reward.overlong={bufer: 4}", "did you mean 'buffer'"),
        ("rollout.group_size=many", "rollout.group_size: .*integer.*'many'"),
        ("rollout.group_size=1", "group_size = 1: a group advantage needs at least 2"),
        ("train.steps", "write it as section.key=value"),
        ("train.steps.more=1", "'steps' is a value, not a section"),
        ("train.max_lead=1", r"train.max_lead = 1 trains on tokens of older weights"),
        ("cluster.ranks=3", "cluster.ranks = 3, but policy.parallel asks for tensor 1 × pipeline 1 × context 1"),
        ("batch.updates=5", "prompts_per_step = 32 is not a multiple of batch.updates = 5"),
        ("rollout.max_new_tokens=127", r"context_length = 128 is less than .* = 159"),
        ("servers.judge=null", "judge.enabled needs servers.judge"),
        ("judge.max_new_tokens=200", "servers.judge.context_length = 256 must be more than .* = 264"),
        ("policy.dtype=bfloat16", "servers.policy.dtype = float32, but policy.dtype = bfloat16"),
        ("policy.deterministic=false", "train.deterministic needs policy.deterministic"),
        ("servers.policy.port=31001", "port 31001 is given to two servers"),
        ("judge.votes=3", "judge.votes > 1 needs judge.temperature > 0"),
        ("servers.policy.host=0.0.0.0", "set api_key_file"),
        (f"servers.judge={{{OUTSIDE}, tiemout: 3}}", "unknown key 'servers.judge.tiemout', did you mean 'timeout'"),
        ("servers.judge={endpoint: judge.example, model: m}", "servers.judge.endpoint: must be a URL"),
        ("task.name=chess", "task: .*'clock', 'math', 'critique'"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_to_do(override, message):
    with pytest.raises(ConfigError, match=message):
        read_config(CLOCK, ["train.deterministic=true", "servers.judge.port=31001", override])


def test_weights_do_not_reach_another_node_through_shared_memory():
    two = ["cluster.nodes=2", "cluster.serving_nodes=1", "cluster.ray_address=10.0.0.1:6379"]
    across = read_config(CLOCK, two).publish.across("10.0.0.1")
    assert (across.transport, across.group_address) == ("group", "10.0.0.1")
    given = read_config(CLOCK, [*two, "publish.transport=disk", "publish.group_address=10.0.0.9"]).publish
    assert given.across("10.0.0.1") == given
    for transport in ("shared_memory", "cuda_ipc", "delta"):
        with pytest.raises(ConfigError, match=f"publish.transport = {transport} reaches servers on the first rank's"):
            read_config(CLOCK, [*two, f"publish.transport={transport}"])


def test_weights_reach_only_sglang_on_a_gpu_through_its_memory():
    ask = ["publish.transport=cuda_ipc", "servers.policy.engine=sglang"]
    assert read_config(CLOCK, ask).publish.transport == "cuda_ipc"
    with pytest.raises(ConfigError, match=r"servers\.policy is the embedded engine: set auto or shared_memory"):
        read_config(CLOCK, ask[:1])
    with pytest.raises(ConfigError, match=r"servers\.policy is on a CPU: set auto or shared_memory"):
        read_config(CLOCK, [*ask, "servers.policy.sglang.on_cpu=true"])


IN_FP8 = [
    "policy.dtype=bfloat16",
    "policy.rescore=always",
    "servers.policy.dtype=bfloat16",
    "servers.policy.engine=sglang",
]


def test_rollouts_in_fp8_are_corrected_unless_that_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the embedded engine computes in floats; it needs engine sglang"):
        read_config(CLOCK, ["servers.policy.quantization=fp8"])
    with pytest.raises(ConfigError, match="with dtype float32: SGLang multiplies FP8 into BF16"):
        read_config(CLOCK, ["servers.policy.quantization=fp8", "servers.policy.engine=sglang"])
    assert read_config(CLOCK, IN_FP8).algorithm.loss.importance is None
    fp8 = [*IN_FP8, "servers.policy.quantization=fp8"]
    importance = read_config(CLOCK, fp8).algorithm.loss.importance
    assert importance is not None
    assert importance.cap == 2.0
    assert read_config(CLOCK, [*fp8, "algorithm.loss.importance=null"]).algorithm.loss.importance is None
    chosen = read_config(CLOCK, [*fp8, "algorithm.loss.importance={cap: 5}"]).algorithm.loss.importance
    assert chosen is not None
    assert chosen.cap == 5.0


def test_the_setting_and_the_models_folder_agree_on_fp8(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    fp8 = [*IN_FP8, "servers.policy.sglang.python=python3"]
    with pytest.raises(ConfigError, match=r"quantization = fp8, and .* is not: `fapo convert .* fp8 --tensor 1`"):
        check_surroundings(read_config(CLOCK, [*fp8, "servers.policy.quantization=fp8"]))
    config = json.loads((ROOT / "configs/clock/warm-start/policy/config.json").read_text())
    form = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    fp8.append(f"servers.policy.model={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": form}))
    check_surroundings(read_config(CLOCK, [*fp8, "servers.policy.quantization=fp8"]))
    with pytest.raises(ConfigError, match=r"is FP8: set servers\.policy\.quantization=fp8"):
        check_surroundings(read_config(CLOCK, fp8))
    form["weight_block_size"] = None
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": form}))
    with pytest.raises(ConfigError, match="can be published in BF16, and in FP8 with scales of blocks"):
        check_surroundings(read_config(CLOCK, [*fp8, "servers.policy.quantization=fp8"]))


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_config(tmp_path / "none.yaml")
    for text, message in (("train: [", "not YAML"), ("- 1", "must be a mapping")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_config(tmp_path / "bad.yaml")


def test_surroundings_are_checked_before_anything_starts(tmp_path, monkeypatch):
    import socket

    monkeypatch.chdir(ROOT)
    check_surroundings(read_config(CLOCK))
    with pytest.raises(ConfigError, match=r"policy\.model = nowhere: no Hugging Face model there"):
        check_surroundings(read_config(CLOCK, ["policy.model=nowhere"]))
    for override, message in (
        ("policy.parallel.tensor=3", "tensor = 3 does not divide the model's num_attention_heads = 4"),
        ("policy.parallel.pipeline=3", "pipeline = 3 does not divide the model's num_hidden_layers = 2"),
        ("servers.policy.api_key_file=none", "api_key_file none"),
        ("task={name: math, train: none.parquet}", "task.train = none.parquet: no such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_surroundings(read_config(CLOCK, [override]))
    long = ["rollout.max_new_tokens=5000", "servers.policy.context_length=6000", "servers.judge.context_length=6000"]
    with pytest.raises(ConfigError, match="more than the model's max_position_embeddings = 256"):
        check_surroundings(read_config(CLOCK, long))
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(ConfigError, match=f"servers.judge.port: port {port}"):
            check_surroundings(read_config(CLOCK, [f"servers.judge.port={port}"]))


def test_deterministic_runs_have_deterministic_servers():
    config = read_config(CLOCK, ["train.deterministic=true"])
    assert config.server("policy").deterministic
    assert config.server("judge").deterministic
    assert not read_config(CLOCK).server("policy").deterministic


def test_the_reference_page_describes_every_key():
    from megatron_fapo.settings import reference

    page = reference(Config)
    for key in ("flaw_penalty", "prompts_per_step", "context_length", "tokens_per_microbatch", "slip"):
        assert f"| `{key}` |" in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert all(line.split(" | ")[-1].strip(" |") for line in rows), "a key has no description"


def test_a_judge_that_is_the_policy_shares_its_servers_and_waits_there():
    shared = "servers.judge={shares: policy}"
    with pytest.raises(ConfigError, match=r"servers.policy.context_length = 128 must be more than .* = 160"):
        read_config(CLOCK, [shared])
    config = read_config(CLOCK, [shared, "servers.policy.context_length=256"])
    assert [role for role, _ in config.started_servers()] == ["policy"]
    assert config.server("policy").priorities
    assert not read_config(CLOCK).server("policy").priorities


def test_a_judge_outside_needs_no_server_but_its_key_and_cannot_say_probabilities(monkeypatch):
    config = read_config(CLOCK, [f"servers.judge={{{OUTSIDE}, api_key_env: JUDGE_KEY}}"])
    assert [role for role, _ in config.started_servers()] == ["policy"]
    with pytest.raises(ConfigError, match="variable JUDGE_KEY is not set"):
        check_surroundings(config)
    monkeypatch.setenv("JUDGE_KEY", "k")
    check_surroundings(config)
    with pytest.raises(ConfigError, match="do not tell the probability of a verdict"):
        read_config(CLOCK, [f"servers.judge={{{OUTSIDE}}}", "judge.cascade={clean_below: 0.1}"])
