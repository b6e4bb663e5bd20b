"""rollouts/step-N.parquet: every rollout of a step with its verdict, one row each."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_fapo.errors import DataError
from megatron_fapo.observe.interface import StepRecord, files_of
from megatron_fapo.records import Group, Judged, NotJudged, Verdict

FOLDER = "rollouts"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRow:
    """A rollout as it lies on disk; null where the fact does not exist. `SCHEMA` has the same columns."""

    step: int
    rollout_id: str
    prompt_id: str
    task: str
    question: str
    reference_answer: str
    text: str
    """The response decoded."""
    tokens: int
    """Length of the response."""
    finish_reason: str
    right: bool
    score: float
    """Outcome reward."""
    answer: str | None
    """What was read as the answer."""
    why: str
    """The checker's word."""
    verdict: str
    """"clean" or "flawed" by the judge; "off", "wrong", "skipped" or "failed" where no verdict counts."""
    verdict_why: str
    """What went wrong with a failed verdict."""
    first_wrong: int | None
    """0-based paragraph by the judge, -1 clean."""
    p_flawed: float | None
    votes: int | None
    judge_tokens: int
    judge_text: str | None
    probe_first_wrong: int | None
    """By a verdict asked for the metrics alone."""
    oracle: int | None
    """0-based first wrong paragraph by the task's oracle, -1 clean."""
    reward: float | None
    """None when the group was dropped."""
    advantage: float | None
    """Mean over the response's tokens; None when the group was dropped."""
    seed: int
    temperature: float
    versions: list[int]
    """Weight versions that its tokens were drawn with, in order."""
    version_starts: list[int]
    """The token from which each of them counts."""


_TYPES: dict[object, pa.DataType] = {
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
    bool: pa.bool_(),
    int | None: pa.int64(),
    float | None: pa.float64(),
    str | None: pa.string(),
    list[int]: pa.list_(pa.int64()),
}
SCHEMA = pa.schema([pa.field(field.name, _TYPES[field.type]) for field in fields(RolloutRow)])
"""The parquet schema, made from the fields of `RolloutRow`."""


class RolloutsSink:
    """One file a step, zstd; it gets its name when it is whole."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self._folder = folder / FOLDER
        with files_of(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(".*.part"):
                leftover.unlink()
            for step, path in rollout_files(folder).items():
                if step >= resume_step:
                    path.unlink()

    def write(self, record: StepRecord) -> None:
        """Write the step's file; none for a step without rollouts."""
        if not record.groups:
            return
        path = self._folder / f"step-{record.step:06d}.parquet"
        part = path.with_name(f".{path.name}.part")
        rows = [asdict(row) for row in rows_of(record)]
        with files_of(path):
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), part, compression="zstd")
            part.replace(path)

    def close(self) -> None:
        """Nothing stays open between steps."""


def rows_of(record: StepRecord) -> Iterator[RolloutRow]:
    """The rows of a step, group by group."""
    for group in record.groups:
        for judged in group:
            yield _row(record, group, judged)


def rollout_files(folder: Path) -> dict[int, Path]:
    """{step: file} of a run folder, in order."""
    paths = sorted((folder / FOLDER).glob("step-*.parquet"))
    return {int(path.stem.removeprefix("step-")): path for path in paths}


def read_rollouts(path: Path) -> list[RolloutRow]:
    """The rows of one step's file. Raises DataError naming the file when it is missing, damaged or of another kind."""
    try:
        with files_of(path):
            table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a whole parquet file ({error})") from None
    if table.schema.names != SCHEMA.names:
        odd = sorted(set(table.schema.names) ^ set(SCHEMA.names)) or ["their order"]
        raise DataError(f"{path}: columns differ from those of this version in {', '.join(odd)}")
    return [RolloutRow(**row) for row in table.to_pylist()]


def _row(record: StepRecord, group: Group, judged: Judged) -> RolloutRow:
    rollout, outcome, found = judged.rollout, judged.outcome, judged.verdict
    verdict = found if isinstance(found, Verdict) else None
    absent = found if isinstance(found, NotJudged) else None
    return RolloutRow(
        step=record.step,
        rollout_id=rollout.id,
        prompt_id=group.prompt.id,
        task=group.prompt.task,
        question=group.prompt.question,
        reference_answer=group.prompt.reference_answer,
        text=rollout.text,
        tokens=len(rollout.token_ids),
        finish_reason=rollout.finish_reason,
        right=outcome.right,
        score=outcome.score,
        answer=outcome.answer,
        why=outcome.why,
        verdict=absent.reason if absent else "flawed" if verdict and verdict.flawed else "clean",
        verdict_why=absent.why if absent else "",
        first_wrong=verdict.first_wrong if verdict else None,
        p_flawed=verdict.p_flawed if verdict else None,
        votes=verdict.votes if verdict else None,
        judge_tokens=found.tokens,
        judge_text=verdict.text if verdict else None,
        probe_first_wrong=absent.probe.first_wrong if absent and absent.probe else None,
        oracle=judged.oracle,
        reward=record.rewards.get(rollout.id),
        advantage=record.advantages.get(rollout.id),
        seed=rollout.seed,
        temperature=rollout.temperature,
        versions=[span.version for span in rollout.versions],
        version_starts=[span.start for span in rollout.versions],
    )
