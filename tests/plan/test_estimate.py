"""Memory and times without simulation, and the command."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.config import Config, read_config
from megatron_fapo.errors import ConfigError
from megatron_fapo.plan.advice import advice, bottleneck
from megatron_fapo.plan.assumptions import Assumptions, card, overridden
from megatron_fapo.plan.deployment import deployment
from megatron_fapo.plan.estimate import Plan, estimate, floor
from megatron_fapo.plan.memory import activations
from megatron_fapo.plan.workload import Lengths
from tests.cli.test_commands import fapo

ROOT = Path(__file__).parents[2]
SHIPPED = [*sorted(ROOT.glob("configs/*.yaml")), ROOT / "configs" / "judge" / "genrm-4b.yaml"]
RUN_32B = ROOT / "configs" / "qwen2.5-32b.yaml"
ASSUMED = Assumptions()


@pytest.fixture(autouse=True, scope="module")
def in_the_checkout() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # models are known by configs/models
        yield


def planned(config: Config, gpus: int | None = None) -> Plan:
    return estimate(config, deployment(config, card("h100"), gpus=gpus), ASSUMED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_fits_its_gpus(path: Path) -> None:
    config = read_config(path)
    plan = planned(config)
    assert plan.fits, plan.memory
    assert plan.deployment.gpus == config.policy.parallel.world
    assert plan.seconds > plan.generate.seconds >= plan.generate.floor > 0
    assert min(plan.cache.values()) > 2 * config.servers.policy.context_length


@settings(max_examples=25, deadline=None)
@given(few=st.integers(2, 40), more=st.integers(1, 40))
def test_more_gpus_are_never_slower_in_the_floor(few: int, more: int) -> None:
    config = read_config(RUN_32B)
    asked = [(200, length) for length in Lengths(2300, 0.9, 20480).quantiles(512)]
    floors, updates = [], []
    for nodes in (few, few + more):
        made = deployment(config, card("h100"), gpus=8 * nodes)
        floors.append(floor(made.policy, made, ASSUMED, asked))
        updates.append(estimate_update(config, 8 * nodes))
    assert floors[1] <= floors[0]
    assert updates[1] <= updates[0]


def estimate_update(config: Config, gpus: int) -> float:
    from megatron_fapo.plan.times import update

    made = deployment(config, card("h100"), gpus=gpus)
    lengths = [2500] * 4096
    return update(made, config.policy, config.batch, ASSUMED, lengths, lengths).compute


def test_what_does_not_fit_is_named_with_what_to_do() -> None:
    config = read_config(RUN_32B, ["policy.recompute=none"])
    plan = planned(config)
    assert not plan.fits
    assert set(plan.overfull) == {"update"}
    words = list(advice(plan, config))
    assert words[0].startswith("update lacks")
    assert "activations" in words[0]
    assert "policy.recompute=full" in words[0]


def test_the_bottleneck_has_a_name() -> None:
    many = read_config(RUN_32B, ["rollout.max_new_tokens=512", "policy.rescore=never"])
    assert bottleneck(planned(many)).startswith(("update: matrix products", "judge"))
    assert bottleneck(planned(read_config(RUN_32B))).startswith("generate: reading the weights for few samples")


def test_recomputed_layers_keep_less_and_stages_that_wait_keep_more() -> None:
    config = read_config(RUN_32B)
    made = deployment(config, card("h100"))
    full, selective, none = (
        activations(made.shape, config.policy.changed(recompute=how, recompute_modules=("mlp",)), 8192, 0)
        for how in ("full", "selective", "none")
    )
    assert full < selective < none
    piped = config.policy.changed(parallel={"tensor": 8, "sequence": True, "pipeline": 4}, recompute="none")
    first, last = (activations(made.shape, piped, 8192, stage) for stage in (0, 3))
    assert first == pytest.approx(4 * last)


@settings(max_examples=20, deadline=None)
@given(mean=st.floats(20, 4000), spread=st.floats(0.0, 1.5))
def test_lengths_have_the_mean_that_is_asked_after_the_cut(mean: float, spread: float) -> None:
    lengths = Lengths(mean, spread, 8192).quantiles(1000)
    assert max(lengths) <= 8192
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.02, abs=2)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="known are h100"):
        card("v100")
    with pytest.raises(ConfigError, match="known are dense_mfu"):
        overridden(["mfu=0.5"])
    with pytest.raises(ConfigError, match="name=number"):
        overridden(["dense_mfu=high"])
    with pytest.raises(ConfigError, match="a fraction of 1, at most 1"):
        overridden(["right=1.5"])
    with pytest.raises(ConfigError, match="spread=nan: must be above 0"):
        overridden(["spread=nan"])
    with pytest.raises(ConfigError, match="4 GPUs are too few"):
        deployment(read_config(RUN_32B), card("h100"), gpus=4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mean-tokens", "20480"], "must be below rollout.max_new_tokens = 20480"),
        (["--dead-server", "30"], "--dead-server needs --simulate"),
        (["policy.model=models/mine"], "and none of its name in"),
    ],
)
def test_the_command_says_what_cannot_be(words: list[str], message: str) -> None:
    assert message in fapo("plan", "configs/qwen2.5-32b.yaml", *words, status=1)


def test_the_command_ends_with_the_shares() -> None:
    words = ["plan", "configs/qwen2.5-32b.yaml", "rollout.prompts_per_step=32", "batch.updates=2", "--simulate"]
    output = fapo(*words, "--steps", "1", "--gpus", "128", "--json")
    first, last = json.loads(output.splitlines()[0]), json.loads(output.splitlines()[-1])
    assert first["deployment"]["gpus"] == 128
    assert set(first["memory"]) == {"update", "publish", "generate", "judge"}
    assert set(last) >= {"fits", "judge_overhead", "publish_share", "switch_share", "overhead", "step_seconds"}
    parts = ("judge_overhead", "learning_share", "publish_share", "switch_share")
    assert last["overhead"] == pytest.approx(sum(last[part] for part in parts), abs=2e-4)
    table = fapo(*words[:-1], "policy.recompute=none", status=1)
    assert "activations" in table
    assert "lacks" in table
