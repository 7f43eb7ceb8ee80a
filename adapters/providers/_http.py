"""The ground under every provider behind HTTP: settings, one deadline over all attempts, errors by status.

Knows httpx's conventions and no vendor. `_remote.py` builds the two faces of a provider on it.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import sys
import time
import traceback
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from agentmem.errors import AgentMemError, ConfigError, RateLimited, Rejected, Unavailable
from agentmem.provider import Generation

__all__ = [
    "Clock",
    "Failure",
    "clean",
    "connection_failed",
    "from_status",
    "guard",
    "is_host",
    "is_loopback",
    "let_go",
    "read_settings",
    "refused",
    "scrub",
    "sdk_failure",
    "whole",
]

T = TypeVar("T")


class Failure(NamedTuple):
    """An error of agentmem, whether the same request may be sent again, and after how many seconds if that was said."""

    error: AgentMemError
    again: bool = False
    wait_s: float | None = None


#: Seconds to wait for a connection; a host that is up answers far sooner.
CONNECT_S = 10.0
#: Bytes of the largest reply that is read; 128 embeddings of 4,096 numbers as text are a sixth of it.
LARGEST = 1 << 26
#: No prompt has more tokens than this.
LARGEST_COUNT = 1 << 40
#: The libraries that SDKs send with; they have the same classes.
LIBRARIES = ("httpx", "httpx2")

#: The settings that every provider behind HTTP takes.
SETTINGS: Mapping[str, type] = {
    "api_key": str,
    "base_url": str,
    "timeout_s": float,
    "max_retries": int,
    "context_tokens": int,
}


def read_settings(scheme: str, settings: Mapping[str, Any], more: Mapping[str, type]) -> dict[str, Any]:
    """``settings`` with types and defaults; text is converted, since it may come from the environment.

    Raises `ConfigError` for an unknown name or a value of the wrong type. A value is never repeated: it may be a key.
    """
    known = {**SETTINGS, **more}
    values: dict[str, Any] = {"timeout_s": 120.0, "max_retries": 2}
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(f"unknown setting {name!r} of {scheme}: it has {', '.join(sorted(known))}")
        if value is not None:
            values[name] = _converted(f"{scheme}.{name}", value, known[name])
    if values["timeout_s"] <= 0 or values["max_retries"] < 0:
        raise ConfigError(f"{scheme}: timeout_s must be above 0 and max_retries at least 0")
    return values


def _converted(name: str, value: Any, kind: type) -> Any:
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "1", "false", "0"):
        return value.lower() in ("true", "1")
    if kind is dict and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if kind in (int, float):
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                return kind(value)
    elif isinstance(value, kind):
        return value
    raise ConfigError(f"setting {name} must be of type {kind.__name__}, not {type(value).__name__}")


def is_loopback(base_url: str) -> bool:
    """True if this address is on this machine: nothing outside it sees a prompt sent there."""
    host = urlsplit(base_url if "//" in base_url else f"//{base_url}").hostname or ""
    return host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")  # noqa: S104 - compared, not bound


def is_host(base_url: str, domain: str) -> bool:
    """True if this address is at ``domain`` or beneath it."""
    host = urlsplit(base_url).hostname or ""
    return host == domain or host.endswith(f".{domain}")


class Clock:
    """The time of one call: what is left of it, when its first piece came. A consumer's own time is free."""

    def __init__(self, limit_s: float) -> None:
        self._started = time.monotonic()
        self._ends = self._started + limit_s
        self._first_s: float | None = None

    def left(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self._ends - time.monotonic())

    def lend(self, seconds: float) -> None:
        """Move the start and the end: ``seconds`` passed while a stream waited for its consumer."""
        self._started += seconds
        self._ends += seconds

    def piece(self) -> None:
        """A piece of text came."""
        if self._first_s is None:
            self._first_s = time.monotonic() - self._started

    def stamp(self, generation: Generation) -> Generation:
        """The generation with its seconds. A time to the first token that the server told itself is kept."""
        first = generation.usage.first_token_s if self._first_s is None else self._first_s
        times = {"first_token_s": first, "total_s": time.monotonic() - self._started}
        return replace(generation, usage=generation.usage.model_copy(update=times))

    def run(self, call: Callable[[], T]) -> T:
        """Call with this clock as the one that guarded clients (`guard`) of this thread obey."""
        token = _clock.set(self)
        try:
            return call()
        finally:
            _clock.reset(token)


_clock: ContextVar[Clock | None] = ContextVar("agentmem_clock", default=None)


