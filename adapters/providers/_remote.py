"""The two faces of a provider behind HTTP, sync and async, over an adapter's pure functions and one call per verb.

Knows no vendor: an adapter builds the vendor's request, parses its reply and names the call that sends it. The SDKs'
own retries are off, since they can sleep past a deadline; the policy here is theirs (two retries, ``Retry-After``).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from agentmem.errors import AgentMemError, ConfigError, InvalidInput, ProviderError, Unavailable
from agentmem.provider import Capabilities, Generation, Request
from agentmem.tokens import counter_for, request_tokens

from ._http import Clock, Failure, clean, connection_failed, from_status, guard, let_go, refused, scrub
from ._single_flight import Flights

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Reader", "Remote"]

T = TypeVar("T")

#: Seconds to wait for another thread's event loop to close its connections.
CLOSE_S = 2.0
#: What the vendor's SDK or an adapter's parser may raise for a reply that is not what it should be.
NONSENSE = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
#: Seconds before the second attempt where the host names none; each further pause is twice the last, up to the longest.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
#: Texts per embedding request: below every vendor's limit, and small enough to keep one request short.
EMBED_BATCH = 128


class Reader(Protocol):
    """Puts a streamed reply together. Pure: one per stream."""

    def add(self, event: Mapping[str, Any], /) -> str:
        """The text in the next event, ``""`` if it holds none."""
        ...

    def end(self) -> Generation | None:
        """The whole, or None if the stream was cut before its last event."""
        ...


class Remote(ABC):
    """A provider behind HTTP. What starts with ``_`` and is abstract here is all that an adapter writes."""

    #: What to check when the host can't be reached.
    advice = "check the connection and base_url"

    def __init__(self, name: str, capabilities: Capabilities, settings: Mapping[str, Any]) -> None:
        self.name = name
        self.capabilities = capabilities
        self._timeout_s: float = settings["timeout_s"]
        self._max_retries: int = settings["max_retries"]
        self._flights = Flights(capabilities.cache)
        self._secrets = tuple(s for s in (settings.get("api_key"),) if s)
        self._lock = threading.RLock()  # a stream that is left may be closed by the collector at any point
        self._client: tuple[int, Any] | None = None
        self._async_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = weakref.WeakKeyDictionary()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    # What an adapter gives.

    @abstractmethod
    def _connect(self, *, asynchronous: bool) -> Any:
        """A new client."""

    @abstractmethod
    def _build(self, request: Request, *, stream: bool) -> dict[str, Any]:
        """The vendor's request body."""

    @abstractmethod
    def _parse(self, payload: Mapping[str, Any]) -> Generation:
        """The vendor's whole reply."""

    @abstractmethod
    def _reader(self) -> Reader:
        """What puts the vendor's streamed reply together."""

    @abstractmethod
    def _chat(self, client: Any, body: dict[str, Any]) -> Any:
        """Send ``body``: the reply, or an iterator of events if it asks for a stream; awaitable on an async client."""

    @abstractmethod
    def _plain(self, thing: Any) -> Mapping[str, Any]:
        """A reply or event of the SDK as JSON-like values."""

    @abstractmethod
    def _map(self, error: Exception) -> Failure | None:
        """The SDK's exception as ours, or None if it is not the SDK's."""

    def _embed(self, client: Any, texts: Sequence[str]) -> Any:  # noqa: ARG002 - the signature of those that embed
        """Send one batch of texts; awaitable on an async client. Only called where ``embeds`` is a capability."""
        raise ConfigError(f"{self.name} has no embeddings")

    def _vectors(self, payload: Mapping[str, Any]) -> list[Any]:
        """The vectors of an embedding reply, in the order of the texts."""
        rows = sorted(payload["data"], key=lambda row: row.get("index", 0))
        return [row["embedding"] for row in rows]

    # The faces.

    def generate(self, request: Request) -> Generation:
        """The whole answer. Raises the errors of `ProviderError`."""
        return self._answer(request, Clock(self._timeout_s))

    def _answer(self, request: Request, clock: Clock) -> Generation:
        body = self._checked(request, stream=False)
        with self._flights.alone(request, clock):
            reply = self._sync(clock, lambda: self._chat(self._sync_client(), body))
        return self._finished(request, clock, self._parsed(reply))

    async def agenerate(self, request: Request) -> Generation:
        """`generate`, awaited."""
        return await self._aanswer(request, Clock(self._timeout_s))

    async def _aanswer(self, request: Request, clock: Clock) -> Generation:
        body = self._checked(request, stream=False)
        async with self._flights.aalone(request, clock):
            reply = await self._async(clock, lambda: self._chat(self._async_client(), body))
        return self._finished(request, clock, self._parsed(reply))

    def stream(self, request: Request) -> Iterator[str | Generation]:
        """Pieces of text and, last, the `Generation`. Nothing is sent again once the first event has come."""
        if request.options.max_tokens == 0:
            yield self.generate(request)
            return
        yield from self._pieces(request, Clock(self._timeout_s))

    def _pieces(self, request: Request, clock: Clock) -> Generator[str | Generation, None, None]:
        body, reader = self._checked(request, stream=True), self._reader()
        with self._flights.alone(request, clock):
            source, event = self._sync(clock, lambda: _opened(self._chat(self._sync_client(), body)))
        try:
            while event is not None:
                if piece := self._piece(reader, event, clock):
                    since = time.monotonic()
                    yield piece
                    clock.lend(time.monotonic() - since)
                event = self._sync(clock, lambda: next(source, None), retries=0)
        finally:
            source.close()
        yield clock.stamp(_counted(request, self._whole(reader)))

    async def astream(self, request: Request) -> AsyncIterator[str | Generation]:
        """`stream`, for ``async for``."""
        if request.options.max_tokens == 0:
            yield await self.agenerate(request)
            return
        async with contextlib.aclosing(self._apieces(request, Clock(self._timeout_s))) as pieces:
            async for piece in pieces:
                yield piece

    async def _apieces(self, request: Request, clock: Clock) -> AsyncGenerator[str | Generation, None]:
        body, reader = self._checked(request, stream=True), self._reader()
        async with self._flights.aalone(request, clock):
            source, event = await self._async(clock, lambda: _aopened(self._chat(self._async_client(), body)))
        try:
            while event is not None:
                if piece := self._piece(reader, event, clock):
                    since = time.monotonic()
                    yield piece
                    clock.lend(time.monotonic() - since)
                event = await self._async(clock, lambda: anext(source, None), retries=0)
        finally:
            await _aclose(source)
        yield clock.stamp(_counted(request, self._whole(reader)))

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The texts' vectors as the vendor gives them, float32 [len(texts), dimension]; the deadline is per batch."""
        vectors: list[Any] = []
        for batch in self._batches(texts):
            reply = self._sync(Clock(self._timeout_s), lambda batch=batch: self._embed(self._sync_client(), batch))  # type: ignore[misc]
            vectors += self._rows(reply, len(batch))
        return _matrix(vectors)

    async def aembed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """`embed`, awaited."""
        vectors: list[Any] = []
        for batch in self._batches(texts):
            reply = await self._async(
                Clock(self._timeout_s),
                lambda batch=batch: self._embed(self._async_client(), batch),  # type: ignore[misc]
            )
            vectors += self._rows(reply, len(batch))
        return _matrix(vectors)

    def tensors(self) -> Any:
        """Always `ConfigError`: the weights are elsewhere."""
        raise ConfigError(f"{self.name} gives no weights: only local models can be trained (model='local')")

    def close(self) -> None:
        """Close every connection; may be called again.

        Async clients are closed in their own loops: waited for from another thread, by a task if called inside the
        loop itself. There ``await aclose()`` is better, since it returns when they are closed.
        """
        for loop, client in self._retire():
            if loop is None:
                client.close()
            elif loop.is_running():
                self._close_in(loop, client)
            elif not loop.is_closed():
                loop.run_until_complete(_aclose(client))

    async def aclose(self) -> None:
        """`close`, awaited: the running loop's connections are closed when it returns."""
        for loop, client in self._retire():
            if loop is None:
                client.close()
            elif loop is asyncio.get_running_loop():
                await _aclose(client)
            elif loop.is_running():
                await asyncio.to_thread(self._close_in, loop, client)

    # How.

    def _ask(self, call: Callable[[Any], Any], parse: Callable[[Mapping[str, Any]], T]) -> T:
        """A request beside the chat (a count, a model's facts): ``call`` sends it with the client it is given, and what
        ``parse`` makes of the reply is returned. Deadline, retries and errors are those of every other request."""
        reply = self._sync(Clock(self._timeout_s), lambda: call(self._sync_client()))
        return self._understood(lambda: parse(self._plain(reply)))

    async def _aask(self, call: Callable[[Any], Any], parse: Callable[[Mapping[str, Any]], T]) -> T:
        """`_ask`, awaited."""
        reply = await self._async(Clock(self._timeout_s), lambda: call(self._async_client()))
        return self._understood(lambda: parse(self._plain(reply)))

    def _checked(self, request: Request, *, stream: bool) -> dict[str, Any]:
        if request.loras and not self.capabilities.loras:
            raise ConfigError(f"{self.name} can't serve LoRA versions; deactivate them or use model='local'")
        if request.tools and not self.capabilities.tools:
            raise ConfigError(f"{self.name} takes no tools")
        if request.options.schema is not None and not self.capabilities.schemas:
            raise ConfigError(f"{self.name} can't answer by a schema")
        if not self.capabilities.images and any(m.images for s in request.segments for m in s.messages):
            raise ConfigError(f"{self.name} reads no images")
        if not any(segment.messages for segment in request.segments):
            raise InvalidInput("the request has no message")
        body = self._build(request, stream=stream)
        try:
            json.dumps(body, ensure_ascii=False).encode()  # so that a later error is surely the server's
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"the request can't be written as JSON: {error}") from error
        return body

    def _understood(self, parse: Callable[[], T]) -> T:
        try:
            return parse()
        except NONSENSE as error:
            if isinstance(error, AgentMemError):
                raise
            raise Unavailable(f"{self.name} sent a reply that can't be understood ({type(error).__name__})") from error

    def _finished(self, request: Request, clock: Clock, generation: Generation) -> Generation:
        if request.options.max_tokens == 0:  # asked for prefill: the one token that had to be made is dropped
            generation = replace(generation, text="", tool_calls=(), finish_reason="length")
        return clock.stamp(_counted(request, generation))

    def _parsed(self, reply: Any) -> Generation:
        return self._understood(lambda: _sound(self._parse(self._plain(reply))))

    def _piece(self, reader: Reader, event: Any, clock: Clock) -> str:
        piece = self._understood(lambda: _text(reader.add(self._plain(event))))
        if piece:
            clock.piece()
        return piece

    def _whole(self, reader: Reader) -> Generation:
        generation = self._understood(reader.end)
        if generation is None:
            raise Unavailable(f"{self.name} ended its stream before its last event")
        return self._understood(lambda: _sound(generation))

    def _batches(self, texts: Sequence[str]) -> Iterator[list[str]]:
        if not self.capabilities.embeds:
            raise ConfigError(f"{self.name} has no embeddings; set embedder to 'default' or to a model that has them")
        return (list(texts[first : first + EMBED_BATCH]) for first in range(0, len(texts), EMBED_BATCH))

    def _rows(self, reply: Any, count: int) -> list[Any]:
        rows = self._understood(lambda: self._vectors(self._plain(reply)))
        if len(rows) != count or len({len(row) for row in rows}) != 1:
            raise Unavailable(f"{self.name} sent {len(rows)} vectors for {count} texts, or of several lengths")
        return rows

    def _sync(self, clock: Clock, call: Callable[[], T], *, retries: int | None = None) -> T:
        for attempt in itertools.count():
            try:
                return clock.run(call)
            except Exception as error:  # noqa: BLE001 - mapped and raised, or tried again
                pause = self._pause(error, clock, attempt, retries)
            time.sleep(pause)
        raise AssertionError  # count() has no end

    async def _async(self, clock: Clock, call: Callable[[], Awaitable[T]], *, retries: int | None = None) -> T:
        for attempt in itertools.count():
            try:
                async with asyncio.timeout(clock.left()):
                    return await call()
            except Exception as error:  # noqa: BLE001 - and never CancelledError: a cancelled call sends nothing more
                pause = self._pause(error, clock, attempt, retries)
            await asyncio.sleep(pause)
        raise AssertionError  # count() has no end

    def _pause(self, error: Exception, clock: Clock, attempt: int, retries: int | None) -> float:
        """Seconds until the next attempt; raises the mapped error if there is to be none."""
        if isinstance(error, AgentMemError):
            raise error
        scrub(error, self._secrets)
        let_go(error)
        failure = self._failure(error, clock)
        wait = failure.wait_s
        if wait is None:
            wait = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.75, 1.0)  # noqa: S311 - spreads clients out
        tries = self._max_retries if retries is None else retries
        if not failure.again or attempt >= tries or wait >= clock.left():
            raise failure.error from error
        return wait

    def _failure(self, error: Exception, clock: Clock) -> Failure:
        if isinstance(error, TimeoutError) or not clock.left():
            return Failure(Unavailable(f"{self.name} did not finish within timeout_s={self._timeout_s:g}"))
        if isinstance(error, UnicodeEncodeError):
            return Failure(InvalidInput(f"a text can't be encoded as UTF-8: {error}"))
        if (failure := self._mapped(error)) is not None:
            failure.error.args = clean(failure.error.args, self._secrets)
            if isinstance(failure.error, ProviderError):
                failure.error.body = clean(failure.error.body, self._secrets)
            return failure
        if isinstance(error, NONSENSE):
            return Failure(Unavailable(f"{self.name} sent a reply that can't be understood ({type(error).__name__})"))
        if isinstance(error, OSError):
            return connection_failed(self.name, error, self.advice)
        raise error

    def _mapped(self, error: Exception) -> Failure | None:
        with contextlib.suppress(*NONSENSE):
            if (failure := self._map(error)) is not None:
                return failure
        if (response := refused(error)) is not None:  # the SDK, or the mapping, failed over an error's body
            return from_status(self.name, response.status_code, response.reason_phrase, headers=response.headers)
        return None

    def _sync_client(self) -> Any:
        with self._lock:
            self._open()
            if self._client is None or self._client[0] != os.getpid():  # a forked child must not share sockets
                self._client = os.getpid(), self._connected(asynchronous=False)
            return self._client[1]

    def _async_client(self) -> Any:
        loop = asyncio.get_running_loop()
        with self._lock:
            self._open()
            if loop not in self._async_clients:  # a connection belongs to the loop it was made in
                self._async_clients[loop] = self._connected(asynchronous=True)
            return self._async_clients[loop]

    def _connected(self, *, asynchronous: bool) -> Any:
        client = self._connect(asynchronous=asynchronous)
        guard(client)
        return client

    def _open(self) -> None:
        if self._closed:
            raise ConfigError(f"{self.name} is closed")

    def _retire(self) -> list[tuple[asyncio.AbstractEventLoop | None, Any]]:
        with self._lock:
            self._closed = True
            clients: list[tuple[asyncio.AbstractEventLoop | None, Any]] = [*self._async_clients.items()]
            if self._client is not None and self._client[0] == os.getpid():
                clients.append((None, self._client[1]))
            self._client = None
            self._async_clients.clear()
            return clients

    def _close_in(self, loop: asyncio.AbstractEventLoop, client: Any) -> None:
        try:
            inside = asyncio.get_running_loop() is loop
        except RuntimeError:
            inside = False
        if inside:
            task = loop.create_task(_aclose(client))
            self._closing.add(task)  # a loop keeps only weak references to its tasks
            task.add_done_callback(self._closing.discard)
            return
        with contextlib.suppress(TimeoutError):  # the loop may be waiting for this very thread
            asyncio.run_coroutine_threadsafe(_aclose(client), loop).result(CLOSE_S)


