"""A run whose judge is trained again every so many steps, on the present policy's own rollouts (`judge.refresh`).

    steps 0 .. every - 1     the policy's loop, with the judge it began with
    RUN/judge/step-EVERY/    critic.jsonl (the rows), a run folder of the judge's own loop, outcome.json (written last)
    steps every .. 2·every-1 the policy's loop again, from its checkpoint, with the judge of that folder
    ...

Policy and judge are never in training at once: each stage is `train` as it is, with servers and ranks of its own, which
end with it. So a refresh needs no memory beside the policy's, resumes like any run, and costs two starts.
"""

import asyncio
import json
import logging
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_fapo.config import Config, read_config
from megatron_fapo.errors import ConfigError, ServerError
from megatron_fapo.judge.answerer import Answerer, OpenAI, Served
from megatron_fapo.judge.critic_data import (
    Labels,
    Solution,
    ask_labels,
    assemble,
    draw,
    oracle_labels,
    recorded,
    solutions_of,
)
from megatron_fapo.judge.settings import JudgeSettings, RefreshSettings
from megatron_fapo.records import RunState
from megatron_fapo.run.folder import RunFolder
from megatron_fapo.serving.launcher import launch
from megatron_fapo.serving.settings import ServerSettings
from megatron_fapo.tasks.settings import CritiqueSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer

log = logging.getLogger(__name__)

OUTCOME = "outcome.json"


class Trainer(Protocol):
    """Runs the loop: `train` with servers and ranks of its own."""

    def __call__(
        self, config: Config, folder: RunFolder, *, resume: bool, of: Config | None = None, new_judge: bool = False
    ) -> Awaitable[RunState]:
        """From start, or the newest checkpoint, to the last step of `config`; returns where it ended.

        `of` is the whole run's configuration where this is a stage of it. With `new_judge` what an audit has counted
        is of another judge, and is forgotten.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a refresh did."""

    step: int
    rows: int
    dropped: dict[str, int]
    trained: bool
    """False where there were too few rows, so that the judge stayed as it was."""


