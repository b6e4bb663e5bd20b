"""Ray for the length of a run.

Ray's ports listen on all interfaces, so its token mode is on; the token is a 0600 file in the run folder, never in
the home directory. Ray opens its own files to everybody, so they lie inside of a folder that is not; its path is short
(a Unix socket's has 107 bytes at most) and named after the run, so that a run finds what a killed one left behind.

Ray reads its environment when it is imported. Nothing here or in `ranks` imports it before `ray_session` has.
"""

import asyncio
import fcntl
import functools
import hashlib
import logging
import os
import secrets
import shutil
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from megatron_fapo.config import ClusterSettings
from megatron_fapo.errors import ConfigError

log = logging.getLogger(__name__)

STARTS = 3
OBJECT_STORE_BYTES = 200 * 2**20
"""For a Ray that we start: it only carries batches and reports."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "false",
    "RAY_worker_niceness": "0",  # 15 unless told otherwise: ranks would wait for everything else on the machine
}


@asynccontextmanager
async def ray_session(settings: ClusterSettings, ranks: int, folder: Path) -> AsyncIterator[None]:
    """Connect to Ray, or start one for this run; both are undone at the end.

    Ray starts in a thread, so that servers can start meanwhile. At the end, however it comes, the logs of the ranks
    are put into `folder`/logs. Signal handlers stay as they were.
    """
    with ExitStack() as stack:
        options: dict[str, Any]
        if settings.ray_address is None:
            options = own_ray(ranks, stack.enter_context(private_folder(folder)))
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(write_token(folder))}
        else:  # the user's environment says how to reach it
            options = {"address": settings.ray_address}
        starting = asyncio.ensure_future(asyncio.to_thread(_start, options))
        try:
            await asyncio.shield(starting)
            _restore_sigterm()
            yield
        finally:
            await asyncio.wait([starting])
            _stop()


def own_ray(ranks: int, folder: Path) -> dict[str, Any]:
    """What `ray.init` is told when it starts a Ray for `ranks`; it finds the machine's GPUs itself."""
    return {
        "num_cpus": ranks,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "_temp_dir": str(folder / "ray"),
        "_node_ip_address": "127.0.0.1",
    }


def _start(options: dict[str, Any]) -> None:
    os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}
    import ray

    for left in reversed(range(STARTS)):
        try:
            ray.init(**options, log_to_driver=False, logging_level="error")
            return
        except Exception as error:
            # Ray gives its node 30 s, a constant of its own, which a machine with much else to do can miss.
            if not left or "timed out during startup" not in str(error):
                raise
            log.warning("Ray did not start within its own 30 s; once more")
            ray.shutdown()


def _restore_sigterm() -> None:
    """Ray has put a handler below the one that Python knows; put back Python's."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _stop() -> None:
    import ray

    ray.shutdown()


def write_token(folder: Path) -> Path:
    """A file only its owner can read, with this process's token."""
    path = folder / "ray-token"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(_token())
    return path


@functools.cache
def _token() -> str:
    """One for all sessions of a process: Ray remembers the first that it read."""
    return secrets.token_hex(32)


def private_path(folder: Path) -> Path:
    """The place of Ray's files for the run in `folder`."""
    return Path("/tmp") / f"fapo-{hashlib.blake2b(bytes(folder.resolve()), digest_size=4).hexdigest()}"


@contextmanager
def private_folder(folder: Path) -> Iterator[Path]:
    """An empty 0700 folder for Ray's files, removed at the end; logs of ranks in it, also old ones, go to the run.

    Raises ConfigError when it belongs to another user or to a run that is going on.
    """
    path = private_path(folder)
    descriptor = _lock(path, folder)
    try:
        path.chmod(0o700)
        _clear(path, folder / "logs")
        yield path
    finally:
        _clear(path, folder / "logs")
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _lock(path: Path, folder: Path) -> int:
    """Make `path` and hold it for as long as this process lives; its descriptor."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise ConfigError(f"{path} cannot hold Ray's files for {folder}: {error}; remove it") from None
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise ConfigError(f"{path} is to hold Ray's files for {folder}, but belongs to another user")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"{folder}: a run is going on in this folder (it holds {path})") from None
    except ConfigError:
        os.close(descriptor)
        raise
    return descriptor


def _clear(path: Path, logs: Path) -> None:
    keep_logs(path / "ray" / "session_latest" / "logs", logs)
    shutil.rmtree(path / "ray", ignore_errors=True)


NAME = ":actor_name:"
MARKS = (NAME, ":job_id:", ":task_name:")
"""Ray starts lines with these in a worker's output, to say whose it is."""


def keep_logs(source: Path, target: Path) -> None:
    """Append what each rank wrote to its standard output and error to `target`/<name of the rank>.out and .err."""
    for file in sorted(source.glob("worker-*.*")):
        lines = file.read_text(errors="replace").splitlines(keepends=True)
        names = [line.removeprefix(NAME).strip() for line in lines if line.startswith(NAME)]
        said = [line for line in lines if not line.startswith(MARKS)]
        if names and said:
            target.mkdir(parents=True, exist_ok=True)
            with (target / f"{names[-1]}{file.suffix}").open("a") as log:
                log.writelines(said)
