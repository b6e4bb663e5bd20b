"""What differs between the versions of megatron-core that the project runs on: one table, chosen by what is installed.

0.16.1 is the newest for Python 3.11; 0.18.2 needs Python 3.12.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_fapo.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Megatron:
    """The facts that this project needs of a version of megatron-core."""

    version: str
    forks_checkpoint_writers: bool
    """Whether a checkpoint's files are written by forked processes, rather than by threads."""
    save_flags: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `dist_checkpointing.save` that only this version has."""


VERSIONS = (
    Megatron(version="0.16.1", forks_checkpoint_writers=True),
    # its default, "nvrx", is nvidia-resiliency-ext, whose writers are processes
    Megatron(version="0.18.2", forks_checkpoint_writers=False, save_flags={"async_strategy": "mcore"}),
)


def _installed() -> Megatron:
    version = importlib.metadata.version("megatron-core")
    for known in VERSIONS:
        if known.version == version:
            return known
    written_for = " and ".join(known.version for known in VERSIONS)
    raise ConfigError(f"megatron-core {version} is installed; this project was written for {written_for}")


MEGATRON = _installed()
"""The version that is installed."""
