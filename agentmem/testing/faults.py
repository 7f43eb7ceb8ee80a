"""What can go wrong between a client and a model's host: a server that misbehaves in a named way, and the list of ways.

Speaks raw bytes, so that it can break HTTP itself. Good replies come from the stand-in hosts' formats and are broken
here; knows nothing of any client.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from .host_anthropic import Messages
from .host_cache import Visit
from .host_exchange import Answer, Wire
from .host_ollama import Chat
from .host_openai import ChatCompletions
from .host_responses import Responses

__all__ = ["Call", "FaultServer", "Good"]

#: What a good reply says, and the tokens it claims.
TEXT = "Hello you"
ANSWER = Answer(text=TEXT, tokens=2)
#: Bytes of a request that is read.
MOST = 1 << 24


@dataclass(frozen=True)
class Good:
    """The reply that would be right for a request: whole, or as a stream's events."""

    whole: dict[str, Any]
    events: tuple[bytes, ...]
    stream_type: str
    streams: bool

    @property
    def content(self) -> bytes:
        """The body as it would be sent."""
        return b"".join(self.events) if self.streams else json.dumps(self.whole).encode()

    @property
    def kind(self) -> str:
        """Its content type."""
        return self.stream_type if self.streams else "application/json"

    def changed(self, change: Callable[[Any], Any]) -> bytes:
        """The body with ``change`` made to the whole payload, or to that of each event."""
        if not self.streams:
            return json.dumps(change(self.whole)).encode()
        return b"".join(reframed(event, change) for event in self.events)


def reframed(event: bytes, change: Callable[[Any], Any]) -> bytes:
    """One event, in its framing, with another payload."""
    lines = []
    for line in event.split(b"\n"):
        head, brace, rest = line.partition(b"{")
        lines.append(head + json.dumps(change(json.loads(brace + rest))).encode() if brace else line)
    return b"\n".join(lines)


@dataclass(frozen=True)
class Call:
    """One request as it came, and the socket it is answered on."""

    path: str
    headers: Mapping[str, str]
    body: Any
    good: Good
    socket: socket.socket
    server: FaultServer

    def send(self, data: bytes) -> None:
        """These bytes, as they are."""
        self.socket.sendall(data)

    def head(self, status: str = "200 OK", *, kind: str | None = None, **headers: object) -> None:
        """A head; ``retry_after=1`` becomes ``retry-after: 1``. The connection closes when the reply ends."""
        told = {"content-type": kind or self.good.kind, "connection": "close", "request-id": "req_7", **headers}
        told["x-request-id"] = told["request-id"]
        lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in told.items())]
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1"))

    def reply(self, content: bytes, status: str = "200 OK", *, kind: str | None = None, **headers: object) -> None:
        """A whole reply with its length."""
        self.head(status, kind=kind, **{"content_length": len(content), **headers})
        self.send(content)

    def chunks(self, parts: Sequence[bytes], *, gap_s: float = 0.0) -> None:
        """A chunked body without its last chunk."""
        for part in filter(None, parts):
            self.send(b"%x\r\n%s\r\n" % (len(part), part))
            time.sleep(gap_s)

    def drip(self, data: bytes, *, gap_s: float = 0.02) -> None:
        """These bytes one after another, over and over, until the server stops or the client leaves."""
        while not self.server.stopping.wait(gap_s):
            self.send(data)

    def wait(self) -> None:
        """Nothing, until the server stops or the client leaves."""
        with contextlib.suppress(OSError):
            self.socket.settimeout(0.02)
            while not self.server.stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    if not self.socket.recv(1):
                        return

    def reset(self) -> None:
        """Break the connection off with a reset instead of a proper end."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class FaultServer:
    """``with FaultServer() as server:`` answers every request as ``server.behave`` does, on ``server.url``.

    ``behave`` is a function of a `Call` and may be changed between requests; until it is set replies are good.
    ``requests`` holds the (path, headers, body) of what came; ``elsewhere`` is where redirects lead. With ``tls``, a
    server's context, it speaks HTTPS.
    """

    def __init__(self, behave: Callable[[Call], None] | None = None, *, tls: ssl.SSLContext | None = None) -> None:
        self.behave = behave or good
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.elsewhere = "http://localhost:9/elsewhere"
        self.stopping = threading.Event()
        self._tls = tls
        wires: list[Wire] = [ChatCompletions(strict=False), Responses(), Messages(), Chat()]
        self._wires = {wire.path: wire for wire in wires}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def url(self) -> str:
        """The server's address, without a path."""
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while not self.stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connection, args=(connection,), daemon=True).start()

    def _connection(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(10)
        with contextlib.suppress(OSError):
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
        with contextlib.suppress(OSError), connection:
            request = _read(connection)
            if request is None:
                return
            path, headers, body = request
            self.requests.append(request)
            self.behave(Call(path, headers, body, self._good(path, body), connection, self))
            with contextlib.suppress(OSError):  # a close with unread bytes would be a reset
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(0.5)
                while connection.recv(1 << 16):
                    pass

    def _good(self, path: str, body: Any) -> Good:
        wire = self._wires.get(path)
        if wire is None:
            return Good({}, (), "application/json", streams=False)
        told = body if isinstance(body, dict) else {}
        told = {"model": "m", **told, "stream_options": {"include_usage": True}}
        visit = Visit(12, 8, (0, 0), lambda: None)
        events = tuple(wire.events(told, ANSWER, visit, "1", None))
        streams = bool(told.get("stream", path == Chat.path))
        return Good(wire.whole(told, ANSWER, visit, "1", None), events, wire.stream_type, streams)


def good(call: Call) -> None:
    """The right reply."""
    call.reply(call.good.content)


def _read(connection: socket.socket) -> tuple[str, dict[str, str], Any] | None:
    data = b""
    while b"\r\n\r\n" not in data:
        got = connection.recv(1 << 16)
        if not got or len(data) > MOST:
            return None
        data += got
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = int(headers.get("content-length", 0))
    while len(rest) < length:
        got = connection.recv(1 << 16)
        if not got:
            return None
        rest += got
    path = first.split(" ")[1].partition("?")[0]
    return path, headers, json.loads(rest) if rest else None
