"""sglang-router in front of a group's servers: a process of its own, which is told which servers may be asked.

The requests of one group go to one server (policy `manual`, by a header that the client sets), where they share their
prefix. Weight updates and control verbs do not go through it: it does not know them.
"""

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_fapo import lifeline
from megatron_fapo.errors import ServerError, ServerUnreachable
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.process import died, free_port, stop, tail
from megatron_fapo.serving.settings import ServerSettings

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_WAIT_SECONDS = 60.0
_PROGRAM = """
import json, sys
from sglang_router.launch_router import launch_router
from sglang_router.router_args import RouterArgs
launch_router(RouterArgs(**json.loads(sys.stdin.readline())))
"""
"""The key comes by standard input: on a command line everybody could read it."""


class RouterProcess:
    """A running router. Its client speaks `/generate`; `add` and `remove` say to which servers it may pass that on."""

    def __init__(self, client: ServerClient, key: str | None) -> None:
        self.client = client
        self._key = key

    async def add(self, client: ServerClient) -> None:
        """Returns when the router has found the server healthy."""
        body = {"url": client.url} if self._key is None else {"url": client.url, "api_key": self._key}
        await self.client.request("POST", "/workers", body)
        end = time.monotonic() + _WAIT_SECONDS
        while not (await self._workers()).get(client.url, {}).get("is_healthy"):
            if time.monotonic() > end:
                raise ServerError(f"the router at {self.client.url} did not find {client.url} healthy")
            await asyncio.sleep(_POLL_SECONDS)

    async def remove(self, client: ServerClient) -> None:
        """Returns when the router has forgotten the server; nothing happens where it is gone, or never knew it."""
        with suppress(ServerUnreachable):
            worker = (await self._workers()).get(client.url)
            if worker is None:
                return
            await self.client.request("DELETE", f"/workers/{worker['id']}", None)
            end = time.monotonic() + _WAIT_SECONDS
            while client.url in await self._workers():
                if time.monotonic() > end:
                    log.warning("the router at %s does not forget %s", self.client.url, client.url)
                    return
                await asyncio.sleep(_POLL_SECONDS)

    async def alive(self) -> bool:
        """Whether it answers at all: without servers it is not ready, and still there."""
        with suppress(ServerError):
            await self._workers()
            return True
        return False

    async def _workers(self) -> Mapping[str, Any]:
        """{url: what the router knows of the server}."""
        answer = await self.client.request("GET", "/workers", None)
        return {worker["url"]: worker for worker in answer["workers"]}


@asynccontextmanager
async def launch_router(settings: ServerSettings, output: Path) -> AsyncIterator[RouterProcess]:
    """Start a router without servers; stop it at the end. Raises ServerError when it ends first or is too slow."""
    key, port = settings.api_key(), free_port(settings.host)
    arguments = {
        "host": settings.host,
        "port": port,
        "policy": "manual",
        "disable_retries": True,  # our client retries, and counts
        # It opens at ten connections that broke, and then refuses a healthy server for a minute; whether a server may
        # be asked is the keeper's to say, who asks it.
        "disable_circuit_breaker": True,
        "assignment_mode": "min_load",
        "api_key": key,
        "prometheus_port": free_port(settings.host),
        "prometheus_host": settings.host,
        "health_check_interval_secs": max(1, round(settings.health_interval)),
        "health_check_timeout_secs": max(1, round(settings.health_deadline)),
        "health_success_threshold": 1,
        "request_timeout_secs": max(1, round(settings.deadline)),
        "shutdown_grace_period_secs": 1,
        "log_level": "warn",
    }
    with output.open("ab") as lines:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", lifeline.__file__, str(lifeline.launcher()), sys.executable, "-c", _PROGRAM),
            stdin=asyncio.subprocess.PIPE,
            stdout=lines,
            stderr=lines,
            start_new_session=True,
            env={**os.environ, "RUST_BACKTRACE": "0"},
        )
    client = ServerClient(f"http://{settings.host}:{port}", key, timeout=settings.request_timeout, routed=True)
    router = RouterProcess(client, key)
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(arguments).encode() + b"\n")
        process.stdin.close()
        end = time.monotonic() + settings.start_timeout
        while not await router.alive():
            if process.returncode is not None:
                raise died(process.pid, process.returncode, output)
            if time.monotonic() > end:
                raise ServerError(f"router not ready after {settings.start_timeout} s:\n{tail(output)}")
            await asyncio.sleep(_POLL_SECONDS)
        yield router
    finally:
        await client.close()
        await stop(process)
