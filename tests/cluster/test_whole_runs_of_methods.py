"""Whole runs of other methods, layouts and leads."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.cluster.whole_runs import finish, lines, start, timeless

METHODS = {
    "a corrected bad judge": [
        "judge.errors={missed: 0.3, invented: 0.1}",
        "judge.audit={reference: oracle, share: 1.0, enough: 2, window: 2}",
        "algorithm.reward.correct_rates=true",
        "algorithm.advantage.all_right=shrunk",
    ],
    "another loss, tokens and estimator": [
        "algorithm.loss={objective: {name: gspo}, aggregation: sequence_mean, kl: {coefficient: 0.01}, "
        "entropy_bonus: 0.001, importance: {level: sequence}, mask_truncated: true}",
        "algorithm.advantage={estimator: rloo, flaw: first_wrong_step}",
        "policy.reference=true",
        "policy.rescore=always",
        "rollout.dynamic_sampling=1",
    ],
    "right only, short verdicts": [
        "algorithm.advantage={estimator: reinforce_pp_baseline, flaw: right_only}",
        "algorithm.loss={objective: {name: cispo}, aggregation: constant, constant_length: 64}",
        "algorithm.reward.penalty=soft",
        "judge.probability=token",
        "judge.cascade={clean_below: 0.01}",
        "judge.step_deadline=120",
    ],
}


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_another_method_trains_and_resumes_as_if_never_stopped(tmp_path, method):
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    finish(start(run, *METHODS[method], "checkpoint.every=2"))
    shutil.copytree(run, resumed, symlinks=True)
    shutil.rmtree(resumed / "checkpoints" / "step-000004")
    finish(start(resumed, *METHODS[method], "checkpoint.every=2", "--resume"))
    assert timeless(resumed) == timeless(run)
    assert all(line["train/grad_norm_max"] > 0 for line in lines(run)[:-1])


def rollouts(run: Path) -> list[list[tuple[str, list[int]]]]:
    """Of each step, the rollouts' ids, without the group's place, and the versions that drew them."""
    files = sorted((run / "rollouts").glob("*.parquet"))
    rows = [pq.read_table(file, columns=["rollout_id", "versions"]).to_pylist() for file in files]
    return [[(row["rollout_id"], row["versions"]) for row in step] for step in rows]


AHEAD = ["train.deterministic=false", "train.max_lead=1", "policy.rescore=when_stale", "algorithm.loss.importance={}"]


@pytest.mark.long
def test_a_run_ahead_of_training_bounds_the_lag_and_resumes_without_losing_or_doubling_a_prompt(tmp_path):
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    finish(start(run, *AHEAD, "checkpoint.every=2"))
    shutil.copytree(run, resumed, symlinks=True)
    shutil.rmtree(resumed / "checkpoints" / "step-000004")
    finish(start(resumed, *AHEAD, "checkpoint.every=2", "--resume"))
    for one in (run, resumed):
        for step, drawn in enumerate(rollouts(one)):
            prompts = range(8 * step, 8 * step + 8)
            assert sorted(name for name, _ in drawn) == sorted(f"s{step}-p{p}-r{r}" for p in prompts for r in range(4))
            assert {version for _, versions in drawn for version in versions} <= {max(step - 1, 0), step}
        steps = lines(one)[:-1]
        assert [line["group/too_old"] for line in steps] == [0] * 4
        assert all(line["train/grad_norm_max"] > 0 for line in steps)
    assert [line["rollout/lag_max"] for line in lines(run)[:-1]] == [0, 1, 1, 1]
    assert [line["train/rescored"] for line in lines(run)[:-1]] == [0, 1, 1, 1]
    assert [line["rollout/lag_max"] for line in lines(resumed)[:-1]] == [0, 1, 0, 1]  # step 2 is drawn again


@pytest.mark.long
@pytest.mark.parametrize("axis", ["tensor", "pipeline", "data"])
def test_two_ranks_start_from_the_same_rollouts_and_agree_with_the_engine(whole, tmp_path, axis):
    run = tmp_path / axis
    finish(start(run, f"policy.parallel.{axis}=2", "train.steps=2", "evaluation.every=0"))
    first, second = lines(run)
    assert max(first["mismatch/max"], second["mismatch/max"]) < 1e-4
    alone = lines(whole)[0]
    for name in ("rollout/right_share", "judge/tokens", "reward/mean"):
        assert first[name] == alone[name]
    for name in ("train/loss", "train/grad_norm_mean"):
        assert first[name] == pytest.approx(alone[name], rel=1e-4)
