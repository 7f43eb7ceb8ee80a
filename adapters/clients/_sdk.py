"""What the openai and anthropic SDKs have in common: a client whose ``post`` every call goes through, and streams.

Knows how a call is led through memory; the wire formats are in the file of each SDK. A copy of the client gets a
``post`` of its own; its resources are made anew over that. Neither the caller's client nor a class is changed.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import sys
import types
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from typing import Any, Protocol

from agentmem.flow import arun, run
from agentmem.provider import Generation
from agentmem.wrapped_turns import Asked, Ready, Recollection

__all__ = ["Reads", "Route", "Routes", "bound", "twin"]

_log = logging.getLogger("agentmem")

#: The header by which both SDKs mark calls whose answer is given as it came.
RAW = "x-stainless-raw-response"


class Reads(Protocol):
    """Puts the events of a streamed answer together."""

    def add(self, chunk: Mapping[str, Any], /) -> object: ...
    def end(self) -> Generation | None: ...


class Route(Protocol):
    """One endpoint's wire format, over one request body, which is never changed."""

    @property
    def asked(self) -> Asked: ...
    def placed(self, ready: Ready, memory: Recollection, /) -> dict[str, Any]:
        """The body with what was recalled."""
        ...

    def whole(self, payload: Mapping[str, Any]) -> Generation | None:
        """The answer; None where the payload is none yet."""
        ...

    def reader(self) -> Reads: ...
    def hides(self, event: Mapping[str, Any], /) -> bool:
        """Whether the caller did not ask for this event of the stream."""
        ...


Routes = Mapping[str, Callable[[Mapping[str, Any], Any], Route]]


def twin(client: Any) -> Any:
    """A client of the same class and state; resources that it has made already are made anew, over the copy."""
    made = object.__new__(type(client))
    for name, value in vars(client).items():
        if not isinstance(_declared(type(client), name), functools.cached_property):
            made.__dict__[name] = value
    return made


def _declared(cls: type, name: str) -> object:
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def bound(client: Any, memory: Recollection, routes: Routes, *, asynchronous: bool) -> Any:
    """A copy of the client whose posts to ``routes`` go through memory."""
    made = twin(client)
    post = type(client).post.__get__(made)
    made.__dict__["post"] = (_apost if asynchronous else _post)(made, post, memory, routes)
    return made


def _post(client: Any, post: Callable[..., Any], memory: Recollection, routes: Routes) -> Callable[..., Any]:
    @functools.wraps(post)
    def posted(path: str, **how: Any) -> Any:
        how = _read_once(path, how, routes)
        route = _route(client, path, how, routes)
        if route is None:
            return post(path, **how)
        ready = run(memory.before(route.asked))
        with ready.sent(streams=bool(how.get("stream"))):
            answer = post(path, **_through(route, ready, memory, how))
            if _is_whole(how):
                whole = _parsed(answer) if _is_raw(how) else answer
                if (generation := _generation(route, whole)) is not None:
                    run(memory.after(ready, generation))
        return answer

    return posted


def _apost(client: Any, post: Callable[..., Any], memory: Recollection, routes: Routes) -> Callable[..., Any]:
    @functools.wraps(post)
    async def posted(path: str, **how: Any) -> Any:
        how = _read_once(path, how, routes)
        route = _route(client, path, how, routes)
        if route is None:
            return await post(path, **how)
        ready = await arun(memory.before(route.asked))
        with ready.sent(streams=bool(how.get("stream"))):
            answer = await post(path, **_through(route, ready, memory, how))
            if _is_whole(how):
                whole = await _aparsed(answer) if _is_raw(how) else answer
                if (generation := _generation(route, whole)) is not None:
                    await arun(memory.after(ready, generation))
        return answer

    return posted


def _read_once(path: str, how: dict[str, Any], routes: Routes) -> dict[str, Any]:
    """The arguments with lists in the place of iterators: the SDKs take those too, and they can be read only once."""
    body = how.get("body")
    if path not in routes or not isinstance(body, Mapping):
        return how
    lists = {name: list(value) for name, value in body.items() if isinstance(value, Iterator)}
    return {**how, "body": {**body, **lists}} if lists else how


def _route(client: Any, path: str, how: Mapping[str, Any], routes: Routes) -> Route | None:
    """The request as its wire format reads it; None where it is none of ours, or none that we understand."""
    make = routes.get(path)
    if make is None or not isinstance(how.get("body"), Mapping):
        return None
    try:
        return make(how["body"], client)
    except Exception as error:  # noqa: BLE001 - what the vendor may well take must not fail here
        _log.warning("a request to %s goes out without memories: it can't be read (%r)", path, error)
        return None


