"""One of several parallel calls fills a host's prompt cache; the others wait for it and read.

A host's entry can be read only once the answer that wrote it has begun, so N parallel first calls of one prefix would
all pay for writing it. Knows a request's marked prefixes and which were sent lately; sends nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass

from agentmem.cache_rules import CacheRules
from agentmem.provider import Mark, Request
from agentmem.tokens import PER_MESSAGE, counter_for
from agentmem.types import Message

from ._http import Clock

__all__ = ["Flights"]

#: Seconds that a call waits for another at most: about what reading a very long prompt takes.
LONGEST_WAIT_S = 15.0
#: Prefixes remembered as sent.
REMEMBERED = 2048


@dataclass(frozen=True)
class Prefix:
    """A marked prefix: a digest of all that its bytes are made from, its length in bytes, its entry's lifetime."""

    key: bytes
    size: int
    messages: tuple[Message, ...]
    seconds: float


class Flights:
    """The calls of one provider that are filling its host's cache now, and the prefixes that were sent lately.

    Does nothing unless the host's ``rules`` say that writing costs. A failed call lets the next one go.
    """

    def __init__(self, rules: CacheRules | None) -> None:
        paid = rules is not None and any(lifetime.write > 1 for lifetime in rules.lifetimes)
        self._rules = rules if paid else None
        self._forget()

    def _forget(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._flying: dict[bytes, Future[None]] = {}
        self._sent: dict[bytes, float] = {}

    @contextlib.contextmanager
    def alone(self, request: Request, clock: Clock) -> Generator[None]:
        """Wait while another call writes a prefix of this request; inside, others wait for this one."""
        prefixes = self._prefixes(request)
        flight: Future[None] = Future()
        until = time.monotonic() + min(LONGEST_WAIT_S, clock.left() / 2)
        while (ahead := self._board(prefixes, flight)) and (left := until - time.monotonic()) > 0:
            wait_for([ahead], left)
        with self._flight(prefixes, flight):
            yield

    @contextlib.asynccontextmanager
    async def aalone(self, request: Request, clock: Clock) -> AsyncGenerator[None]:
        """`alone`, for a coroutine. Calls of other threads and loops are waited for too."""
        prefixes = self._prefixes(request)
        flight: Future[None] = Future()
        until = time.monotonic() + min(LONGEST_WAIT_S, clock.left() / 2)
        while (ahead := self._board(prefixes, flight)) and (left := until - time.monotonic()) > 0:
            await _landed(ahead, left)
        with self._flight(prefixes, flight):
            yield

    @contextlib.contextmanager
    def _flight(self, prefixes: Sequence[Prefix], flight: Future[None]) -> Generator[None]:
        landed = False
        try:
            yield
            landed = True
        finally:
            if prefixes:
                self._land(prefixes, flight, landed)

    def _board(self, prefixes: Sequence[Prefix], flight: Future[None]) -> Future[None] | None:
        """The call to wait for; None if there is none: then this one is what others wait for."""
        if not prefixes:
            return None
        if self._owner != os.getpid():  # the calls of a parent process never land here
            self._forget()
        with self._lock:
            now = time.monotonic()
            cold = [prefix for prefix in prefixes if self._sent.get(prefix.key, 0.0) <= now]
            for prefix in reversed(cold):
                ahead = self._flying.get(prefix.key)
                if ahead is not None and ahead is not flight and self._is_kept(prefix):
                    return ahead
            for prefix in cold:
                self._flying.setdefault(prefix.key, flight)
            return None

    def _land(self, prefixes: Sequence[Prefix], flight: Future[None], landed: bool) -> None:
        with self._lock:
            now = time.monotonic()
            for prefix in prefixes:
                if self._flying.get(prefix.key) is flight:
                    del self._flying[prefix.key]
                if landed:
                    self._sent.pop(prefix.key, None)  # so that the newest stand last
                    self._sent[prefix.key] = now + prefix.seconds
            while len(self._sent) > REMEMBERED:
                del self._sent[next(iter(self._sent))]
        flight.set_result(None)

    def _prefixes(self, request: Request) -> list[Prefix]:
        rules = self._rules
        if rules is None:
            return []
        seconds = {lifetime.name: lifetime.seconds for lifetime in rules.lifetimes}
        messages = tuple(message for segment in request.segments for message in segment.messages)
        tools = json.dumps([dict(tool) for tool in request.tools], sort_keys=True, default=repr)
        running = hashlib.sha256(f"{request.cache_key}\0{request.tenant}\0{tools}".encode())
        size, done, prefixes = len(tools), 0, []
        for mark in _marks(request):
            for message in messages[done : mark.messages]:
                content = message.model_dump_json().encode()
                running.update(content)
                size += len(content)
            done = max(done, mark.messages)
            kept_s = seconds.get(mark.lifetime or "", rules.lifetimes[0].seconds)
            prefixes.append(Prefix(running.digest(), size, messages[:done], kept_s))
        return prefixes

    def _is_kept(self, prefix: Prefix) -> bool:
        """Whether the host keeps a prefix of this length. Only counted where another call is on its way."""
        rules = self._rules
        if rules is None or prefix.size < rules.minimum:  # no token is shorter than a byte
            return False
        counter = counter_for("")
        return sum(counter.count(message.content) + PER_MESSAGE for message in prefix.messages) + 16 >= rules.minimum


async def _landed(flight: Future[None], seconds: float) -> None:
    """Wait for it, at most so long. It may land in another thread, and after this loop is gone."""
    loop, landed = asyncio.get_running_loop(), asyncio.Event()

    def tell(_: Future[None]) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(landed.set)

    flight.add_done_callback(tell)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await landed.wait()


def _marks(request: Request) -> Sequence[Mark]:
    if request.cache is not None:
        return request.cache.marks
    marks, messages = [], 0
    for segment in request.segments:
        messages += len(segment.messages)
        if segment.stable and segment.messages:
            marks.append(Mark(messages=messages))
    return marks
