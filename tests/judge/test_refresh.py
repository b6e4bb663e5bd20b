"""A judge that learns between the policy's steps: the stages, what each is given, and what is left after an end."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_fapo import manifest
from megatron_fapo.cli.train import run_training
from megatron_fapo.config import Config, dump_config, read_config
from megatron_fapo.errors import ConfigError
from megatron_fapo.manifest import Manifest
from megatron_fapo.observe.rollouts import RolloutRow
from megatron_fapo.observe.runs import read_run
from megatron_fapo.records import RunState
from megatron_fapo.refresh import train_with_refreshes
from megatron_fapo.run.folder import RunFolder
from megatron_fapo.tasks import clock_world
from tests.observe.synthetic import write_run

ROOT = Path(__file__).parents[2]
CLOCK, JUDGE = ROOT / "configs" / "clock" / "fapo.yaml", ROOT / "configs" / "judge" / "clock.yaml"


def config_of(steps: int, training: Path = JUDGE, **refresh: object) -> Config:
    plan = {"every": 2, "config": str(training), "labels": "oracle", "min_rows": 8, **refresh}
    return read_config(CLOCK, [f"train.steps={steps}", f"judge.refresh={json.dumps(plan)}"])


@pytest.fixture
def training(tmp_path) -> Path:
    """The judge's training with few rows held out."""
    path = tmp_path / "judge.yaml"
    path.write_text(f"inherits: {JUDGE}\ntrain: {{steps: 2}}\ntask: {{held_out_rows: 4}}\n")
    return path


def oracle(row: RolloutRow) -> int:
    return clock_world.first_wrong(clock_world.parse(row.question), row.text)


@dataclass
class Loop:
    """In the place of the loop: it notes what it is asked for and leaves rollouts, checkpoints and models behind. It
    stops early in the calls named in `stops`."""

    stops: tuple[int, ...] = ()
    calls: list[tuple[object, ...]] = field(default_factory=list)
    rows: list[list[dict]] = field(default_factory=list)

    async def __call__(self, config, folder, *, resume, of=None, new_judge=False) -> RunState:
        start = folder.resumable()[0][1].step if resume and folder.resumable() else 0
        stop = len(self.calls) in self.stops
        end = config.train.steps - stop
        if config.task.name == "critique":
            self.calls.append(("judge", start, end, Path(config.policy.model).parent.name))
            self.rows.append([json.loads(line) for line in Path(config.task.train).read_text().splitlines()])
            assert config.policy.model == Path(config.servers.policy.model)
        else:
            judge = Path(config.servers.judge.model)
            self.calls.append(("policy", start, end, judge.parent.name, new_judge))
            write_run(folder.path, "fapo", 1, end, first=start)
            assert of.train.steps >= config.train.steps
            assert config.checkpoint.export_hf == (config.train.steps == of.train.steps)
        folder.create()
        folder.config.write_text(dump_config(of or config))
        state = RunState(step=end, cursor=end)
        path = folder.open_checkpoint(end)
        manifest.write(path, Manifest(updates=end, layout={}, files={}))
        folder.close_checkpoint(state, config.checkpoint)
        if not stop:
            folder.model.mkdir(exist_ok=True)
        return state


async def test_stages_alternate_and_each_has_the_newest_judge(tmp_path, training):
    folder, loop = RunFolder(tmp_path / "run"), Loop()
    state = await train_with_refreshes(config_of(5, training), folder, loop, resume=False)
    assert state.step == 5
    assert loop.calls == [
        ("policy", 0, 2, "warm-start", False),
        ("judge", 0, 2, "warm-start"),
        ("policy", 2, 4, "step-000002", True),
        ("judge", 0, 2, "step-000002"),
        ("policy", 4, 5, "step-000004", True),
    ]


