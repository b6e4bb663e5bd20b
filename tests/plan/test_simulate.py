"""The real sampler and judge against modelled servers: small steps, and identities that must hold between them."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_fapo.config import Config, read_config
from megatron_fapo.errors import JudgeError
from megatron_fapo.plan.assumptions import Assumptions, card
from megatron_fapo.plan.deployment import Deployment, JudgePlace, Placement, deployment
from megatron_fapo.plan.servers import ModelledServer
from megatron_fapo.plan.simulate import Step, simulate, world
from megatron_fapo.plan.times import Rates
from megatron_fapo.plan.virtual_time import run_virtual

ROOT = Path(__file__).parents[2]
ASSUMED = Assumptions()
SMALL = ("rollout.prompts_per_step=32", "batch.updates=2", "judge.step_deadline=null")
AT_ONCE = Rates(fixed=0, weights=0, token=0, sample=0, prefill_token=0, prefill_square=0)


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # models are known by configs/models


def run_32b(*overrides: str) -> Config:
    return read_config(ROOT / "configs" / "qwen2.5-32b.yaml", [*SMALL, *overrides])


def on_gpus(
    config: Config, judge_place: JudgePlace = "slice", placement: Placement | None = None, gpus: int = 64
) -> Deployment:
    return deployment(config, card("h100"), judge_place=judge_place, placement=placement, gpus=gpus)


def one_step(config: Config, made: Deployment, assume: Assumptions = ASSUMED, dead_server: float | None = None) -> Step:
    async def run() -> Step:
        return await world(config, made, assume).step(0, dead_server)

    return run_virtual(run())


def test_a_judge_that_answers_at_once_and_flags_nothing_costs_nothing() -> None:
    config = run_32b()
    made = on_gpus(config)
    assume = replace(ASSUMED, flawed=0.0)

    async def run() -> Step:
        simulated = world(config, made, assume)
        for server in simulated.judge:
            server.engine.rates = AT_ONCE
        return await simulated.step(0, None)

    judged, plain = run_virtual(run()), one_step(config, replace(made, judge=None), assume)
    assert judged.judged > 0
    assert judged.generate == pytest.approx(plain.generate, rel=1e-9)
    assert judged.update == plain.update


def test_the_same_seed_gives_the_same_step_and_another_seed_another() -> None:
    steps = [one_step(run_32b(seed), on_gpus(run_32b())) for seed in ("train.seed=1", "train.seed=1", "train.seed=2")]
    assert asdict(steps[0]) == asdict(steps[1])
    assert steps[0].tokens != steps[2].tokens


def test_rollouts_are_the_same_with_and_without_a_judge() -> None:
    config = run_32b()
    simulation = simulate(config, on_gpus(config), ASSUMED, steps=1)
    assert simulation.steps[0].tokens == simulation.plain[0].tokens
    assert simulation.plain[0].judged == 0
    assert simulation.overhead == pytest.approx(
        simulation.steps[0].seconds / (simulation.plain[0].generate + simulation.plain[0].update) - 1
    )


def test_a_dead_server_costs_time_and_no_rollout() -> None:
    config = run_32b()
    made = on_gpus(config, gpus=16)
    assert made.policy.count == 3
    well, hurt = one_step(config, made), one_step(config, made, dead_server=60.0)
    assert (hurt.tokens, hurt.judged, hurt.failed) == (well.tokens, well.judged, 0)
    assert hurt.rollouts_landed > well.rollouts_landed


def test_verdicts_overlap_with_generation_but_not_where_the_judge_comes_after() -> None:
    config = run_32b()
    apart, after = (one_step(config, on_gpus(config, place)) for place in ("slice", "after"))
    alone = after.generate - after.rollouts_landed
    assert apart.generate < apart.rollouts_landed + alone
    assert after.generate > after.rollouts_landed
    waiting = run_32b("judge.step_deadline=1")  # which says nothing about verdicts that begin after the last rollout
    assert one_step(waiting, on_gpus(waiting, "after")) == after


def test_servers_that_share_gpus_are_slower_than_alone() -> None:
    config = run_32b()
    shared = one_step(config, on_gpus(config, "shared"))
    alone = one_step(config, on_gpus(config, "shared").without_judge())
    assert shared.rollouts_landed > 1.05 * alone.rollouts_landed


def test_each_policy_server_shares_with_the_judges_on_its_gpus() -> None:
    config = run_32b()
    made = on_gpus(config, "shared")
    simulated = world(config, made, ASSUMED)
    assert (made.policy.tensor, made.judge and made.judge.tensor) == (4, 1)
    assert [len(server.neighbours) for server in simulated.policy] == [4] * 16
    assert [server.neighbours[0].url for server in simulated.judge[:5]] == ["policy-0"] * 4 + ["policy-1"]
    assert 2 * simulated.judge[0].engine.capacity < world(config, on_gpus(config), ASSUMED).judge[0].engine.capacity


def test_skips_and_a_cascade_save_judge_tokens() -> None:
    plain, cascade = run_32b("judge.skip=false"), run_32b("judge.cascade.clean_below=0.05")
    every, few = one_step(plain, on_gpus(plain)), one_step(cascade, on_gpus(cascade))
    assert every.skipped == 0 < few.skipped
    assert few.judge_tokens < 0.5 * every.judge_tokens
    assert every.judged > few.judged


def test_a_deadline_ends_the_wait_for_the_last_verdicts_and_they_count_as_failed() -> None:
    config = run_32b("judge.step_deadline=5", "judge.max_failed_share=1")
    alike = replace(ASSUMED, spread=0.05)  # so that verdicts are still out when the last rollout ends
    step = one_step(config, on_gpus(config), alike)
    assert step.failed > 0
    assert step.generate == pytest.approx(step.rollouts_landed + 5, abs=0.01)


def test_what_a_dead_judge_does_is_the_judges_own_error() -> None:
    config = run_32b()

    async def run() -> Step:
        simulated = world(config, on_gpus(config), ASSUMED)
        for server in simulated.judge:
            server.die()
        return await simulated.step(0, None)

    with pytest.raises(JudgeError, match="is dead"):
        run_virtual(run())


def test_ranks_apart_change_no_phase() -> None:
    config = run_32b()
    split = on_gpus(config, placement="split", gpus=128)
    assert split.parallel.world + split.serving == 128
    step = one_step(config, split)
    assert step.switch == 0
    assert step.publish > one_step(config, on_gpus(config)).publish


def test_lent_gpus_shorten_a_step_that_waits_for_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real `Lender`, on servers that answer in virtual time; at no moment do both servers of a GPU work."""
    lending = ("servers.policy.lend=12", "servers.judge.lend=16")
    alone = run_32b("judge.skip=false")
    assume = replace(ASSUMED, mean_share=0.03, verdict_tokens=7000.0)
    config = run_32b("judge.skip=false", *lending)
    made = deployment(config, card("h100"), gpus=16, judge_gpus=4)
    assert (made.policy.count, made.policy.lend, made.judge and made.judge.lend) == (3, 3, 4)
    assert made.bays is not None
    assert made.bays.lent == {"policy": 3, "judge": 1}
    assert (made.bays.guests("policy"), made.bays.guests("judge")) == (1, 12)
    simulated = world(config, made, assume)
    twins = [bay for _, bay in made.bays.grouped({"policy": simulated.policy, "judge": simulated.judge})]
    wake = ModelledServer._wake

    def watched(server: ModelledServer) -> None:
        wake(server)
        for bay in twins:
            assert not all(any(one.active for one in servers) for servers in bay.values())

    monkeypatch.setattr(ModelledServer, "_wake", watched)

    async def run() -> Step:
        return await simulated.step(0, None)

    lent = run_virtual(run())
    kept = one_step(alone, deployment(alone, card("h100"), gpus=16, judge_gpus=4), assume)
    assert (lent.tokens, lent.judged, lent.judge_tokens) == (kept.tokens, kept.judged, kept.judge_tokens)
    assert lent.generate < 0.8 * kept.generate
    for role in ("policy", "judge"):
        assert any(stint.lent and stint.seconds > 1 for stint in simulated.stints if stint.role == role)


def test_gpus_are_lent_from_a_slice_alone() -> None:
    config = run_32b("servers.policy.lend=12")
    assert on_gpus(config).bays is not None
    assert on_gpus(config, "shared").bays is None
    assert on_gpus(config).without_judge().bays is None
