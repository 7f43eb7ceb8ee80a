"""The ways in which a host can fail, by name: about a hundred of them, and what a client owes its user for each.

`FAULTS` is the table; each `Fault` is run by a `FaultServer`. Knows bytes and HTTP, nothing of any client.
"""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import formatdate
from functools import cache, partial
from typing import Any, Literal

from .faults import Call, good, reframed

__all__ = ["FAULTS", "Fault"]

#: The first line of a good reply.
OK = b"HTTP/1.1 200 OK\r\n"
#: Makes a stream's parts of its right events.
Parts = Callable[[tuple[bytes, ...]], list[bytes]]
#: What is owed: an ``error`` of the SDK's tree, an ``answer``, or ``either``; ``late``: an error at the deadline.
Owed = Literal["error", "answer", "either", "late"]


@dataclass(frozen=True)
class Fault:
    """One way to fail: how a server does it, what is owed, the name of the error and its status where they are sure.

    ``again`` is True where another attempt may be made. ``only`` limits it to "whole" replies or to "stream"s.
    """

    name: str
    behave: Callable[[Call], None]
    owed: Owed = "error"
    error: str | None = None
    status: int | None = None
    again: bool = True
    only: Literal["whole", "stream"] | None = None


def _then(*steps: Callable[[Call], None]) -> Callable[[Call], None]:
    """One step after another."""

    def behave(call: Call) -> None:
        for step in steps:
            step(call)

    return behave


def _sent(data: bytes) -> Callable[[Call], None]:
    return lambda call: call.send(data)


def _nothing(_: Call) -> None:
    """The connection closes without a byte."""


def _bodies() -> Iterator[Fault]:
    """Bodies that are no reply, whether a whole one or a stream was asked for."""

    def body(name: str, content: bytes, **headers: Any) -> Fault:
        return Fault(name, lambda call: call.reply(content, **headers), "error", "Unavailable")

    yield body("empty body", b"")
    yield body("blank body", b" \r\n ")
    yield body("a page of HTML", b"<html><body>502</body></html>", kind="text/html")
    yield body("HTML said to be JSON", b"<!doctype html>")
    yield body("an array", b"[]")
    yield body("null", b"null")
    yield body("a string", b'"text"')
    yield body("a number", b"7")
    yield body("another schema", b'{"status": "ok"}')
    yield body("an error with status 200", b'{"error": {"message": "overloaded", "type": "server_error"}}')
    yield body("nested 100,000 deep", b"[" * 100_000)
    yield body("nested objects", b'{"a":' * 100_000)
    yield body("invalid UTF-8", b'{"id": "\xff\xfe\xc3("}')
    yield body("another encoding", "{}".encode("utf-16"))
    yield body("zero bytes", b"\x00" * 64)
    yield body("an image", b"\x89PNG\r\n\x1a\n" + b"\x00" * 32, kind="image/png")
    yield body("not packed though said", b"plain text", content_encoding="gzip")
    yield body("packed and cut", gzip.compress(b'{"id": "1"}' * 99)[:40], content_encoding="gzip")
    yield body("packed as nobody asked", b"\x0b\x02\x80{}\x03", content_encoding="br")
    yield Fault("packed to burst", lambda call: call.reply(_bomb(), content_encoding="gzip"), "error", "Unavailable")
    yield Fault("204 without content", lambda call: call.head("204 No Content"), "error", "Unavailable")


