"""The worker process of `maths_checker`: one JSON line in, one word out."""

import json
import logging
import os
import resource
import sys
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

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


def main() -> None:
    """Answer until the input ends."""
    logging.disable(logging.CRITICAL)  # math-verify warns that its own timeouts are off; the deadline is outside
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever sympy prints must not look like a reply
    replies.write("ready\n")
    for line in sys.stdin:
        question = json.loads(line)
        try:
            reply = compare(question["reference"], question["answer"])
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError):
            reply = "unreadable"
        replies.write(reply + "\n")


if __name__ == "__main__":
    main()
