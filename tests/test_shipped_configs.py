"""The configurations for GPU clusters: each loads and is checked here, where neither weights nor SGLang are."""

from pathlib import Path

import pytest

from megatron_fapo.config import read_config
from megatron_fapo.errors import ConfigError
from megatron_fapo.surroundings import check_surroundings, lacking
from tests.cli.test_commands import fapo

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(ROOT.glob("configs/*.yaml"))


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_only_weights_and_sglang_are_missing(path):
    config = read_config(path)
    lacks = lacking(config)
    missing = {lack.partition(" = ")[0] for lack in lacks}
    assert missing <= {
        "policy.model, servers.policy.model",
        "servers.judge.model",
        "servers.policy.sglang.python",
        "servers.judge.sglang.python",
    }
    if lacks:
        with pytest.raises(ConfigError) as refused:
            check_surroundings(config)
        assert str(refused.value) == lacks[0]
    with pytest.raises(ConfigError, match="tensor = 7 does not divide"):
        lacking(read_config(path, ["policy.parallel={tensor: 7, sequence: true}"]))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_gpus_are_shared_whole(path):
    """In generation, servers of both roles fill exactly the GPUs that train; a node holds whole servers."""
    config = read_config(path)
    used = [server.count * server.sglang.tensor_parallel for _, server in config.started_servers()]
    assert sum(used) == config.policy.parallel.world
    assert all(8 % server.sglang.tensor_parallel == 0 for _, server in config.started_servers())
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    assert config.batch.tokens_per_microbatch >= longest, "the longest rollouts would be computed alone"


def test_check_says_what_could_not_be_checked():
    output = fapo("train", "configs/qwen2.5-32b.yaml", "policy.model=models/elsewhere/Qwen2.5-32B", "--check")
    assert "64 training rank(s)" in output
    assert "passed, as far as can be checked here" in output
    assert "- policy.model = models/elsewhere/Qwen2.5-32B: no Hugging Face model there" in output
    unknown = fapo("train", "configs/qwen2.5-32b.yaml", "policy.model=models/unknown", "--check", status=1)
    assert "hf download" in unknown


PUBLISHED = {
    "qwen2.5-math-7b": {"train.steps": 200, "rollout.max_new_tokens": 8192},
    "qwen2.5-32b": {"train.steps": 600, "rollout.max_new_tokens": 20480},
}
"""The run settings that the paper has for each model."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_paper_runs_have_the_papers_settings(name):
    config = read_config(ROOT / "configs" / f"{name}.yaml")
    optimizer, loss, reward = config.policy.optimizer, config.algorithm.loss, config.algorithm.reward
    assert (config.train.steps, config.rollout.max_new_tokens) == tuple(PUBLISHED[name].values())
    assert (config.rollout.prompts_per_step, config.rollout.group_size) == (512, 8)
    assert config.rollout.prompts_per_step // config.batch.updates == 32
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.max_prompt_tokens) == (1.0, 1.0, 2048)
    assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.schedule) == (1e-6, 10, "constant")
    assert (optimizer.weight_decay, optimizer.beta1, optimizer.beta2, optimizer.clip_grad) == (0.1, 0.9, 0.999, 1.0)
    assert (loss.objective.clip_low, loss.objective.clip_high, loss.objective.dual_clip) == (0.2, 0.28, 10.0)
    assert (loss.aggregation, loss.kl, loss.entropy_bonus, loss.importance) == ("token_mean", None, 0.0, None)
    assert (reward.flaw_penalty, reward.overlong.buffer, reward.overlong.factor) == (1.0, 4096, 1.0)
    assert (config.algorithm.advantage.estimator, config.rollout.dynamic_sampling) == ("grpo", 0)
    assert (config.evaluation.temperature, config.evaluation.top_p) == (1.0, 0.7)
