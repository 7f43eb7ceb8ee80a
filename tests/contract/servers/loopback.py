"""A scripted HTTP server on a loopback port: what it got, and how it is to misbehave.

Each request takes the next behaviour of the script; the last one stays. A behaviour writes the answer by itself, so it
can cut, drip or be silent.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Behaviour = Callable[[BaseHTTPRequestHandler, "Got"], None]


@dataclass(frozen=True)
class Got:
    """One request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    at: float = field(default_factory=time.monotonic)


class Loopback:
    """``with Loopback(json_reply({...})) as server:`` serves at ``server.url``; ``server.got`` is what it received."""

    def __init__(self, *script: Behaviour) -> None:
        self.got: list[Got] = []
        self.reached = threading.Event()  # a request came
        self.left = threading.Event()  # a client went away before its answer was whole
        self._script = list(script)
        self._lock = threading.Lock()
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                raw = self.rfile.read(length)
                got = Got(self.command, self.path, dict(self.headers.items()), json.loads(raw) if raw else None)
                behaviour = loopback._next(got)
                try:
                    behaviour(self, got)
                except (BrokenPipeError, ConnectionResetError):
                    loopback.left.set()
                    self.close_connection = True

            do_GET = do_POST

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: object, client_address: object) -> None:
                loopback.left.set()

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """The server's address, without a path."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def bodies(self) -> list[Any]:
        """What was posted."""
        return [got.body for got in self.got if got.method == "POST"]

    def _next(self, got: Got) -> Behaviour:
        with self._lock:
            self.got.append(got)
            self.reached.set()
            return self._script.pop(0) if len(self._script) > 1 else self._script[0]

    def __enter__(self) -> Loopback:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def json_reply(payload: Any, status: int = 200, **headers: str) -> Behaviour:
    """A whole JSON answer. ``retry_after="1"`` sends the header ``retry-after``."""
    return raw_reply(json.dumps(payload).encode(), status, **headers)


def raw_reply(content: bytes, status: int = 200, **headers: str) -> Behaviour:
    """These bytes, said to be JSON."""

    def behave(handler: BaseHTTPRequestHandler, _: Got) -> None:
        _head(handler, status, "application/json", {"content-length": str(len(content)), **headers})
        handler.wfile.write(content)

    return behave


def echo_headers(status: int) -> Behaviour:
    """An error that repeats every header it got, keys and all, as careless gateways do."""

    def behave(handler: BaseHTTPRequestHandler, got: Got) -> None:
        said = {"error": {"message": f"refused: {dict(got.headers)}", "type": "authentication_error"}}
        json_reply(said, status)(handler, got)

    return behave


def stream_reply(
    pieces: Iterable[str], *, kind: str = "text/event-stream", cut: bool = False, gap_s: float = 0
) -> Behaviour:
    """A chunked stream; with ``cut`` the connection ends without the last chunk."""

    def behave(handler: BaseHTTPRequestHandler, _: Got) -> None:
        _head(handler, 200, kind, {"transfer-encoding": "chunked"})
        for piece in pieces:
            data = piece.encode()
            handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            handler.wfile.flush()
            time.sleep(gap_s)
        if cut:
            handler.close_connection = True
        else:
            handler.wfile.write(b"0\r\n\r\n")

    return behave


def drip(seconds: float, *, gap_s: float = 0.05) -> Behaviour:
    """A JSON answer that arrives byte by byte and is not whole for ``seconds``."""

    def behave(handler: BaseHTTPRequestHandler, _: Got) -> None:
        _head(handler, 200, "application/json", {"content-length": "1000000"})
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(gap_s)
        handler.close_connection = True

    return behave


def silence(seconds: float) -> Behaviour:
    """No answer at all for ``seconds``, then a hang-up."""

    def behave(handler: BaseHTTPRequestHandler, _: Got) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return behave


def _head(handler: BaseHTTPRequestHandler, status: int, kind: str, headers: Mapping[str, str]) -> None:
    handler.send_response(status)
    handler.send_header("content-type", kind)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def events(payloads: Iterable[Mapping[str, Any]], *, named: bool = False, done: str | None = "[DONE]") -> list[str]:
    """Server-sent events: one ``data:`` each, with the payload's type as the event's name if ``named``."""
    lines = [
        (f"event: {payload['type']}\n" if named else "") + f"data: {json.dumps(payload)}\n\n" for payload in payloads
    ]
    return lines + ([f"data: {done}\n\n"] if done else [])


def ndjson(payloads: Iterable[Mapping[str, Any]]) -> list[str]:
    """One JSON object per line."""
    return [json.dumps(payload) + "\n" for payload in payloads]


def free_port() -> int:
    """A port on which nothing listens."""
    import socket

    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
