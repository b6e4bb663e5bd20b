"""The house's rules that no other tool checks: a loop that fits a page, light imports, errors that travel."""

import ast
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fapo import errors

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_fapo"
HEAVY = ("torch", "ray", "transformers", "wandb", "megatron")


def modules_loaded_by(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after `code`."""
    script = f"{code}\nimport sys\nsys.stdout.write(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split("\n")[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import megatron_fapo.config, megatron_fapo.cli.main",
        "import megatron_fapo.rollout.sampler, megatron_fapo.judge.judge, megatron_fapo.publish.publisher",
        "import megatron_fapo.algorithm.rewards, megatron_fapo.algorithm.advantages, megatron_fapo.batch.pack",
        "import megatron_fapo.tasks.registry, megatron_fapo.serving.client, megatron_fapo.evaluate.held_out",
        "from typer.testing import CliRunner; from megatron_fapo.cli.main import app; r = CliRunner().invoke(app, "
        "['train', 'configs/clock/fapo.yaml', '--check']); assert r.exit_code == 0, r.output",
        "from typer.testing import CliRunner; from megatron_fapo.cli.main import app; r = CliRunner().invoke(app, "
        "['--help']); assert r.exit_code == 0, r.output",
    ],
    ids=["config and cli", "sampler and judge", "algorithm and batch", "tasks and client", "--check", "--help"],
)
def test_light_things_load_without_torch_ray_transformers_and_wandb(code):
    assert modules_loaded_by(code) == set()


def test_the_loop_fits_a_page():
    tree = ast.parse((PACKAGE / "train.py").read_text())
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.AsyncFunctionDef)}
    assert lengths["train"] <= 60, lengths


def test_files_and_functions_stay_readable():
    crowded = []
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        text = path.read_text()
        if text.count("\n") > 500:
            crowded.append(f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 80:
                crowded.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has more than 80 lines")
    assert not crowded


def test_only_compat_asks_which_device_this_is():
    """What CPU and CUDA differ in is in the table of `compat.device`; nothing else branches on it."""
    asking = re.compile(r"torch\.cuda\b|is_cuda\b|[\"']cuda[\"':]|device\.name\b|device\.type\b|get_backend\(")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "compat"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if asking.search(line)
    ]
    assert not found


def test_room_inits_are_empty():
    assert [path for path in PACKAGE.rglob("__init__.py") if path.read_text().strip()] == []


ERRORS = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.FapoError)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling_and_stands_in_the_drawn_tree(kind):
    error = kind("no answer", rank=1, step=12)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error) == "no answer (rank 1, step 12)"
    assert kind.__name__ in errors.__doc__


def test_nothing_in_the_project_names_a_machine_or_registry():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    somebodys = re.compile(r"(?<![\w.])/(home|root|Users)/\w|--(extra-)?index-" + "url")
    found = []
    for name in listed:
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".md", ".yaml", ".toml", ".json", ".html", ""}:
            found += [f"{name}: {match.group()}" for match in somebodys.finditer(path.read_text(errors="replace"))]
    assert not found
