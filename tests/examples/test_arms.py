"""The arms of the clock world: each file is a configuration that holds, and says what it is called."""

from pathlib import Path

import pytest

from megatron_fapo.config import read_config
from megatron_fapo.errors import ConfigError

ARMS = sorted((Path(__file__).parents[2] / "configs" / "clock" / "arms").glob("*.yaml"))


@pytest.mark.parametrize("path", ARMS, ids=lambda path: path.stem)
def test_an_arm_is_named_as_its_file_and_differs_from_fapo(path):
    config, fapo = read_config(path), read_config(path.parents[1] / "fapo.yaml")
    assert config.train.arm == path.stem
    assert (config.algorithm, config.judge) != (fapo.algorithm, fapo.judge)
    assert config.policy == fapo.policy


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["algorithm.loss.kl={coefficient: 0.1}"], "needs policy.reference=true"),
        (["algorithm.loss.importance={level: token}"], "needs policy.rescore=always"),
        (["algorithm.loss.entropy_bonus=0.01", "policy.entropy=false"], "needs policy.entropy=true"),
        (["algorithm.advantage.all_right=agreed"], "needs judge.votes > 1"),
        (["algorithm.advantage.all_right=shrunk"], "needs the judge's error rates"),
        (["algorithm.reward.correct_rates=true"], "needs the judge's error rates"),
        (["algorithm.reward.penalty=soft"], "p is 0 or 1"),
        (
            ["algorithm.advantage.flaw=first_wrong_step", "judge.cascade={clean_below: 0.1, flawed_above: 0.9}"],
            "does not know which step",
        ),
    ],
)
def test_a_method_without_what_it_needs_is_refused(changes, reason):
    path = Path(__file__).parents[2] / "configs" / "clock" / "fapo.yaml"
    with pytest.raises(ConfigError, match=reason):
        read_config(path, changes)


def test_nothing_is_left_out_of_the_passes_where_every_token_has_a_gradient():
    path = Path(__file__).parents[2] / "configs" / "clock" / "fapo.yaml"
    assert read_config(path).batching.skip_zero_advantage
    changed = read_config(path, ["algorithm.loss.entropy_bonus=0.01"])
    assert not changed.batching.skip_zero_advantage
