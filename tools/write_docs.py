"""Write the pages that are generated from the code; tests/test_docs.py keeps them true."""

import ast
import re
from pathlib import Path

from megatron_fapo.config import Config
from megatron_fapo.observe.metrics import glossary
from megatron_fapo.settings import reference

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SUITE = ("generating", "control", "weights")
TABLE = re.compile(r"(?<=<!-- conformance -->\n).*?(?=<!-- end -->)", re.DOTALL)


def pages() -> dict[str, str]:
    """{file name: content}."""
    serving = (DOCS / "serving.md").read_text()
    return {
        "config.md": reference(Config),
        "metrics.md": glossary(),
        "serving.md": TABLE.sub(lambda _: conformance(), serving),
    }


def conformance() -> str:
    """The table of what each engine does, from the suite: a row a test, and what an engine is known to do instead."""
    suite = [ast.parse((ROOT / "tests" / "serving" / f"test_conformance_{part}.py").read_text()) for part in SUITE]
    rows = ["| | embedded | sglang |", "|---|---|---|"]
    for test in (node for part in suite for node in part.body):
        if not isinstance(test, ast.AsyncFunctionDef) or not test.name.startswith("test_"):
            continue
        instead = {}
        for decorator in test.decorator_list:
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "known_difference":
                engine, what = (ast.literal_eval(argument) for argument in decorator.args)
                instead[engine] = what
        cells = [(ast.get_docstring(test) or test.name).splitlines()[0]]
        cells += [f"no: {instead[engine]}" if engine in instead else "yes" for engine in ("embedded", "sglang")]
        rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text)