async def train_with_refreshes(config: Config, folder: RunFolder, train: Trainer, *, resume: bool) -> RunState:
    """Stages of `judge.refresh.every` steps, and between two of them a refresh; returns where the run ended."""
    plan = config.judge.refresh
    if plan is None:
        return await train(config, folder, resume=resume)
    reached = folder.resumable() if resume else []
    state = reached[0][1] if reached else RunState(step=0, cursor=0)
    judge_training(plan, folder.path / "rows.jsonl", _judge(config, folder, None), seed=0)  # fails now or never
    while True:
        due = 0 < state.step < config.train.steps and state.step % plan.every == 0
        if due and not _outcome(folder, state.step) and not await refresh(config, plan, folder, state.step, train):
            return state
        last = _last_trained(folder, state.step)
        end = min((state.step // plan.every + 1) * plan.every, config.train.steps)
        stage = _stage(config, end, _judge(config, folder, last))
        new_judge = last is not None and last.step == state.step
        state = await train(stage, folder, resume=resume or state.step > 0, of=config, new_judge=new_judge)
        if state.step < end or state.step == config.train.steps:
            return state


async def refresh(config: Config, plan: RefreshSettings, folder: RunFolder, step: int, train: Trainer) -> bool:
    """Label, train, note the outcome; False when the run was asked to stop in between."""
    place = _place(folder, step)
    place.mkdir(parents=True, exist_ok=True)
    judge = _judge(config, folder, _last_trained(folder, step - 1))
    for number in (signal.SIGTERM, signal.SIGINT):  # the stage that ended would hear them, and nobody else
        asyncio.get_running_loop().remove_signal_handler(number)
    dropped: Counter[str] = Counter()
    rollouts = recorded(folder.path, range(step - plan.every, step))
    solutions = draw(solutions_of(rollouts, folder.path.name, dropped), plan.limit, config.train.seed + step, dropped)
    labels = await _labels(config, plan, solutions, place)
    data = assemble(solutions, labels, balance=True, seed=config.train.seed + step, dropped=dropped)
    enough = len(data.rows) >= plan.min_rows
    if not enough:
        log.warning(
            "step %d: %d rows for the judge (%s), judge.refresh.min_rows is %d: it stays as it is",
            step, len(data.rows), data.dropped, plan.min_rows,
        )  # fmt: skip
    else:
        rows = place / "critic.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in data.critic()))
        own = RunFolder(place)
        training = judge_training(plan, rows, judge, seed=config.train.seed + step)
        state = await train(training, own, resume=own.started())
        if state.step < training.train.steps:
            return False
    outcome = Outcome(step=step, rows=len(data.rows), dropped=data.dropped, trained=enough)
    part = place / f".{OUTCOME}"
    part.write_text(json.dumps(asdict(outcome)))
    part.replace(place / OUTCOME)
    return True


def judge_training(plan: RefreshSettings, rows: Path, judge: str, *, seed: int) -> Config:
    """The configuration of one refresh: its rows, the judge to start from, and the seed. Raises ConfigError."""
    given = {
        "task.train": rows, "policy.model": judge, "servers.policy.model": judge, "train.seed": seed,
        "checkpoint.export_hf": "true",
    }  # fmt: skip
    name = read_config(plan.config).task.name
    if name != "critique":
        raise ConfigError(f"judge.refresh.config: {plan.config} trains on task {name}, not on critique")
    training = read_config(plan.config, [f"{key}={value}" for key, value in given.items()])
    assert isinstance(training.task, CritiqueSettings)
    if training.task.held_out is None and training.task.held_out_rows >= plan.min_rows:
        raise ConfigError(
            f"judge.refresh.min_rows = {plan.min_rows} must be more than the {training.task.held_out_rows} rows that "
            f"task.held_out_rows of {plan.config} takes off them"
        )
    return training


async def _labels(config: Config, plan: RefreshSettings, solutions: list[Solution], place: Path) -> Labels:
    if plan.labels == "oracle":
        return oracle_labels(solutions)
    settings = config.judge.changed(
        votes=plan.votes, temperature=plan.temperature, cascade=None, probability="votes", errors=None
    )
    return await _asked(config, plan, settings, solutions, place)


async def _asked(
    config: Config, plan: RefreshSettings, settings: JudgeSettings, solutions: list[Solution], place: Path
) -> Labels:
    assert plan.model is not None  # its settings say so
    async with _labeller(config, plan) as labeller:
        labels = await ask_labels(solutions, labeller, settings, name=plan.model, out=place / "labels.jsonl")
    missing = len(solutions) - sum(solution.id in labels for solution in solutions)
    if missing > settings.max_failed_share * len(solutions):
        raise ServerError(
            f"{missing} of {len(solutions)} solutions got no label for the refresh of the judge, more than "
            "judge.max_failed_share; what was labelled is kept: --resume asks for the others"
        )
    return labels


@asynccontextmanager
async def _labeller(config: Config, plan: RefreshSettings) -> AsyncIterator[Answerer]:
    assert plan.model is not None
    if plan.endpoint is not None:
        key = None if plan.api_key_file is None else plan.api_key_file.read_text().strip()
        async with OpenAI(plan.endpoint, plan.model, key) as endpoint:
            yield endpoint
        return
    served = config.server("judge").changed(model=plan.model)
    with tempfile.TemporaryDirectory(prefix="fapo-refresh-") as logs:
        async with launch(served, "labeller", Path(logs)) as servers:
            yield Served(servers, ChatTokenizer.load(Path(plan.model)))


def _stage(config: Config, end: int, judge: str) -> Config:
    """The run up to step `end` with a judge; the policy is exported by its last stage alone."""
    values: dict[str, Any] = config.model_dump()
    values["train"]["steps"] = end
    values["checkpoint"]["export_hf"] = config.checkpoint.export_hf and end == config.train.steps
    values["servers"]["judge"]["model"] = judge
    return Config.model_validate(values)


def _judge(config: Config, folder: RunFolder, last: Outcome | None) -> str:
    """The judge's model after the refresh that trained it last, or the one that the run began with."""
    assert isinstance(config.servers.judge, ServerSettings)  # the configuration says so
    return config.servers.judge.model if last is None else str(RunFolder(_place(folder, last.step)).model)


def _place(folder: RunFolder, step: int) -> Path:
    return folder.path / "judge" / f"step-{step:06d}"


def _outcome(folder: RunFolder, step: int) -> Outcome | None:
    path = _place(folder, step) / OUTCOME
    return Outcome(**json.loads(path.read_text())) if path.is_file() else None


def _last_trained(folder: RunFolder, step: int) -> Outcome | None:
    """The newest refresh up to `step` that trained the judge."""
    found = [Outcome(**json.loads(path.read_text())) for path in folder.path.glob(f"judge/step-*/{OUTCOME}")]
    return max((one for one in found if one.trained and one.step <= step), key=lambda one: one.step, default=None)
