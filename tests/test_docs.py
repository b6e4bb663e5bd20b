"""Docs are executed: every shell block says whether it runs here, and the generated pages are those of the code.

```bash run          run by `make test`
```bash run-long     run by `make test-all`
```bash make         names make targets, which must exist
```bash by-hand      for a machine or a time that tests do not have; its `fapo` commands must parse, its overrides hold
"""

import ast
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from megatron_fapo import errors
from megatron_fapo.cli.main import app
from megatron_fapo.config import read_config
from tests.conftest import lacking
from tools.write_docs import pages

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = {"CONFIG", "FILE", "MODEL"}
KINDS = {"run", "run-long", "make", "by-hand"}


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]


def name_of(path: Path) -> str:
    return path.parent.name if path.parent.parent.name == "examples" else path.name


def blocks(kind: str | None = None) -> list:
    found = []
    for path in documents():
        for number, (language, words, body) in enumerate(FENCE.findall(path.read_text())):
            if language in ("bash", "python") and (kind is None or kind in words.split()):
                found.append(pytest.param(path, language, words.split(), body, id=f"{name_of(path)}-{number}"))
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


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_links_inside_the_project_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def commands() -> list:
    """Every `fapo …` of the blocks that are not run."""
    found = []
    for block in blocks("by-hand"):
        path, language, _, body = block.values
        for line in body.replace("\\\n", " ").splitlines() if language == "bash" else []:
            if line.startswith("fapo "):
                words = shlex.split(line, comments=True)
                found.append(pytest.param(words[1:], id=f"{name_of(path)}: {' '.join(words)[:60]}"))
    return found


@pytest.mark.parametrize("words", commands())
def test_commands_that_are_not_run_parse_and_their_overrides_hold(words):
    command = typer.main.get_command(app).commands[words[0]]
    given = command.make_context(words[0], list(words[1:])).params
    config = given.get("config")
    if config is not None and str(config) not in PLACEHOLDERS:
        read_config(ROOT / config, given.get("overrides") or ())


def messages() -> list[str]:
    """Every text in the package that is no docstring, with … for what is filled in."""
    found = []
    for path in (ROOT / "megatron_fapo").rglob("*"):
        if path.suffix == ".py":
            nodes = list(ast.walk(ast.parse(path.read_text())))
            described = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            for node in nodes:
                if id(node) in described:
                    continue
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_every_error_has_a_section_and_what_is_quoted_is_what_the_code_says():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = " ".join(re.findall(r"^## (.*)$", page, re.MULTILINE))
    kinds = [name for name, kind in inspect.getmembers(errors, inspect.isclass) if kind is not errors.FapoError]
    assert [name for name in kinds if not re.search(rf"\b{name}\b", headings)] == []
    said = messages()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 25
    for quote in quoted:
        parts = [part.strip() for part in quote.split("…") if part.strip()]
        assert any(all(part in text for part in parts) for text in said), f"the code does not say {quote!r}"


def test_the_site_builds_strictly_and_leads_everywhere(tmp_path):
    if importlib.util.find_spec("material") is None:
        lacking("mkdocs-material is not installed: make site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    walks = {f"examples/{path.parent.name}.html" for path in (ROOT / "examples").glob("*/README.md")}
    assert pages >= walks | {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    assert {f"examples/{name}.html" for name in ("clock", "judge", "math", "slurm-32b")} <= walks
    for page in pages - {"404.html"}:
        text = (tmp_path / "site" / page).read_text()
        for target, anchor in re.findall(r'<a[^>]* href="([^"#:]*)(?:#([^"]*))?"', text):
            leads = (tmp_path / "site" / page).parent / target if target else tmp_path / "site" / page
            assert leads.exists(), f"{page} links to {target}"
            if anchor and not anchor.startswith("__"):
                assert f'id="{anchor}"' in leads.read_text(), f"{page} links to {target}#{anchor}"
        assert "```" not in text, f"{page} has a fence that was not read"
        asked = re.findall(r'<(?:script|link|img|iframe)[^>]* (?:src|href)="(https?:[^"]*)', text)
        assert asked == [], f"{page} asks another host"
