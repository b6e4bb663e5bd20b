"""An evaluation on disk, a line a prompt, so that one that was cut off goes on where it was.

The first line says what was evaluated and how (`Identity`); each further one holds a prompt with all its samples. A
half last line, as a killed process leaves it, is drawn again.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_fapo.errors import DataError, ResumeError
from megatron_fapo.evaluate.scores import Sample
from megatron_fapo.records import Group, Judged, NotJudged, Verdict

Identity = Mapping[str, Any]
"""Everything that the samples depend on, as plain values of JSON."""


class Kept:
    """The samples of an evaluation. Opened on a file of another evaluation it raises ResumeError naming what differs;
    on a damaged one DataError naming the line."""

    def __init__(self, path: Path, identity: Identity, judge: bool) -> None:
        self.path = path
        self.judge = judge
        self._prompts: dict[str, list[Sample]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = self._read(identity) if path.exists() else []
            part = path.with_name(f".{path.name}.part")
            part.write_text("".join(f"{line}\n" for line in whole or [json.dumps(identity)]))
            part.replace(path)
            self._file = path.open("a")
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error

    def __contains__(self, prompt_id: str) -> bool:
        return prompt_id in self._prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def samples(self, prompt_id: str) -> list[Sample]:
        """The samples of a prompt that is kept."""
        return self._prompts[prompt_id]

    def write(self, group: Group) -> None:
        """Keep a prompt whose samples are complete."""
        samples = [_sample_line(judged) for judged in group]
        prompt = group.prompt
        line = {"prompt": prompt.id, "question": prompt.question, "reference": prompt.reference_answer}
        self._file.write(json.dumps({**line, "samples": samples}, ensure_ascii=False) + "\n")
        self._file.flush()
        self._prompts[prompt.id] = samples_of(group)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, identity: Identity) -> list[str]:
        """The whole lines; their prompts are taken in."""
        lines = self.path.read_bytes().decode(errors="replace").split("\n")
        whole = lines[:-1]
        for number, line in enumerate(whole, start=1):
            try:
                value = json.loads(line)
                if number > 1:
                    self._prompts[value["prompt"]] = [_sample(one) for one in value["samples"]]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self.path}: line {number} is damaged ({error}); delete the file") from None
            if number == 1 and value != identity:
                raise ResumeError(
                    f"{self.path} holds another evaluation, name another --out folder: {_differences(value, identity)}"
                )
        return whole


def samples_of(group: Group) -> list[Sample]:
    """What the scores need of a group."""
    return [_sample(_sample_line(judged)) for judged in group]


def judged_at_all(groups: Sequence[Group]) -> bool:
    """Whether there was a judge, which a right answer's absent verdict tells."""
    verdicts = [judged.verdict for group in groups for judged in group]
    return not any(isinstance(verdict, NotJudged) and verdict.reason == "off" for verdict in verdicts)


def _sample_line(judged: Judged) -> dict[str, Any]:
    verdict = judged.verdict if isinstance(judged.verdict, Verdict) else None
    return {
        "id": judged.rollout.id,
        "right": judged.outcome.right,
        "answer": judged.outcome.answer,
        "why": judged.outcome.why,
        "judge": None if verdict is None else verdict.first_wrong,
        "oracle": judged.oracle,
        "tokens": len(judged.rollout.token_ids),
        "text": judged.rollout.text,
        "judge_text": None if verdict is None else verdict.text,
    }


def _sample(line: Mapping[str, Any]) -> Sample:
    return Sample(
        right=bool(line["right"]),
        answer=line["answer"],
        clean=None if line["judge"] is None else line["judge"] == -1,
        sound=None if line["oracle"] is None else line["oracle"] == -1,
    )


def _differences(before: object, now: Identity) -> str:
    if not isinstance(before, dict):
        return "it has no head"
    old, new = _leaves(before), _leaves(now)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return "; ".join(f"{key} was {old.get(key)!s:.80}, is {new.get(key)!s:.80}" for key in keys)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Settings by their dotted names, so that a difference deep inside of one is what is shown."""
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