def guard(client: Any) -> None:
    """Hold an SDK's client, or httpx's own, to what every provider behind HTTP must keep to.

    Redirects are not followed: they would carry the prompt, and keys in headers that httpx does not know, to another
    host. A reply may take `LARGEST` bytes, unpacked. A sync client keeps to the deadline of the current `Clock` at
    every read and write: the library's own time-outs are per read, so a server that drips a byte now and then would
    never end. (Async calls are cancelled at their deadline.)
    """
    inner = getattr(client, "_client", client)
    http = next(
        sys.modules[top] for kind in type(inner).__mro__ if (top := kind.__module__.partition(".")[0]) in LIBRARIES
    )
    inner.follow_redirects = False
    inner.headers["accept-encoding"] = "gzip, deflate"  # what is unpacked here, within bounds
    if isinstance(inner, http.AsyncClient):

        async def bound(response: Any) -> None:
            response.stream = _bounded(http, response, http.AsyncByteStream)

        inner.event_hooks = {"request": [], "response": [bound]}
        return

    def before(request: Any) -> None:
        if (clock := _clock.get()) is not None:
            left = max(clock.left(), 0.001)
            request.extensions["timeout"] = {"connect": min(left, CONNECT_S), "read": left, "write": left, "pool": left}

    def after(response: Any) -> None:
        response.stream = _bounded(http, response, http.SyncByteStream)

    inner.event_hooks = {"request": [before], "response": [after]}
    for transport in [inner._transport, *inner._mounts.values()]:  # the library has no public way to its sockets
        pool: Any = getattr(transport, "_pool", None)
        if (backend := getattr(pool, "_network_backend", None)) is not None:
            pool._network_backend = _Punctual(backend)


class _Punctual:
    """A sync network backend of httpcore, or a connection it made, that obeys the `Clock` of the calling thread."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def connect_tcp(self, *args: Any, **options: Any) -> _Punctual:
        return _Punctual(self._inner.connect_tcp(*args, **options))

    def connect_unix_socket(self, *args: Any, **options: Any) -> _Punctual:
        return _Punctual(self._inner.connect_unix_socket(*args, **options))

    def start_tls(self, *args: Any, timeout: float | None = None, **options: Any) -> _Punctual:
        return _Punctual(self._inner.start_tls(*args, timeout=_at_most(timeout), **options))

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _at_most(timeout))  # type: ignore[no-any-return]

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, _at_most(timeout))


def _at_most(timeout: float | None) -> float | None:
    clock = _clock.get()
    if clock is None:
        return timeout
    if not (left := clock.left()):
        raise TimeoutError("the deadline passed")
    return left if timeout is None else min(left, timeout)


def _bounded(http: Any, response: Any, kind: type) -> Any:
    """The response's bytes, unpacked if they are packed, up to `LARGEST` of them."""
    packed = response.headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("identity", "", "gzip", "deflate"):
        raise http.DecodingError(f"the reply is packed as {packed[:20]!r}, which was not asked for")
    unpack = zlib.decompressobj(wbits=47) if packed in ("gzip", "deflate") else None  # 47: either header
    if unpack is not None:
        del response.headers["content-encoding"]
    seen, stream = 0, response.stream

    def take(chunk: bytes) -> bytes:
        nonlocal seen
        try:
            content = chunk if unpack is None else unpack.decompress(chunk, LARGEST + 1 - seen)
        except zlib.error as error:
            raise http.DecodingError(f"the reply can't be unpacked: {error}") from error
        seen += len(content)
        if seen > LARGEST:
            raise http.DecodingError(f"the reply is larger than {LARGEST} bytes")
        return content

    class Bounded(kind):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            for chunk in stream:
                yield take(chunk)

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for chunk in stream:
                yield take(chunk)

        def close(self) -> None:
            stream.close()

        async def aclose(self) -> None:
            await stream.aclose()

    return Bounded()


def whole(value: Any) -> int:
    """A count of tokens as a vendor sent it; 0 for what is none: null, text, NaN, a negative number."""
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < LARGEST_COUNT
    return int(value) if sound else 0