def _broken_replies() -> Iterator[Fault]:
    """Replies that would be right but for something."""

    def changed(name: str, change: Callable[[Any], Any], owed: Owed = "either") -> Fault:
        return Fault(name, lambda call: call.reply(call.good.changed(change)), owed)

    yield changed("null fields", dict.fromkeys)
    yield changed("null leaves", lambda payload: _leaves(payload, lambda _: None))
    yield changed("numbers for texts", lambda payload: _leaves(payload, lambda v: 7 if isinstance(v, str) else v))
    yield changed("texts for numbers", lambda payload: _leaves(payload, lambda v: "x" if isinstance(v, int) else v))
    yield changed("lists for objects", lambda payload: {name: [value] for name, value in payload.items()})
    yield changed("empty lists", lambda payload: {n: [] if isinstance(v, list) else v for n, v in payload.items()})
    yield changed("no usage", _without_usage, "answer")
    usages = {"NaN": math.nan, "infinite": math.inf, "negative": -5, "null": None, "text": "many", "huge": 10**400}
    for name, value in usages.items():
        yield changed(f"{name} usage", partial(_counts, count=value), "answer")
    yield changed("unknown fields", lambda payload: {**payload, "brand_new": {"x": [1]}}, "answer")
    yield Fault("plain text for JSON", lambda call: call.reply(call.good.content, kind="text/plain"), "either")
    yield Fault("no content type", lambda call: call.reply(call.good.content, kind=" "), "either")
    yield Fault("truncated", _truncated, "error", "Unavailable")
    yield Fault("10 MB of text", _large, "answer")
    yield Fault("cut before the length said", _short, "either", "Unavailable")  # a stream says itself that it is whole
    yield Fault("longer than the length said", lambda call: call.reply(call.good.content, content_length=9))
    yield Fault("a skewed clock", lambda call: call.reply(call.good.content, date=formatdate(0, usegmt=True)), "answer")
    yield Fault("100 before the reply", _then(_sent(b"HTTP/1.1 100 Continue\r\n\r\n"), good), "answer")
    yield Fault("103 before the reply", _then(_sent(b"HTTP/1.1 103 Early\r\n\r\n"), good), "answer")


