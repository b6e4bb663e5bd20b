"""Records made by hand, for tests of what consumes them."""

from megatron_fapo.records import Group, Judged, NotJudged, Outcome, Prompt, Rollout, Verdict, VersionSpan, floats, ints

FAILED = "failed"


def make_group(kinds: list[str], *, step: int = 0, prompt_id: str = "p0", length: int = 5) -> Group:
    """A group with one rollout for each kind: clean, flawed, wrong, skipped or failed."""
    prompt = Prompt(id=prompt_id, task="clock", question="q", messages=(), token_ids=ints([1, 2]), reference_answer="3")
    return Group(
        step=step, prompt=prompt, judged=tuple(_judged(k, i, step, prompt_id, length) for i, k in enumerate(kinds))
    )


def make_rollout(rollout_id: str, prompt_id: str, text: str = "a\n\nb", length: int = 5) -> Rollout:
    """A rollout of `length` tokens."""
    return Rollout(
        id=rollout_id,
        prompt_id=prompt_id,
        token_ids=ints(range(3, 3 + length)),
        logprobs=floats([-0.5] * length),
        versions=(VersionSpan(start=0, version=0),),
        temperature=1.0,
        seed=1,
        text=text,
        finish_reason="stop",
    )


def _judged(kind: str, index: int, step: int, prompt_id: str, length: int) -> Judged:
    right = kind != "wrong"
    flawed = kind == "flawed"
    verdicts = {
        "wrong": NotJudged(reason="wrong"),
        "skipped": NotJudged(reason="skipped"),
        FAILED: NotJudged(reason="failed", why="timeout"),
    }
    verdict = Verdict(first_wrong=1 if flawed else -1, p_flawed=float(flawed), votes=1, tokens=9, text="")
    return Judged(
        rollout=make_rollout(f"s{step}-{prompt_id}-r{index}", prompt_id, f"solution {index}\n\nend", length),
        outcome=Outcome(right=right, score=1.0 if right else -1.0, answer="3" if right else "4", why=""),
        verdict=verdicts.get(kind, verdict),
        oracle=None,
    )