def from_status(
    name: str,
    status: int,
    detail: object,
    *,
    headers: Mapping[str, str] | None = None,
    body: object = None,
    request_id: str | None = None,
    hints: Mapping[int, str] | None = None,
) -> Failure:
    """The error for an HTTP status, and whether to try again: 408, 409, 429 and 5xx may be, as the SDKs have it."""
    headers = headers or {}
    hint = {401: "check its key", 403: "the key may not do this", **(hints or {})}.get(status, "")
    message = f"{name} answered {status}: {str(detail)[:500]}" + (f" ({hint})" if hint else "")
    request_id = request_id or headers.get("x-request-id") or headers.get("request-id")
    facts: dict[str, Any] = {"status": status, "request_id": request_id, "body": body}
    if 300 <= status < 400:
        where = "another path"
        with contextlib.suppress(ValueError):
            where = urlsplit(headers.get("location", "")).hostname or where
        message = f"{name} answered {status}, a redirect to {where}; none is followed: correct base_url"
    told, wait_s = headers.get("x-should-retry"), _retry_after(headers)
    if status == 429:
        again = told != "false" and "insufficient_quota" not in str(body)
        return Failure(RateLimited(message, retry_after=wait_s, **facts), again, wait_s)
    if status in (408, 409) or (status >= 500 and status != 501):
        return Failure(Unavailable(message, **facts), told != "false", wait_s)
    return Failure(Rejected(message, **facts), told == "true", wait_s)


def connection_failed(name: str, error: BaseException, advice: str) -> Failure:
    """The error for a request that got no (whole) answer."""
    what = str(error) or type(error).__name__
    return Failure(Unavailable(f"{name} can't be reached or broke off: {what}; {advice}"), again=True)


def sdk_failure(sdk: Any, error: Any, *, name: str, model: str, advice: str) -> Failure | None:
    """The error for an exception of ``sdk``, openai or anthropic: both are generated with the same tree of errors."""
    import httpx2

    if isinstance(error, (sdk.APIConnectionError, httpx2.HTTPError)):  # anthropic lets the latter out of streams
        return connection_failed(name, error.__cause__ or error, advice)
    if isinstance(error, sdk.APIError):
        response = getattr(error, "response", None)
        status = 200 if response is None else response.status_code
        if status < 300:  # an error event inside a stream that had begun well
            words = str(error.body)
            status = 429 if "rate_limit" in words else 400 if "invalid_request" in words else 500
        return from_status(
            name,
            status,
            error.message,
            headers=None if response is None else response.headers,
            body=error.body,
            request_id=getattr(error, "request_id", None),
            hints={404: f"is {model!r} a model of this host?"},
        )
    if isinstance(error, sdk.APIError.__bases__[0]):  # the SDK refused by itself, before sending
        return Failure(ConfigError(f"{name}: {error}"))
    return None


def refused(error: BaseException | None) -> Any:
    """The response with an error's status over which this exception was raised; None if there was none."""
    while error is not None:
        response = getattr(error, "response", None)
        if getattr(response, "status_code", 0) >= 300:
            return response
        error = error.__context__
    return None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait; a date is read against the server's own clock. None for nonsense."""
    for header, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            told = float(headers[header]) * scale
        except (KeyError, ValueError):
            continue
        return told if told >= 0 else None
    until = _moment(headers.get("retry-after", ""))
    now = _moment(headers.get("date", ""))
    return None if until is None else max(0.0, until - (time.time() if now is None else now))


def _moment(text: str) -> float | None:
    with contextlib.suppress(ValueError, OverflowError, IndexError, TypeError):
        if (date := email.utils.parsedate_tz(text)) is not None:
            return float(email.utils.mktime_tz(date))
    return None


#: A shorter word is no key (local servers are given "none") and might stand in any sentence.
SHORTEST_KEY = 8


def clean(value: Any, secrets: Sequence[str]) -> Any:
    """``value`` without the keys: some servers repeat what they were sent."""
    if isinstance(value, str):
        for secret in (secret for secret in secrets if len(secret) >= SHORTEST_KEY):
            value = value.replace(secret, "***")
        return value
    if isinstance(value, Mapping):
        return {name: clean(item, secrets) for name, item in value.items()}
    return type(value)(clean(item, secrets) for item in value) if isinstance(value, (list, tuple)) else value


def scrub(error: BaseException | None, secrets: Sequence[str]) -> None:
    """Take the keys out of an SDK's exception and its causes, which a traceback prints."""
    while error is not None and secrets:
        error.args = clean(error.args, secrets)
        for name in ("message", "body", "error"):
            if hasattr(error, name):
                setattr(error, name, clean(getattr(error, name), secrets))
        error = error.__cause__ or error.__context__


def let_go(error: BaseException | None) -> None:
    """Clear the finished frames that an SDK's exception and its causes hold.

    Their variables are streams half read. Left to the garbage collector, those could be closed by another thread than
    that of their event loop, at the moment at which the loop itself closes them, which Python answers with a warning
    ("async generator already executing").
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
