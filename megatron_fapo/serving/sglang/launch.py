"""Starts an SGLang server and waits until it is healthy.

The process that we start becomes SGLang's first, in a session of its own; the kernel ends it with its launcher, and
it has the kernel end its schedulers with itself. SGLang cannot say which port it took, so a free one is chosen here,
and another one should somebody have been faster.
"""

import asyncio
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from megatron_fapo import lifeline
from megatron_fapo.errors import ConfigError, ServerError
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.process import ServerProcess, died, free_port, stop, tail
from megatron_fapo.serving.settings import ServerSettings
from megatron_fapo.serving.sglang.command import command, environment

_ATTEMPTS = 3
_POLL_SECONDS = 0.2
_TAKEN = ("address already in use", "is not available", "errno 98")


async def launch_sglang(settings: ServerSettings, log: Path, port: int) -> ServerProcess:
    """Start one server. Raises ServerError when it ends first or is too slow, ConfigError without SGLang's Python."""
    python = settings.sglang.python
    if shutil.which(python) is None:
        raise ConfigError(
            f"sglang.python = {python}: no such program; name the Python of SGLang's own environment "
            "(`make sglang-cpu` makes one for the CPU)"
        )
    with _key_file(settings, log) as key_file:
        for attempt in range(_ATTEMPTS):
            process, url = await _start(settings, log, port or free_port(settings.host), key_file)
            try:
                return await _until_healthy(settings, log, process, url)
            except BaseException as error:
                await stop(process)
                taken = isinstance(error, ServerError) and any(words in str(error).lower() for words in _TAKEN)
                if port or not taken or attempt == _ATTEMPTS - 1:
                    raise
    raise AssertionError("the last attempt returns or raises")


async def _start(
    settings: ServerSettings, log: Path, port: int, key_file: Path | None
) -> tuple[asyncio.subprocess.Process, str]:
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            lifeline.__file__,
            str(lifeline.launcher()),
            *command(settings, port, key_file),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment(settings, os.environ),
        )
    return process, f"http://{settings.host}:{port}"


async def _until_healthy(
    settings: ServerSettings, log: Path, process: asyncio.subprocess.Process, url: str
) -> ServerProcess:
    end = time.monotonic() + settings.start_timeout
    async with ServerClient(url, settings.api_key(), timeout=settings.start_timeout) as client:
        while not await client.health():
            if process.returncode is not None:
                raise died(process.pid, process.returncode, log)
            if time.monotonic() > end:
                raise ServerError(f"server not ready after {settings.start_timeout} s:\n{tail(log)}")
            await asyncio.sleep(_POLL_SECONDS)
    return ServerProcess(url=url, pid=process.pid, log=log, process=process)


@contextmanager
def _key_file(settings: ServerSettings, log: Path) -> Iterator[Path | None]:
    """The API key where only this user and SGLang can read it, while SGLang starts; on a command line all could."""
    key = settings.api_key()
    if key is None:
        yield None
        return
    path = log.with_suffix(".key.yaml")
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        yaml.safe_dump({"api-key": key}, file)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
