"""What a measured side says to the script that measures: it reports readiness, then takes steps when it is told to.

On standard input a line holds how many steps to take; the answer is one line of JSON. Nothing else a side prints
starts with the mark.
"""

import json
import sys
import time
from typing import Any

MARK = "@step "


class Gate:
    """Counts steps; between two orders it waits."""

    def __init__(self) -> None:
        self._left = 0
        self._seconds: list[float] = []
        self._notes: list[dict[str, Any]] = []
        self._started = 0.0

    def before_step(self) -> bool:
        """Wait for an order when none is open; False when there are no more. Then the clock of the step starts."""
        if self._left == 0:
            say({"seconds": self._seconds, "notes": self._notes})
            self._seconds, self._notes = [], []
            self._left = int(sys.stdin.readline() or 0)
        self._started = time.perf_counter()
        return self._left > 0

    def after_step(self, **notes: Any) -> None:
        """Stop the clock of the step; `notes` go beside its seconds."""
        self._seconds.append(time.perf_counter() - self._started)
        self._notes.append(notes)
        self._left -= 1


def say(answer: dict[str, Any]) -> None:
    """One line to the script that measures."""
    sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")
    sys.stdout.flush()
