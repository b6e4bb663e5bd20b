"""How an application runs and listens, until it is told to stop."""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

_GOODBYE_SECONDS = 0.5
"""How long a server that was told to stop lets requests finish."""


def runner(app: web.Application) -> web.AppRunner:
    """How an application runs: a client that leaves cancels its handler, so that its samples end."""
    return web.AppRunner(
        app, access_log=None, handler_cancellation=True, keepalive_timeout=3600, shutdown_timeout=_GOODBYE_SECONDS
    )


async def listen(app_runner: web.AppRunner, host: str, port: int) -> int:
    """Start listening and return the port."""
    await app_runner.setup()
    site = web.TCPSite(app_runner, host, port, backlog=1024)
    await site.start()
    port_bound: int = app_runner.addresses[0][1]
    return port_bound


def run_forever(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `main` until SIGTERM or SIGINT sets the event it is given."""
    import signal

    async def body() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    asyncio.run(body())
