"""Docs are executed: every shell block says whether it runs here, and the generated pages are those of the code.

```bash run          run by `make test`
```bash run-long     run by `make test-all`
```bash make         names make targets, which must exist
```bash cluster      for a machine that tests do not have
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tools.write_docs import pages

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
KINDS = {"run", "run-long", "make", "by-hand"}


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(kind: str | None = None) -> list:
    found = []
    for path in documents():
        for number, (language, words, body) in enumerate(FENCE.findall(path.read_text())):
            if language in ("bash", "python") and (kind is None or kind in words.split()):
                found.append(pytest.param(path, language, words.split(), body, id=f"{path.name}-{number}"))
    return found


def execute(language: str, body: str, folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["bash", "-euo", "pipefail", "-c", body] if language == "bash" else [sys.executable, "-c", body]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{body}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What a reader has around a command: the repository's files, and a runs/ folder of its own."""
    for name in ("benchmarks", "configs", "examples", "tools", "docs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize(("path", "language", "words", "body"), blocks())
def test_every_block_says_what_it_is(path, language, words, body):
    assert language == "python" or set(words) & KINDS, f"{path.name}: a bash block needs one of {sorted(KINDS)}"


@pytest.mark.parametrize(("path", "language", "words", "body"), blocks("run"))
def test_short_blocks_run(path, language, words, body, checkout):
    execute(language, body, checkout)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("path", "language", "words", "body"), blocks("run-long"))
def test_long_blocks_run(path, language, words, body, checkout):
    execute(language, body, checkout)


@pytest.mark.parametrize(("path", "language", "words", "body"), blocks("make"))
def test_make_targets_exist(path, language, words, body):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line[1] for line in map(shlex.split, body.splitlines()) if line and line[0] == "make"}
    assert named <= targets


@pytest.mark.parametrize("name", list(pages()))
def test_generated_pages_are_up_to_date(name):
    assert (ROOT / "docs" / name).read_text() == pages()[name], "run `make docs`"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_links_inside_the_project_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
