"""Which rollouts the page holds, and in what form."""

from collections.abc import Sequence
from typing import Any

from megatron_fapo.critique.paragraphs import split
from megatron_fapo.observe.report.arms import labels
from megatron_fapo.observe.rollouts import RolloutRow
from megatron_fapo.observe.runs import RunRecord

GROUPS = 12
"""Groups kept of a step."""

CHARACTERS = 500_000
"""Text kept of a step; its first group is kept whatever its length."""

GroupRows = list[RolloutRow]


def browser(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """For each run that kept rollouts its first, middle and last step, as browser.js shows them. Raises DataError."""
    return [
        {"label": label, "arm": run.info.arm, "steps": [_step(run, step) for step in chosen_steps(list(run.rollouts))]}
        for label, run in zip(labels(runs), runs, strict=True)
        if run.rollouts
    ]


def chosen_steps(steps: Sequence[int]) -> list[int]:
    """The first, the middle and the last."""
    return sorted({steps[0], steps[len(steps) // 2], steps[-1]})


def chosen_groups(rows: Sequence[RolloutRow]) -> tuple[list[GroupRows], int]:
    """The groups to keep and how many there are: those with a flawed right answer first, else in the step's order."""
    groups: dict[str, GroupRows] = {}
    for row in rows:
        groups.setdefault(row.prompt_id, []).append(row)
    ordered = sorted(groups.values(), key=lambda group: not any(_flawed(row) for row in group))
    kept: list[GroupRows] = []
    characters = 0
    for group in ordered[:GROUPS]:
        characters += sum(len(row.text) + len(row.judge_text or "") for row in group)
        if kept and characters > CHARACTERS:
            break
        kept.append(group)
    return kept, len(groups)


def _flawed(row: RolloutRow) -> bool:
    return row.right and (row.verdict == "flawed" or row.oracle not in (None, -1))


def _step(run: RunRecord, step: int) -> dict[str, Any]:
    groups, total = chosen_groups(run.rows(step))
    return {"step": step, "total": total, "groups": [_group(group) for group in groups]}


def _group(rows: GroupRows) -> dict[str, Any]:
    return {
        "prompt": rows[0].prompt_id,
        "question": rows[0].question,
        "reference": rows[0].reference_answer,
        "rollouts": [_rollout(row) for row in rows],
    }


def _rollout(row: RolloutRow) -> dict[str, Any]:
    return {
        "id": row.rollout_id,
        "paragraphs": split(row.text),
        "right": row.right,
        "answer": row.answer,
        "why": row.why,
        "verdict": row.verdict,
        "verdictWhy": row.verdict_why,
        "judge": row.first_wrong,
        "probe": row.probe_first_wrong,
        "pFlawed": row.p_flawed,
        "judgeText": row.judge_text,
        "oracle": row.oracle,
        "reward": row.reward,
        "advantage": row.advantage,
        "tokens": row.tokens,
        "finish": row.finish_reason,
    }
