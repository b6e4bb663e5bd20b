r"""Reading the judge's answer, strictly: nothing is evaluated, and what cannot be read is named, never guessed."""

import re
from typing import Literal

from megatron_fapo.critique.boxed import OPENING, last_boxed

TAIL = 300
"""Characters at the end of the judge's text in which the verdict must stand."""

Unreadable = Literal["no paragraphs", "empty", "no box", "box not closed", "not an integer", "out of range"]
"""Why a text is no verdict."""

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,8}")


def parse_verdict(text: str, paragraphs: int) -> int | Unreadable:
    r"""The index in the last `\boxed{}` of the last 300 characters, in [-1, paragraphs), or why there is none.

    -1 says that no paragraph is wrong.
    """
    if paragraphs < 1:
        return "no paragraphs"
    if not text.strip():
        return "empty"
    tail = text[-TAIL:]
    if OPENING not in tail:
        return "no box"
    content = last_boxed(tail)
    if content is None:
        return "box not closed"
    if not _INTEGER.fullmatch(content.strip()):
        return "not an integer"
    index = int(content)
    return index if -1 <= index < paragraphs else "out of range"