def _through(route: Route, ready: Ready, memory: Recollection, how: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``post``: the body with what was recalled, and a stream class that listens."""
    sent = dict(how)
    stream = bool(how.get("stream"))
    try:
        sent["body"] = route.placed(ready, memory)
    except Exception as error:  # noqa: BLE001
        _log.warning("a request goes out without memories: they can't be put into it (%r)", error)
    if stream and how.get("stream_cls") is not None:
        sent["stream_cls"] = _listening(how["stream_cls"], route, ready, memory)
    return sent


def _wire(how: Mapping[str, Any]) -> str | None:
    """How much of the wire the caller wants to see: "stream" leaves the body to the caller, others not."""
    headers = (how.get("options") or {}).get("headers") or {}
    return next((str(value) for name, value in headers.items() if name.lower() == RAW), None)


def _is_raw(how: Mapping[str, Any]) -> bool:
    """Whether the answer comes with its status and headers, to be parsed: both SDKs keep what was parsed."""
    return _wire(how) is not None


def _is_whole(how: Mapping[str, Any]) -> bool:
    return not how.get("stream") and _wire(how) != "stream"


def _parsed(answer: Any) -> Any:
    """The whole of an answer that is given as it came; None where it is none: that is for the caller to find out."""
    try:
        return answer.parse()
    except Exception as error:  # noqa: BLE001
        _log.warning("an answer is not remembered: it can't be parsed (%r)", error)
        return None


async def _aparsed(answer: Any) -> Any:
    """As `_parsed`; where parsing is awaited, awaited."""
    whole = _parsed(answer)
    try:
        return await whole if inspect.isawaitable(whole) else whole
    except Exception as error:  # noqa: BLE001
        _log.warning("an answer is not remembered: it can't be parsed (%r)", error)
        return None


def _generation(route: Route, whole: Any) -> Generation | None:
    """What the answer says; None where it is none yet or can't be understood."""
    if whole is None:
        return None
    try:
        return route.whole(whole.to_dict(warnings=False))
    except Exception as error:  # noqa: BLE001 - the caller has an answer, and must get it
        _log.warning("an answer is not remembered: it can't be read (%r)", error)
        return None


def _listening(stream_cls: Any, route: Route, ready: Ready, memory: Recollection) -> Any:
    """A class as ``stream_cls`` (``Stream[Event]``) whose streams tell memory what they gave, when it is whole.

    Both SDKs draw all their events from ``__stream__``, however the stream is read, and know subclasses.
    """
    origin = getattr(stream_cls, "__origin__", stream_cls)
    events: Any = origin.__stream__
    heard = _Heard(route, ready)

    def listen(self: Any) -> Any:
        # Of a copy: a generator that knew the stream would be a circle with it, and a dropped one would linger.
        inner = events(copy.copy(self))
        return (_awaited if hasattr(inner, "__anext__") else _listened)(inner, heard, memory)

    body = {"__stream__": listen, "__module__": origin.__module__}
    return types.new_class(origin.__name__, (stream_cls,), {}, lambda space: space.update(body))


def _listened(inner: Any, heard: _Heard, memory: Recollection) -> Generator[Any, None, None]:
    try:
        for event in inner:
            if heard.passes(event):
                yield event
    finally:
        with heard.ready.sent(streams=False):
            inner.close()
            if (generation := heard.whole()) is not None:
                run(memory.after(heard.ready, generation))


async def _awaited(inner: Any, heard: _Heard, memory: Recollection) -> AsyncGenerator[Any, None]:
    try:
        async for event in inner:
            if heard.passes(event):
                yield event
    finally:
        with heard.ready.sent(streams=False):
            await inner.aclose()
            if (generation := heard.whole()) is not None:
                await arun(memory.after(heard.ready, generation))


class _Heard:
    """What came of a stream so far."""

    def __init__(self, route: Route, ready: Ready) -> None:
        self._route = route
        self.ready = ready
        self._reader: Reads | None = route.reader()

    def passes(self, event: Any) -> bool:
        """Take in an event; True if the caller is to get it."""
        self.ready.came()
        try:
            plain = event.to_dict(warnings=False)
            if self._reader is not None:
                self._reader.add(plain)
            return not self._route.hides(plain)
        except Exception as error:  # noqa: BLE001 - the caller's stream goes on
            _log.warning("a streamed answer is not remembered: it can't be read (%r)", error)
            self._reader = None
            return True

    def whole(self) -> Generation | None:
        """The answer, once; None where it was cut or given up before its end."""
        reader, self._reader = self._reader, None
        if reader is None or sys.is_finalizing():
            return None
        try:
            return reader.end()
        except Exception as error:  # noqa: BLE001
            _log.warning("a streamed answer is not remembered: it can't be read (%r)", error)
            return None