async def test_rows_are_of_the_stage_s_own_rollouts_balanced_and_as_the_oracle_says(tmp_path, training):
    loop = Loop()
    folder = RunFolder(tmp_path / "run")
    await train_with_refreshes(config_of(4, training), folder, loop, resume=False)
    (rows,) = loop.rows
    truths = [row["reward_model"]["ground_truth"] for row in rows]
    assert truths.count(-1) * 2 == len(truths) >= 8
    seen = [row for step in (0, 1) for row in read_run(folder.path).rows(step) if row.right]
    truth = {(row.question, row.text): oracle(row) for row in seen}
    flawed = sum(index != -1 for index in truth.values())
    assert len(truths) == 2 * min(flawed, len(truth) - flawed)
    outcome = json.loads((tmp_path / "run/judge/step-000002/outcome.json").read_text())
    assert (outcome["step"], outcome["rows"], outcome["trained"]) == (2, len(rows), True)
    assert outcome["dropped"]["more than the other class"] > 0


async def test_with_too_few_rows_the_judge_stays(tmp_path, caplog):
    loop = Loop()
    await train_with_refreshes(config_of(4, min_rows=10_000), RunFolder(tmp_path / "run"), loop, resume=False)
    assert [call[0] for call in loop.calls] == ["policy", "policy"]
    assert loop.calls[1] == ("policy", 2, 4, "warm-start", False)
    assert "it stays as it is" in caplog.text


async def test_a_run_that_ends_in_any_stage_goes_on_there(tmp_path, training):
    whole = Loop()
    await train_with_refreshes(config_of(4, training), RunFolder(tmp_path / "whole"), whole, resume=False)
    for ended in range(len(whole.calls)):
        folder, loop = RunFolder(tmp_path / f"ended-{ended}"), Loop(stops=(ended,))
        config = config_of(4, training)
        state = await train_with_refreshes(config, folder, loop, resume=False)
        assert state.step < 4
        assert len(loop.calls) == ended + 1
        state = await train_with_refreshes(config, folder, loop, resume=True)
        assert state.step == 4
        kind, begin = loop.calls[ended + 1][:2]
        assert kind == whole.calls[ended][0]
        assert begin == loop.calls[ended][2]
        assert [call[0] for call in loop.calls[ended + 1 :]] == [call[0] for call in whole.calls[ended:]]


async def test_a_training_that_is_none_is_refused_before_anything_starts(tmp_path):
    for config, reason in [
        (config_of(4, CLOCK), "not on critique"),
        (config_of(4, min_rows=64), "must be more than the 64 rows"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            await train_with_refreshes(config, RunFolder(tmp_path / "run"), Loop(), resume=False)
    plan = f"every: 2, config: {JUDGE}, labels: oracle"
    for changes, reason in [
        (["observe.rollouts=false", f"judge.refresh={{{plan}}}"], r"needs observe\.rollouts"),
        ([f"judge.refresh={{{plan}, model: x}}"], "'oracle' neither"),
        (["task={name: math}", f"judge.refresh={{{plan}}}"], "has none; name a labeller"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            read_config(CLOCK, changes)


@pytest.mark.long
async def test_the_judge_s_weights_change_and_its_servers_judge_with_them(tmp_path, training):
    """Real loops, servers and ranks: two steps, a refresh, another step."""
    small = f"inherits: {training}\ntrain: {{steps: 1}}\nrollout: {{prompts_per_step: 8, dynamic_sampling: 0}}\n"
    quick = tmp_path / "quick.yaml"
    quick.write_text(small)
    config = config_of(3, quick).changed(
        rollout={**config_of(3).rollout.model_dump(), "prompts_per_step": 8},
        observe={"console": "off", "report": False},
        judge={**config_of(3, quick).judge.model_dump(), "audit": {"reference": "oracle", "share": 1.0}},
    )
    folder = RunFolder(tmp_path / "run")
    state = await train_with_refreshes(config, folder, run_training, resume=False)
    assert state.step == 3
    judge = folder.path / "judge" / "step-000002" / "model"
    before = (ROOT / config.servers.judge.model / "model.safetensors").read_bytes()
    assert (judge / "model.safetensors").read_bytes() != before
    assert sorted(read_run(folder.path).rollouts) == [0, 1, 2]
    assert len(state.audit) == 1, "what was counted of the judge before is forgotten"
    assert str(judge) in (folder.logs / "judge-0.log").read_text()
