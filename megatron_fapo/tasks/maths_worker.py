"""The worker process of `maths_checker`: one JSON line in, one word out.

    python -m megatron_fapo.tasks.maths_worker LAUNCHER SECONDS

It ends with the process LAUNCHER (see `lifeline`), or when one comparison takes more than SECONDS of processor time,
which the checker's deadline forestalls as long as there is a checker.
"""

import json
import logging
import os
import resource
import sys
import time
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megatron_fapo import lifeline

MEMORY = 2 << 30
"""Bytes of address space; `9^{9^{9^9}}` is cut off here if the deadline does not come first."""


def compare(reference: str, answer: str) -> str:
    """One of the words of `maths_checker.Comparison`."""
    if reference.strip() == answer.strip():
        return "equal"
    known, given = _parsed(reference), _parsed(answer)
    if not known or not given:
        return "unreadable"
    return "equal" if verify(known, given, timeout_seconds=None) else "different"


def _parsed(answer: str) -> list[Any]:
    extraction = [LatexExtractionConfig(), ExprExtractionConfig()]
    return list(parse(f"\\boxed{{{answer}}}", extraction, parsing_timeout=None))


def _limit_time(seconds: int) -> None:
    """From now on, this much processor time; then the kernel ends the process (SIGXCPU), deep in C code or not."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, resource.RLIM_INFINITY))


def main() -> None:
    """Answer until the input ends."""
    launcher, seconds = (int(word) for word in sys.argv[1:])
    lifeline.end_with(launcher)
    logging.disable(logging.CRITICAL)  # math-verify warns that its own timeouts are off; the deadline is outside
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever sympy prints must not look like a reply
    replies.write("ready\n")
    for line in sys.stdin:
        question = json.loads(line)
        _limit_time(seconds)
        try:
            reply = compare(question["reference"], question["answer"])
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError):
            reply = "unreadable"
        replies.write(reply + "\n")


if __name__ == "__main__":
    main()
