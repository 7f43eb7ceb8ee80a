"""A verb as a generator: it yields what it needs from outside and is sent the answer.

The drivers here run such a flow synchronously or under asyncio. They know nothing of what a flow does. After the
sans-I/O auth flows of httpx.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import Unavailable
from .provider import CountsRequests, Generation, Provider, Request
from .types import TokenCount

if TYPE_CHECKING:
    from .plaintext.encoded import Embedder, Encoded

__all__ = ["Count", "Embed", "Flow", "Generate", "Need", "Work", "arun", "astream", "local", "run", "stream", "through"]

T = TypeVar("T")


@dataclass(frozen=True)
class Embed:
    """A need: the vectors of these texts and of their tokens, an `Encoded`."""

    embedder: Embedder
    texts: Sequence[str]
    query: bool = False

    def answer(self) -> Encoded:
        """The vectors, waited for in this thread."""
        from .plaintext.encoded import encode_with

        return encode_with(self.embedder, self.texts, query=self.query)

    async def aanswer(self) -> Encoded:
        """The vectors, awaited."""
        from .plaintext.encoded import aencode_with

        return await aencode_with(self.embedder, self.texts, query=self.query)


@dataclass(frozen=True)
class Generate:
    """A need: the answer to a request, as a whole `Generation`. ``heard`` is called with each piece of a streamed one
    that is taken."""

    provider: Provider
    request: Request
    heard: Callable[[], object] | None = None

    def answer(self) -> Generation:
        """The answer, waited for in this thread."""
        return self.provider.generate(self.request)

    async def aanswer(self) -> Generation:
        """The answer, awaited."""
        return await self.provider.agenerate(self.request)


@dataclass(frozen=True)
class Count:
    """A need: how many tokens a whole request has, asked of the provider that would get it."""

    provider: CountsRequests
    request: Request

    def answer(self) -> TokenCount:
        """The count, waited for in this thread."""
        return self.provider.count_request(self.request)

    async def aanswer(self) -> TokenCount:
        """The count, awaited."""
        return await self.provider.acount_request(self.request)


@dataclass(frozen=True)
class Work:
    """A need: long work on this machine. ``work(stop)`` asks ``stop()`` now and then, which says true once the task
    that awaits it was cancelled; the cancellation is raised when the work has ended."""

    work: Callable[[Callable[[], bool]], Any]

    def answer(self) -> Any:
        """What it returns, done in this thread; Ctrl-C interrupts it."""
        return self.work(lambda: False)

    async def aanswer(self) -> Any:
        """What it returns, done in a worker thread."""
        cancelled = threading.Event()
        return await _in_thread(self.work, cancelled.is_set, stopping=cancelled.set)


#: What a flow asks of the outside.
Need = Embed | Generate | Count | Work
#: A verb: yields needs, is sent their answers, returns the verb's result.
Flow = Generator[Need, Any, T]


def local(work: Callable[..., T], *arguments: Any, **keywords: Any) -> Flow[T]:
    """A flow that needs nothing from outside, so that the async face runs it in a thread as it does any local step."""
    return work(*arguments, **keywords)
    yield  # makes this a generator


def through(flow: Flow[T], change: Callable[[Need], Need]) -> Flow[T]:
    """The same flow with every need as ``change`` gives it; what that raises gives the flow up."""
    answer: Any = None
    failure: Exception | None = None
    try:
        while True:
            done, need = _advance(flow, answer, failure)
            if done:
                result: T = need
                return result
            answer, failure = None, None
            asked = change(need)
            try:
                answer = yield asked
            except Exception as error:  # noqa: BLE001 - the flow decides what a failure means
                failure = error
    finally:
        flow.close()


def run(flow: Flow[T]) -> T:
    """Run a flow to its result in this thread."""
    pieces = stream(flow, pieces=False)
    try:
        while True:
            next(pieces)
    except StopIteration as stop:
        result: T = stop.value
        return result


def stream(flow: Flow[T], *, pieces: bool = True) -> Generator[str, None, T]:
    """Run a flow, yielding the text of its generation piece by piece; the generator's return value is the result."""
    answer: Any = None
    failure: Exception | None = None
    try:
        while True:
            done, need = _advance(flow, answer, failure)
            if done:
                result: T = need
                return result
            answer, failure = None, None
            try:
                if pieces and isinstance(need, Generate):
                    answer = yield from _pieces(need)
                else:
                    answer = need.answer()
            except Exception as error:  # noqa: BLE001 - the flow decides what a failure means
                failure = error
    finally:
        flow.close()


def _pieces(need: Generate) -> Generator[str, None, Generation]:
    source = need.provider.stream(need.request)
    try:
        for piece in source:
            if isinstance(piece, Generation):
                return piece
            yield piece
            if need.heard is not None:
                need.heard()
    finally:
        _close(source)
    raise Unavailable(f"{need.provider.name} ended its stream without a last message")


def _close(source: object) -> None:
    """Close an iterator that has a ``close``: a consumer that stops early must not leave a socket or a lock behind."""
    close = getattr(source, "close", None)
    if close is not None:
        close()


async def arun(flow: Flow[T]) -> T:
    """Run a flow to its result under asyncio; its local work runs in worker threads, never on the event loop."""
    result: list[T] = []
    async with contextlib.aclosing(astream(flow, result.append, pieces=False)) as pieces:
        async for _ in pieces:
            pass
    return result[0]


async def astream(flow: Flow[T], finished: Callable[[T], object], *, pieces: bool = True) -> AsyncGenerator[str, None]:
    """Like `stream` under asyncio. An async generator can't return a value, so the result goes to ``finished``.

    Cancelled during a local step, it first lets the step end (a transaction is whole or was never begun), then raises.
    """
    answer: Any = None
    failure: Exception | None = None
    try:
        while True:
            done, need = await _in_thread(_advance, flow, answer, failure)
            if done:
                finished(need)
                return
            answer, failure = None, None
            try:
                if pieces and isinstance(need, Generate):
                    source = need.provider.astream(need.request)
                    try:
                        async for piece in source:
                            if isinstance(piece, Generation):
                                answer = piece
                                break
                            yield piece
                            if need.heard is not None:
                                need.heard()
                    finally:
                        await _aclose(source)
                    if answer is None:
                        raise Unavailable(f"{need.provider.name} ended its stream without a last message")
                else:
                    answer = await need.aanswer()
            except Exception as error:  # noqa: BLE001 - the flow decides what a failure means
                failure = error
    finally:
        flow.close()


async def _aclose(source: object) -> None:
    aclose = getattr(source, "aclose", None)
    if aclose is not None:
        await aclose()


def _advance(flow: Flow[T], answer: Any, failure: Exception | None) -> tuple[bool, Any]:
    """One step of a flow: (False, its next need) or (True, its result). StopIteration can't cross a future."""
    try:
        return False, flow.send(answer) if failure is None else flow.throw(failure)
    except StopIteration as stop:
        return True, stop.value


async def _in_thread(work: Callable[..., T], *arguments: Any, stopping: Callable[[], object] | None = None) -> T:
    """``asyncio.to_thread``, but a cancellation is raised only when the work has ended; ``stopping`` tells it to."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if stopping is not None:
            stopping()
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen: the cancellation is what the caller hears of
        raise
