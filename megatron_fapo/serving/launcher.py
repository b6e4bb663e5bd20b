"""Starts the server processes of a role, watches them, stops them.

A server ends when told to, and when the launching process ends, however that happens; not by a Ctrl-C in the
launching process's terminal, which may want to save what its servers still do. An embedded server says where it
listens through a pipe, so its port is bound before anyone hears of it; how SGLang starts: `serving.sglang.launch`.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from megatron_fapo import lifeline
from megatron_fapo.errors import FapoError, ServerError
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.group import ServerGroup
from megatron_fapo.serving.hooks import Hooks
from megatron_fapo.serving.keeper import Keeper
from megatron_fapo.serving.process import Server, ServerProcess, died, stop, tail
from megatron_fapo.serving.router import launch_router
from megatron_fapo.serving.settings import ServerSettings
from megatron_fapo.serving.sglang.launch import launch_sglang


async def launch_one(settings: ServerSettings, log: Path, port: int) -> ServerProcess:
    """Start one server and wait until it is healthy. Raises ServerError when it ends first or is too slow."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = launch_sglang if settings.engine == "sglang" else _launch_embedded
    return await start(settings, log, port)


async def _launch_embedded(settings: ServerSettings, log: Path, port: int) -> ServerProcess:
    settings = settings.changed(port=port)
    reading, writing = os.pipe()
    threads = str(settings.threads)
    try:
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "megatron_fapo.serving.engine.main",
                str(writing),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(writing,),
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            )
    finally:
        os.close(writing)
    try:
        order = {"settings": settings.model_dump(), "launcher": lifeline.launcher()}
        assert process.stdin is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")
        url = await asyncio.wait_for(_read_url(reading), settings.start_timeout)
        if not url:
            raise died(process.pid, await process.wait(), log)
    except BaseException as error:
        await stop(process)
        if isinstance(error, TimeoutError):
            raise ServerError(f"server not ready after {settings.start_timeout} s:\n{tail(log)}") from None
        raise
    return ServerProcess(url=url, pid=process.pid, log=log, process=process)


async def _read_url(descriptor: int) -> str:
    """The line that a server writes when it is ready; empty when it ended before."""
    reader = asyncio.StreamReader()
    pipe = os.fdopen(descriptor, "rb")
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    try:
        return (await reader.readline()).decode().strip()
    finally:
        transport.close()


Start = Callable[[ServerSettings, Path, int], Awaitable[Server]]
"""Start the server of a place in its group, with its log."""


async def start_here(settings: ServerSettings, log: Path, place: int) -> Server:
    """On this machine; the servers of a group follow each other in ports and GPUs."""
    sglang = settings.sglang
    if sglang.first_gpu is not None:
        first = sglang.first_gpu + place * sglang.tensor_parallel
        settings = settings.changed(sglang=sglang.changed(first_gpu=first))
    return await launch_one(settings, log, settings.port + place if settings.port else 0)


@contextlib.asynccontextmanager
async def processes(
    settings: ServerSettings, name: str, logs: Path, start: Start = start_here
) -> AsyncIterator[list[Server]]:
    """Start `settings.count` servers side by side; stop all at the end. Logs are `<logs>/<name>-<i>.log`."""
    starting = [
        asyncio.ensure_future(start(settings, logs / f"{name}-{place}.log", place)) for place in range(settings.count)
    ]
    try:
        yield list(await asyncio.gather(*starting))
    finally:
        for task in starting:
            task.cancel()
        done = await asyncio.gather(*starting, return_exceptions=True)
        await asyncio.gather(*(server.stop() for server in done if not isinstance(server, BaseException)))


@contextlib.asynccontextmanager
async def launch(
    settings: ServerSettings, name: str, logs: Path, hooks: Hooks | None = None, start: Start = start_here
) -> AsyncIterator[ServerGroup]:
    """The servers of a role, started and kept, as one group of clients."""
    key = settings.api_key()

    def connect(server: Server) -> ServerClient:
        return ServerClient(server.url, key, timeout=settings.request_timeout)

    async def again(place: int) -> Server:
        return await start(settings, logs / f"{name}-{place}.log", place)

    async with contextlib.AsyncExitStack() as stack:
        servers = await stack.enter_async_context(processes(settings, name, logs, start))
        clients = [connect(server) for server in servers]
        router = None
        if settings.router == "sglang":
            router = await stack.enter_async_context(launch_router(settings, logs / f"{name}-router.log"))
            for client in clients:
                await router.add(client)
        group = ServerGroup(clients, hooks, deadline=settings.deadline, router=router)
        stack.push_async_callback(group.close)
        keeper = Keeper(group, settings, name, servers, again, connect, router)
        keeping = asyncio.ensure_future(keeper.run())
        keeping.add_done_callback(lambda done: _report(done, group))
        try:
            yield group
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)


def _report(keeping: "asyncio.Future[None]", group: ServerGroup) -> None:
    """Nobody keeps the servers any more: if that is a mistake, the run must hear of it."""
    error = None if keeping.cancelled() else keeping.exception()
    if error is not None:
        if not isinstance(error, FapoError):
            error = ServerError(f"nobody keeps the servers any more: {error!r}")
        group.fail(error)
