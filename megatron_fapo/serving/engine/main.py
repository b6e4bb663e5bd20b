"""One server process: load the model, listen, say where, serve until told to stop."""

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fapo import lifeline
from megatron_fapo.errors import FapoError
from megatron_fapo.serving.engine.folder import read_config
from megatron_fapo.serving.engine.http import Routes
from megatron_fapo.serving.engine.listening import listen, run_forever, runner
from megatron_fapo.serving.engine.text import Text
from megatron_fapo.serving.settings import ServerSettings

if TYPE_CHECKING:
    from megatron_fapo.serving.engine.engine import Engine
    from megatron_fapo.serving.engine.protocol import Limits

log = logging.getLogger(__name__)


def serve(settings: ServerSettings, ready: Callable[[str], None] = lambda url: None) -> None:
    """Serve until SIGTERM or SIGINT. `ready` is called with the URL once requests are answered.

    Raises ConfigError and DataError for settings or a model that cannot be served, ServerError when the engine fails.
    """
    folder = Path(settings.model)
    read_config(folder)
    text = Text(folder)
    routes = Routes(settings, text)

    async def main(stop: asyncio.Event) -> None:
        app_runner = runner(routes.application())
        try:
            port = await listen(app_runner, settings.host, settings.port)
            # Routes answer 503 meanwhile; torch is imported there, not before the port is open.
            engine, limits = await asyncio.to_thread(_load, settings, text)
            engine.start(asyncio.get_running_loop(), on_failure=stop.set)
            routes.open(engine, limits)
            log.info("serving %s on %s:%d", settings.model, settings.host, port)
            ready(f"http://{settings.host}:{port}")
            await stop.wait()
            engine.stop()
            engine.check()
        finally:
            await app_runner.cleanup()

    run_forever(main)


def _load(settings: ServerSettings, text: Text) -> "tuple[Engine, Limits]":
    from megatron_fapo.serving.engine import start

    return start.build_engine(settings, text), start.limits(settings)


def _end_with_input() -> None:
    """Leave when the launcher does: its end of our stdin closes. On Linux the kernel ends us as well."""

    def wait_for_end() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_for_end, name="parent", daemon=True).start()


def main() -> None:
    """Entry of a launched server: `main READY_FD`, settings as one line of JSON on stdin."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    ready_fd = int(sys.argv[1])
    order = json.loads(_read_line(0))
    lifeline.end_with(order["launcher"])
    _end_with_input()

    def ready(url: str) -> None:
        os.write(ready_fd, f"{url}\n".encode())
        os.close(ready_fd)

    try:
        serve(ServerSettings.model_validate(order["settings"]), ready)
    except FapoError as error:
        log.error("%s: %s", type(error).__name__, error)
        sys.exit(2)


def _read_line(descriptor: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(descriptor, 65536)
        if not piece:
            break
        line += piece
    return line


if __name__ == "__main__":
    main()
