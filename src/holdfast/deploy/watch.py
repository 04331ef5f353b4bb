"""A live page of a run on this machine: a small server beside the run, which only reads the run's files."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import re
import signal
import socketserver
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from holdfast.deploy.ports import no_port
from holdfast.errors import ConfigError, RunDirectoryError, UserError
from holdfast.records.pulse import Beat, Pulse
from holdfast.report.live import live_page, live_state
from holdfast.system.files import json_text
from holdfast.system.progress import Progress

HOST = "127.0.0.1"
CONNECTIONS = 32  # at once; further ones are closed
SECONDS = 10.0  # in which a connection must bring its request
LINGER = 5.0  # seconds that a page has to read how its run ended
OWN_NAMES = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.ASCII | re.IGNORECASE)
"""What a request may call this server, at any port, since ports are forwarded: other names would let a page of another
site read it (DNS rebinding)."""
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class State:
    """How a run was when its files last changed.

    Attributes:
        body: what the open page asks for, as JSON.
        tag: of the body.
    """

    beat: Beat
    trouble: str
    body: bytes
    tag: str


class Watched:
    """A run whose files are read where they changed, by any of several threads.

    Args:
        path: the run's directory.
    """

    def __init__(self, path: Path):
        self._path, self._pulse = path, Pulse(path)
        self._signature: tuple[Any, ...] | None = None
        self._state: State | None = None
        self._lock = threading.Lock()

    def state(self) -> State:
        """How the run is now. Files that cannot be read, which may just be replaced, are read again the next time."""
        with self._lock:
            signature = self._pulse.signature()
            if self._state is None or signature != self._signature:
                beat, trouble = self._read()
                body = json_text(live_state(beat, trouble)).encode()
                self._state = State(beat, trouble, body, f'"{hashlib.sha256(body).hexdigest()[:16]}"')
                self._signature = None if trouble else signature
            return self._state

    def _read(self) -> tuple[Beat, str]:
        try:
            return self._pulse.read(), ""
        except (UserError, OSError, LookupError, ValueError) as error:
            former = self._state and self._state.beat
            return former or Beat(self._path, None, None, [], None, time.time()), str(error) or repr(error)

    def page(self) -> bytes:
        """The whole page."""
        state = self.state()
        return live_page(state.beat, state.trouble).encode()

    def report(self) -> bytes | None:
        """The run's own page; None: there is none yet."""
        file = self._path / "report.html"
        return file.read_bytes() if file.is_file() and not file.is_symlink() else None


class Server(ThreadingHTTPServer):
    """Serves a run's live page on the loopback interface."""

    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(self, watched: Watched, port: int):
        self.watched = watched
        self._places = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__((HOST, port), Handler)

    def server_bind(self) -> None:
        """Without asking any name server for this machine's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no error; anything else is told as usual."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Three addresses, to be read only."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "holdfast", ""
    timeout = SECONDS
    server: Server

    def do_GET(self) -> None:
        watched, names = self.server.watched, self.headers.get_all("Host", [])
        if len(names) != 1 or not OWN_NAMES.fullmatch(names[0]):
            self._answer(421, b"This page is for this machine alone: ask for localhost or 127.0.0.1.\n", "text/plain")
        elif self.path == "/":
            self._answer(200, watched.page(), "text/html")
        elif self.path == "/state":
            state = watched.state()
            known = self.headers.get("If-None-Match") == state.tag
            self._answer(304 if known else 200, b"" if known else state.body, "application/json", state.tag)
        elif self.path == "/report.html" and (report := watched.report()) is not None:
            self._answer(200, report, "text/html")
        else:
            self._answer(404, b"There is nothing here.\n", "text/plain")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, status: int, body: bytes, kind: str, tag: str | None = None) -> None:
        packed = len(body) > 1000 and "gzip" in self.headers.get("Accept-Encoding", "") and kind == "application/json"
        body = gzip.compress(body, 1) if packed else body
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if tag is not None:
            self.send_header("ETag", tag)
        if packed:
            self.send_header("Content-Encoding", "gzip")
        if status != 304:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: one page asks every two seconds."""


@contextlib.contextmanager
def serving(watched: Watched, port: int) -> Iterator[str]:
    """Serve a run's live page, and give its address.

    Raises:
        ConfigError: the port cannot be used.
    """
    try:
        server = Server(watched, port)
    except OSError as error:
        why = no_port(port, error) or f"{port} cannot be used ({error.strerror}); give another port"
        raise ConfigError(f"--port: {why}, or leave it out for any free one") from None
    thread = threading.Thread(target=server.serve_forever, name="holdfast watch", daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def watch(
    run: Path, *, port: int = 0, browser: bool = True, of_run: bool = False, progress: Progress | None = None
) -> None:
    """Serve a live page of a run until SIGINT or SIGTERM.

    Args:
        run: its directory.
        port: to listen at, on the loopback interface; 0: any free one.
        browser: open the page in the user's browser, where this machine has a screen.
        of_run: the run started this: its directory may not be there yet, and the page ends soon after the run.
        progress: shows the address.

    Raises:
        RunDirectoryError: there is no run, or it is one of the laboratory.
        ConfigError: the port cannot be used.
    """
    if not of_run and not (run / "run.json").is_file():
        raise RunDirectoryError(f"{run}: is no run's directory (it has no run.json)")
    stop, parent, watched = threading.Event(), os.getppid(), Watched(run)
    if trouble := "" if of_run else watched.state().trouble:
        raise RunDirectoryError(trouble)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with serving(watched, port) as address:
            (progress or Progress()).line(f"{run}: {address}" + ("" if of_run else "  (Ctrl-C ends it)"))
            if browser and _has_screen():
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
            while not stop.wait(1.0) and not (of_run and os.getppid() != parent):
                pass
            if of_run:
                time.sleep(LINGER)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _has_screen() -> bool:
    """Whether a browser with windows can be opened: one of a terminal would take the terminal."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
