"""run.json: which run a folder holds."""

import json
import platform
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_fapo.errors import DataError
from megatron_fapo.observe.interface import files_of

NAME = "run.json"
FAILURE = "failure.json"
"""What ended a run that failed: error, message, at."""
PACKAGES = ("megatron-fapo", "torch", "megatron-core", "mbridge", "transformers", "ray", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """A run's identity.

    Example: `RunInfo(id="3f9c01ab", arm="fapo", seed=1, steps=60, started="2026-01-01T12:00:00+00:00", ...)`.
    """

    id: str
    arm: str
    """Name of the method."""
    seed: int
    steps: int
    """Steps that the configuration asks for."""
    rollouts_per_step: int
    judge: bool
    """Whether verdicts are asked."""
    started: str
    """ISO 8601, UTC."""
    resumed: tuple[str, ...] = ()
    """When it was taken up again."""
    versions: dict[str, str]
    """{package: version}"""

    @property
    def label(self) -> str:
        """How people call it."""
        return f"{self.arm} seed {self.seed}"


def open_run_info(folder: Path, config: Mapping[str, Any]) -> RunInfo:
    """Write run.json for a configuration as `Config.model_dump` gives it; a run taken up again keeps its id and start.

    Raises DataError.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    before = read_run_info(folder) if (folder / NAME).exists() else None
    info = RunInfo(
        id=before.id if before else secrets.token_hex(4),
        arm=config["train"]["arm"],
        seed=config["train"]["seed"],
        steps=config["train"]["steps"],
        rollouts_per_step=config["rollout"]["prompts_per_step"] * config["rollout"]["group_size"],
        judge=config["judge"]["enabled"],
        started=before.started if before else now,
        resumed=(*before.resumed, now) if before else (),
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    )
    path = folder / NAME
    with files_of(path):
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{NAME}.part")
        part.write_text(json.dumps(asdict(info), indent=2) + "\n")
        part.replace(path)
    return info


def read_run_info(folder: Path) -> RunInfo:
    """The run.json of a folder. Raises DataError when it is missing or damaged."""
    path = folder / NAME
    with files_of(path):
        text = path.read_text()
    try:
        values = json.loads(text)
        return RunInfo(**{**values, "resumed": tuple(values["resumed"])})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not the description of a run ({error})") from None


def read_failure(folder: Path) -> str:
    """What ended the run, as "ServerUnreachable: ..."; empty where nothing did."""
    path = folder / FAILURE
    try:
        note = json.loads(path.read_text())
        return f"{note['error']}: {note['message']}"
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the description of a failure ({error})") from None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