def _connections() -> Iterator[Fault]:
    """Connections and heads that break."""

    def breaks(name: str, *steps: Callable[[Call], None]) -> Fault:
        return Fault(name, _then(*steps), "error", "Unavailable")

    yield breaks("reset before the head", Call.reset)
    yield breaks("closed before the head", _nothing)
    yield breaks("reset in the head", _sent(OK + b"cont"), Call.reset)
    yield breaks("reset in the body", _sent(OK + b"content-length: 99\r\n\r\n{"), Call.reset)
    yield breaks("closed in the status line", _sent(b"HTTP/1.1 2"))
    yield breaks("closed in the head", _sent(OK + b"content-le"))
    yield breaks("no HTTP at all", _sent(b"SSH-2.0-OpenSSH_9.2\r\n"))
    yield breaks("TLS on a plain port", _sent(b"\x15\x03\x01\x00\x02\x02\x46"))
    yield breaks("another version of HTTP", _sent(b"HTTP/9.9 200 OK\r\n\r\n{}"))
    yield breaks("a status that is none", _sent(b"HTTP/1.1 abc OK\r\n\r\n"))
    yield breaks("a head of a megabyte", _sent(OK + b"x: " + b"a" * (1 << 20) + b"\r\n\r\n{}"))
    yield breaks("many heads", _sent(OK + b"x-a: b\r\n" * 50_000 + b"\r\n{}"))
    yield breaks("a negative length", _sent(OK + b"content-length: -1\r\n\r\n{}"))
    yield breaks("two lengths", _sent(OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}}"))
    yield breaks("garbage for chunks", _sent(OK + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n"))
    yield breaks("a chunk that is cut", _sent(OK + b"transfer-encoding: chunked\r\n\r\nff\r\n{}"))
    yield breaks("an unknown transfer", _sent(OK + b"transfer-encoding: rot13\r\n\r\n{}"))
    yield breaks("another protocol", _sent(b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n\x00"))


def _late() -> Iterator[Fault]:
    """What never ends."""

    def late(name: str, *steps: Callable[[Call], None], only: Literal["stream"] | None = None) -> Fault:
        return Fault(name, _then(*steps), "late", "Unavailable", only=only)

    yield late("silence", Call.wait)
    yield late("a dripping head", _sent(OK + b"x: "), lambda call: call.drip(b"a"))
    yield late("a dripping body", _sent(OK + b"content-length: 99999999\r\n\r\n"), lambda call: call.drip(b" "))
    yield late("silence after the head", _sent(OK + b"content-length: 99\r\n\r\n"), Call.wait)
    yield late("endless 100s", lambda call: call.drip(b"HTTP/1.1 100 Continue\r\n\r\n"))
    yield late("endless comments", _comments, only="stream")
    yield late("silence in a stream", _stalled, Call.wait, only="stream")


def _statuses() -> Iterator[Fault]:
    """Errors by status, with bodies as vendors and gateways send them."""
    said = {"type": "error", "error": {"type": "some_error", "message": "not like this", "code": None, "param": None}}
    body, page = json.dumps(said).encode(), b"<html><h1>no</h1></html>"

    def status(name: str, code: int, error: str, content: bytes, *, again: bool = True, **headers: Any) -> Fault:
        behave = partial(Call.reply, content=content, status=f"{code} Said", **headers)
        return Fault(name, behave, "error", error, code, again)

    for code in (400, 401, 402, 403, 404, 405, 413, 418, 422, 451, 501):
        yield status(f"status {code}", code, "Rejected", body, again=False)
    for code in (408, 409, 500, 502, 503, 504, 529, 599):
        yield status(f"status {code}", code, "Unavailable", body)
    for code, content in ((502, page), (503, b""), (500, b"\xff\xfe"), (504, b"[" * 50_000)):
        yield status(f"status {code} with {len(content)} odd bytes", code, "Unavailable", content, kind="text/html")
    yield status("status 429", 429, "RateLimited", body)
    waits = {"in seconds": "0", "negative": "-3", "no number": "soon", "NaN": "nan", "in the past": formatdate(0)}
    for name, told in waits.items():
        yield status(f"429 with a wait {name}", 429, "RateLimited", body, retry_after=told)
    waits = {"beyond the deadline": "86400", "absurd": "1e300", "in the year 9999": "Fri, 31 Dec 9999 23:59:59 GMT"}
    for name, told in waits.items():
        yield status(f"429 with a wait {name}", 429, "RateLimited", body, again=False, retry_after=told)
    yesterday = formatdate(time.time() - 86400, usegmt=True)  # its clock is a day behind: come back at once
    yield status("429 by a skewed clock", 429, "RateLimited", body, date=yesterday, retry_after=yesterday)


def _redirects() -> Iterator[Fault]:
    """Redirects, which must never carry a key or a prompt along."""

    def redirect(name: str, code: int, where: Callable[[Call], str]) -> Fault:
        def behave(call: Call) -> None:
            call.reply(b"", f"{code} Moved", location=where(call))

        return Fault(name, behave, "error", "Rejected", code, again=False)

    for code in (301, 302, 303, 307, 308):
        yield redirect(f"redirect {code} to another host", code, lambda call: call.server.elsewhere)
    yield redirect("redirect to itself", 307, lambda call: call.path)
    yield redirect("redirect to nowhere", 307, lambda _: "http://[")
    yield redirect("redirect to another scheme", 307, lambda _: "file:///etc/passwd")
    yield Fault("redirect without a place", lambda call: call.reply(b"", "302 Found"), "error", None, again=False)
    yield Fault("304 not modified", lambda call: call.head("304 Not Modified"), "error", None, again=False)


def _streams() -> Iterator[Fault]:
    """Streams that go wrong."""

    def stream(name: str, parts: Parts, owed: Owed = "error", *, ends: bool = True) -> Fault:
        def behave(call: Call) -> None:
            call.head(transfer_encoding="chunked")
            call.chunks(parts(call.good.events))
            if ends:
                call.send(b"0\r\n\r\n")

        return Fault(name, behave, owed, "Unavailable" if owed == "error" else None, only="stream")

    yield stream("a stream cut before its first event", lambda _: [], ends=False)
    yield stream("an empty stream", lambda _: [])
    yield stream("a stream cut in the middle", lambda events: list(events[: len(events) // 2]), ends=False)
    yield stream("a stream cut in an event", lambda events: [events[0], events[1][:15]], ends=False)
    yield stream("a stream ended in the middle", lambda events: list(events[: len(events) // 2]))
    yield stream("a stream ended in an event", lambda events: [events[0], events[1][:15]])
    yield stream("every event twice", lambda events: [event for event in events for _ in range(2)], "either")
    yield stream("events in reverse", lambda events: list(events[::-1]), "either")
    yield stream("the first event missing", lambda events: list(events[1:]), "either")
    yield stream("indexes out of order", lambda events: [reframed(event, _reindexed) for event in events], "either")
    yield stream("an unknown event", lambda events: [events[0], _strange(events[0]), *events[1:]], "either")
    yield stream(
        "an event of null", lambda events: [events[0], reframed(events[0], lambda _: None), *events[1:]], "either"
    )
    yield stream("an event of nonsense", lambda events: [events[0], events[0].replace(b"{", b"{{", 1), *events[1:]])
    yield stream("an event nested deep", lambda events: [events[0], events[0].replace(b"{", b"[" * 100_000, 1)])
    yield stream(
        "an event of invalid UTF-8", lambda events: [events[0], events[1].replace(b"{", b'{"\xff":1,', 1)], "error"
    )
    yield stream("an error event", lambda events: [*events[:2], _failing(events[0]), *events[2:]])
    yield stream("an error event first", lambda events: [_failing(events[0])])
    yield stream(
        "a rate limit in a stream", lambda events: [*events[:2], _failing(events[0], "rate_limit_error")], "either"
    )
    yield stream("events after the last", lambda events: [*events, *events[:2]], "either")
    yield stream(
        "comments between events", lambda events: [part for e in events for part in (_comment(e), e)], "answer"
    )
    yield Fault("a whole reply for a stream", _unstreamed, "either", only="stream")
    yield Fault(
        "a stream for a whole reply", lambda call: call.reply(b"".join(call.good.events)), "either", only="whole"
    )


def _leaves(value: Any, change: Callable[[Any], Any] = lambda value: value) -> Any:
    if isinstance(value, dict):
        return {name: _leaves(item, change) for name, item in value.items()}
    return [_leaves(item, change) for item in value] if isinstance(value, list) else change(value)


def _counts(value: Any, count: Any) -> Any:
    """Every count of tokens as ``count``."""
    if isinstance(value, dict):
        names = ("tokens", "_count", "_duration")
        return {
            name: count if name.endswith(names) and isinstance(item, int) else _counts(item, count)
            for name, item in value.items()
        }
    return [_counts(item, count) for item in value] if isinstance(value, list) else value


def _without_usage(value: Any) -> Any:
    if isinstance(value, dict):
        gone = ("usage", "prompt_eval_count", "eval_count", "prompt_eval_duration")
        return {name: _without_usage(item) for name, item in value.items() if name not in gone}
    return value


def _reindexed(payload: Any) -> Any:
    return {
        name: 7 if name.endswith("index") else _reindexed(v) if isinstance(v, dict) else v
        for name, v in payload.items()
    }


def _strange(event: bytes) -> bytes:
    return reframed(event, lambda _: {"type": "brand_new.event", "choices": [], "message": {}, "data": [1, 2]})


def _failing(event: bytes, kind: str = "overloaded_error") -> bytes:
    """An error event in this framing, in the forms of all vendors at once."""
    line = reframed(event, lambda _: {"type": "error", "error": {"type": kind, "message": "busy"}, "message": "busy"})
    if event.startswith(b"{"):
        return b'{"error": "busy"}\n'
    return b"event: error\n" + line[line.index(b"data:") :]


def _comment(event: bytes) -> bytes:
    """A server-sent comment; lines of JSON have none."""
    return b"" if event.startswith(b"{") else b": still here\n\n"


def _large(call: Call) -> None:
    long = "a" * (10 << 20)
    call.reply(call.good.changed(lambda payload: _leaves(payload, lambda v: long if v in ("Hello you", " you") else v)))


def _short(call: Call) -> None:
    call.reply(call.good.content, content_length=len(call.good.content) + 9)


def _truncated(call: Call) -> None:
    content = call.good.content
    call.reply(content[: len(content) // 2])


@cache
def _bomb() -> bytes:
    """80 MB of spaces, packed."""
    return gzip.compress(b" " * (80 << 20), 1)


def _unstreamed(call: Call) -> None:
    call.reply(json.dumps(call.good.whole).encode())


def _comments(call: Call) -> None:
    call.head(transfer_encoding="chunked")
    call.drip(b"d\r\n: still here\n\r\n" if call.good.stream_type == "text/event-stream" else b"1\r\n\n\r\n")


def _stalled(call: Call) -> None:
    call.head(transfer_encoding="chunked")
    call.chunks(call.good.events[: len(call.good.events) // 2])


FAULTS: tuple[Fault, ...] = (
    *_bodies(),
    *_broken_replies(),
    *_connections(),
    *_late(),
    *_statuses(),
    *_redirects(),
    *_streams(),
)
