"""The manifest of a checkpoint: every file with its size and sum, written when all of them are on disk.

A folder without one is not a checkpoint. Sizes are compared by whoever looks (a half-written file is found in no
time), sums by those who are about to read the files anyway, each a share of them.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from megatron_fapo.errors import CheckpointDamaged

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSum:
    """What a file must be."""

    nbytes: int
    xxh3: str
    """xxh3-128 of the whole file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint holds."""

    updates: int
    """Optimizer steps done."""
    layout: Mapping[str, int]
    """Sizes of the parallel axes that wrote it."""
    files: Mapping[str, FileSum]
    """By name."""


def file_sum(path: Path) -> FileSum:
    """Size and sum of a file; reads it once."""
    whole, nbytes = xxhash.xxh3_128(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            whole.update(chunk)
            nbytes += len(chunk)
    return FileSum(nbytes=nbytes, xxh3=str(whole.hexdigest()))


def write(folder: Path, manifest: Manifest) -> None:
    """Make the folder a checkpoint: whole or not at all, also after a power cut."""
    write_durably(folder / MANIFEST, json.dumps(asdict(manifest), indent=1))


def read(folder: Path) -> Manifest:
    """The manifest, after the size of every file was compared. Raises CheckpointDamaged naming the file."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text())
        files = {str(name): FileSum(**found) for name, found in values["files"].items()}
        manifest = Manifest(updates=int(values["updates"]), layout=dict(values["layout"]), files=files)
    except FileNotFoundError:
        raise CheckpointDamaged(f"{folder}: no complete checkpoint here, {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointDamaged(f"{path}: damaged: {error!r}") from None
    for name, expected in manifest.files.items():
        if not (folder / name).is_file():
            raise CheckpointDamaged(f"{folder / name}: missing")
        if (nbytes := (folder / name).stat().st_size) != expected.nbytes:
            raise CheckpointDamaged(f"{folder / name}: damaged, it has {nbytes} of {expected.nbytes} bytes")
    return manifest


def compare_sums(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Read the files `names` and compare their sums. Raises CheckpointDamaged naming the first that differs."""
    for name in names:
        try:
            found = file_sum(folder / name)
        except OSError as error:
            raise CheckpointDamaged(f"{folder / name}: cannot be read: {error}") from None
        if found != manifest.files[name]:
            raise CheckpointDamaged(f"{folder / name}: damaged, its checksum differs")


def write_durably(path: Path, text: str) -> None:
    """Write a file so that it is either whole or absent, also after a power cut."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Force a file's content to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
