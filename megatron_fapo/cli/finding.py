"""One line of the doctor's report."""

from dataclasses import dataclass
from typing import Literal, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was looked at, what was found, and what to do about it."""

    what: str
    state: Literal["ok", "warning", "error"]
    found: str
    advice: str = ""

    @classmethod
    def of(cls, what: str, found: str, *, warning: str = "", error: str = "") -> Self:
        """An error or a warning where one is said, else ok."""
        state: Literal["ok", "warning", "error"] = "error" if error else "warning" if warning else "ok"
        return cls(what=what, state=state, found=found, advice=error or warning)