def _counted(request: Request, generation: Generation) -> Generation:
    """The generation with an estimate of its prompt's tokens where the server left them out (0 would be no prompt)."""
    if generation.usage.input_tokens:
        return generation
    tokens = request_tokens(request, counter_for("").count)
    return replace(generation, usage=generation.usage.model_copy(update={"input_tokens": tokens}))


def _text(piece: Any) -> str:
    if not isinstance(piece, str):
        raise TypeError(f"a piece of text is of type {type(piece).__name__}")
    return piece


def _sound(generation: Generation) -> Generation:
    """The generation, or TypeError where a text that was taken over from a reply is none."""
    for text in (generation.text, generation.finish_reason, generation.miss, generation.id):
        if not isinstance(text, str | None):
            raise TypeError(f"a text is of type {type(text).__name__}")
    return generation


def _opened(source: Any) -> tuple[Any, Any]:
    """An iterator and its first event: only now is it sure that the request was taken."""
    try:
        return source, next(source, None)
    except BaseException:
        source.close()
        raise


async def _aopened(opening: Awaitable[Any]) -> tuple[Any, Any]:
    source = await opening
    try:
        return source, await anext(source, None)
    except BaseException:
        await _aclose(source)
        raise


async def _aclose(thing: Any) -> None:
    """Close a stream or a client, and the generator that a vendor's stream reads from, which its own ``close`` leaves
    suspended: the garbage collector would close that one later, maybe in another thread than its loop's (`let_go`)."""
    await (thing.aclose() if hasattr(thing, "aclose") else thing.close())
    inner: Any = getattr(thing, "_iterator", None)
    if hasattr(inner, "aclose"):
        await inner.aclose()


def _matrix(vectors: list[Any]) -> npt.NDArray[np.float32]:
    import numpy as np

    return np.asarray(vectors, dtype=np.float32).reshape(len(vectors), -1 if vectors else 0)
