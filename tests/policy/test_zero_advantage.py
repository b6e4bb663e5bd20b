"""Leaving out what has no gradient is the full update: gradients and optimizer state, three updates, one of nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_fapo.algorithm.settings import KlSettings, LossSettings
from megatron_fapo.batch.pack import make_batch
from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.config import Config
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import PolicySettings
from megatron_fapo.records import Floats, StepBatch, StepReport, floats
from tests.policy.lives import LOSS, make_advantages, make_groups, policy_settings
from tests.policy.test_checkpoint import tensors_of

Process = Callable[[PolicySettings], LocalRanks]
State = dict[str, torch.Tensor]
NOTHING = 1
"""The step in which all groups agree."""
BETA = 0.9


def batch_of(step: int, ranks: LocalRanks, skip: bool) -> StepBatch:
    """Two groups of six have no advantage, in step NOTHING none has one."""
    groups = make_groups(step)
    advantages: list[list[Floats]] = [
        [floats(values * (step != NOTHING)) for values in rows] for rows in make_advantages(groups)
    ]
    settings = BatchSettings(tokens_per_microbatch=120, skip_zero_advantage=skip)
    return make_batch(groups, advantages, ranks.layout, settings, seed=1)


def life(ranks: LocalRanks, skip: bool, loss: LossSettings, folder: Path) -> tuple[list[StepReport], list[State]]:
    """Reports of three updates, and after each every weight and moment, gathered over ranks."""
    reports, states = [], []
    for step in range(3):
        reports.append(ranks.call("update", batch_of(step, ranks, skip), loss)[0])
        ranks.call("save", str(folder / f"{skip}-{step}"))
        states.append(tensors_of(folder / f"{skip}-{step}"))
    return reports, states


def gradients(states: list[State], step: int) -> State:
    """Each parameter's gathered gradient of an update, as Adam took it in: m' = beta m + (1 - beta) g."""
    keys = [key for key in states[step] if ".exp_avg." in key]
    before = {key: states[step - 1][key] if step else torch.zeros_like(states[step][key]) for key in keys}
    return {key: (states[step][key] - BETA * before[key]) / (1 - BETA) for key in keys}


def apart(ours: State, expected: State) -> float:
    """The largest difference of a tensor, relative to its largest entry."""
    assert sorted(ours) == sorted(expected)
    return max(
        float((ours[key] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-12))
        for key, tensor in expected.items()
    )


def check(full: tuple[list[StepReport], list[State]], lean: tuple[list[StepReport], list[State]]) -> None:
    (full_reports, full_states), (lean_reports, lean_states) = full, lean
    assert sum(".exp_avg." in key for key in full_states[0]) >= 10
    for step in range(3):
        a, b = lean_reports[step].updates[0], full_reports[step].updates[0]
        assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-5, abs=1e-9)
        assert a.loss_tokens == b.loss_tokens
        assert a.tokens < (0.1 if step == NOTHING else 0.8) * b.tokens
        assert apart(lean_states[step], full_states[step]) < 1e-5
        if step != NOTHING:
            assert apart(gradients(lean_states, step), gradients(full_states, step)) < 1e-5
    for states in (full_states, lean_states):
        # the update of nothing has gradient 0 and is still an update: the moments decay, the weights move on
        assert all(
            torch.allclose(states[NOTHING][key], BETA * states[NOTHING - 1][key], rtol=1e-6, atol=0)
            for key in states[NOTHING]
            if ".exp_avg." in key
        )
        assert apart(states[NOTHING], states[NOTHING - 1]) > 1e-3


@pytest.mark.parametrize("loss", [LOSS, LossSettings(aggregation="sequence_mean")], ids=["token mean", "sequence mean"])
def test_one_rank(process: Process, qwen3: Path, tmp_path: Path, loss: LossSettings) -> None:
    settings = policy_settings(qwen3)
    check(*(life(process(settings), skip, loss, tmp_path) for skip in (False, True)))


def test_two_data_parallel_ranks(qwen3: Path, tmp_path: Path) -> None:
    lives = []
    for skip in (False, True):
        with LocalRanks(policy_settings(qwen3, data=2), seed=5) as ranks:
            lives.append(life(ranks, skip, LOSS, tmp_path))
    check(*lives)


def test_nothing_is_left_out_where_a_term_has_a_gradient_without_an_advantage() -> None:
    servers = {"policy": {"model": "m", "context_length": 10**5}, "judge": {"model": "j", "context_length": 10**5}}
    for loss, skips in (
        (LossSettings(), True),
        (LossSettings(entropy_bonus=0.01), False),
        (LossSettings(kl=KlSettings(coefficient=0.1)), False),
    ):
        config = Config.model_validate(
            {"policy": {"model": "m", "reference": True}, "servers": servers, "algorithm": {"loss": loss.model_dump()}}
        )
        assert config.batch.skip_zero_advantage
        assert config.batching.skip_zero_advantage == skips
