"""The report served while runs go on: on loopback, made anew when a run has written more."""

import hashlib
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from megatron_fapo.errors import ConfigError, DataError
from megatron_fapo.observe import jsonl
from megatron_fapo.observe.report.build import render
from megatron_fapo.observe.report.page import element, text
from megatron_fapo.observe.run_info import FAILURE
from megatron_fapo.observe.runs import read_run

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
"""What a browser on this machine may call us; another name in `Host` is another site's page (DNS rebinding)."""


class LiveReport:
    """The page of some runs, kept until one of them has written more."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self._runs = tuple(runs)
        self._lock = Lock()
        self._shown = ""
        self._page = ""

    def version(self) -> str:
        """Another word whenever a run has written a step or failed."""
        state = []
        for path in (run / name for run in self._runs for name in (jsonl.NAME, FAILURE)):
            try:
                found = path.stat()
                state.append(f"{path} {found.st_size} {found.st_mtime_ns}")
            except FileNotFoundError:
                state.append(f"{path} absent")
        return hashlib.blake2b("\n".join(state).encode(), digest_size=8).hexdigest()

    def page(self) -> str:
        """The report; before the first step, and where a run is damaged, a page that says so and looks again."""
        with self._lock:
            version = self.version()
            if version != self._shown:
                try:
                    self._page = render([read_run(run) for run in self._runs], live=version)
                except DataError as error:
                    self._page = _waiting(str(error))
                self._shown = version
            return self._page


def serve_report(runs: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server of the live report on loopback, bound and not yet running; port 0 picks a free one.

    Raises ConfigError when the port cannot be had.
    """
    report = LiveReport(runs)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rpartition(":")[0] not in NAMES:
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", "this report is for this machine\n")
            elif self.path == "/version":
                self._answer(HTTPStatus.OK, "text/plain", report.version())
            elif self.path == "/":
                self._answer(HTTPStatus.OK, "text/html", report.page())
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", "not here\n")

        def _answer(self, status: HTTPStatus, kind: str, body: str) -> None:
            encoded = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(encoded)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(encoded)

        def log_message(self, *_: object) -> None:
            """Nothing: a browser asks every few seconds."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ConfigError(f"--port {port}: cannot be had on {HOST} ({error.strerror}); 0 picks a free one") from None


def _waiting(why: str) -> str:
    again = '<meta http-equiv="refresh" content="2">'
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">{again}<title>Waiting</title>'
    rules = "body{font:17px/1.5 system-ui;margin:3em auto;max-width:40em;padding:0 1em}"
    style = f"<style>:root{{color-scheme:light dark}}{rules}</style>"
    words = element("h1", "Nothing to show yet") + element("p", text(why)) + element("p", "This page looks again.")
    return f'<!doctype html><html lang="en"><head>{head}{style}</head><body>{words}</body></html>'
