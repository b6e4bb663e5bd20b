"""The judge's own training reward."""

from megatron_fapo.critique.verdict import Unreadable


def judge_reward(predicted: int | Unreadable, truth: int, paragraphs: int) -> float:
    """FAPO Eq. 7: how good a verdict is, in [-1, 1].

    An unreadable verdict costs 1. On a clean solution (`truth` -1) it is +1 or -1. On a flawed one, "clean" costs 1,
    and an index earns 1 less its distance from the truth as a share of the paragraphs.
    """
    if not -1 <= truth < paragraphs:
        raise ValueError(f"truth {truth} is not in [-1, {paragraphs})")
    if not isinstance(predicted, int):
        return -1.0
    if truth == -1 or predicted == -1:
        return 1.0 if predicted == truth else -1.0
    return 1.0 - abs(predicted - truth) / paragraphs
