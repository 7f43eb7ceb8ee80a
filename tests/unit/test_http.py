"""The ground under every provider behind HTTP: waits that a server asks for, bounds on replies, one flight a prefix."""

from __future__ import annotations

import asyncio
import gzip
import importlib
import math
import threading
import time
import zlib
from collections.abc import Callable
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any

import pytest

from agentmem.cache_rules import CacheRules, Lifetime
from agentmem.errors import RateLimited, Rejected, Unavailable
from agentmem.provider import CachePlan, Mark, Request
from agentmem.testing import FaultServer
from agentmem.testing.faults import Call
from agentmem.types import Message, Segment

_http = importlib.import_module("agentmem.adapters.providers._http")
_single_flight = importlib.import_module("agentmem.adapters.providers._single_flight")
Clock, from_status, guard, whole = _http.Clock, _http.from_status, _http.guard, _http.whole
Flights = _single_flight.Flights

RULES = CacheRules(
    kind="breakpoints",
    minimum=10,
    read=0.1,
    lifetimes=(Lifetime(name="5m", seconds=300, write=1.25), Lifetime(name="1h", seconds=3600, write=2.0)),
    marked=True,
    marks=4,
)
FREE = CacheRules(kind="automatic", minimum=10, read=0.1, lifetimes=(Lifetime(name="x", seconds=300, write=1.0),))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Fri, 99 Foo 2026"}, None),
        ({}, None),
        ({"retry-after": formatdate(1000, usegmt=True), "date": formatdate(970, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(1000, usegmt=True), "date": formatdate(2000, usegmt=True)}, 0.0),
    ],
)
def test_a_wait_is_read_as_the_server_means_it(headers: dict[str, str], seconds: float | None) -> None:
    failure = from_status("x:y", 429, "slow", headers=headers)
    assert isinstance(failure.error, RateLimited)
    assert failure.error.retry_after == failure.wait_s == seconds
    assert failure.again


def test_a_date_without_the_servers_clock_is_read_by_ours() -> None:
    failure = from_status("x:y", 503, "slow", headers={"retry-after": formatdate(time.time() + 60, usegmt=True)})
    assert isinstance(failure.error, Unavailable)
    assert failure.wait_s is not None
    assert 55 < failure.wait_s <= 60


@pytest.mark.parametrize("place", ["https://other.example/x", "/here", "http://[", "", "file:///etc/passwd"])
def test_a_redirect_is_refused_and_says_where_it_led(place: str) -> None:
    failure = from_status("x:y", 307, "", headers={"location": place, "request-id": "r1"})
    assert isinstance(failure.error, Rejected)
    assert not failure.again
    assert ("other.example" in str(failure.error)) is ("other" in place)
    assert (failure.error.status, failure.error.request_id) == (307, "r1")


@pytest.mark.parametrize(
    ("told", "count"),
    [
        (7, 7),
        (7.0, 7),
        (0, 0),
        (-1, 0),
        (None, 0),
        ("7", 0),
        (math.nan, 0),
        (math.inf, 0),
        (True, 0),
        (10**400, 0),
        ([], 0),
    ],
)
def test_a_count_is_a_count_or_nothing(told: Any, count: int) -> None:
    assert whole(told) == count


def replied(body: bytes, **headers: object) -> Any:
    """A guarded client's answer to this reply."""
    import httpx

    def behave(call: Call) -> None:
        call.reply(body, **headers)  # type: ignore[arg-type]

    with FaultServer(behave) as server, httpx.Client(follow_redirects=True) as client:
        guard(client)
        return client.get(server.url)


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "gzip"), (zlib.compress, "deflate")])
def test_packed_replies_are_unpacked(pack: Callable[[bytes], bytes], name: str) -> None:
    assert replied(pack(b"hello"), content_encoding=name).text == "hello"
    assert replied(b"hello").text == "hello"


def test_a_reply_may_not_burst_whether_packed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    monkeypatch.setattr(_http, "LARGEST", 1000)
    assert len(replied(b" " * 1000).content) == 1000
    for body, headers in ((b" " * 1001, {}), (gzip.compress(b" " * 10**6), {"content_encoding": "gzip"})):
        with pytest.raises(httpx.DecodingError, match="larger than 1000"):
            replied(body, **headers)


def test_a_guarded_client_follows_nobody() -> None:
    with FaultServer() as other:
        assert replied(b"", status="302 Found", location=other.url).status_code == 302
        assert not other.requests


def test_a_sync_call_ends_at_its_deadline_though_each_read_is_quick() -> None:
    import httpx

    def drip(call: Call) -> None:
        call.send(b"HTTP/1.1 200 OK\r\nx: ")
        call.drip(b"a", gap_s=0.01)

    with FaultServer(drip) as server, httpx.Client() as client:
        guard(client)
        started = time.monotonic()
        with pytest.raises((TimeoutError, httpx.TimeoutException)):
            Clock(0.2).run(lambda: client.get(server.url))
        assert time.monotonic() - started < 0.6


# One flight a prefix.


def request(*texts: str, marks: tuple[int, ...] = (1,), lifetime: str | None = None) -> Request:
    """A message a text; the ends of the prefixes are marked."""
    messages = tuple(Message(role="user", content=text * 40) for text in texts)
    plan = CachePlan(marks=tuple(Mark(messages=end, lifetime=lifetime) for end in marks))
    return Request(segments=(Segment(name="turn", messages=messages, stable=False),), cache=plan)


def waits(flights: Any, second: Request, *, limit_s: float = 0.2) -> bool:
    """Whether this request has to wait now, as seen within ``limit_s``."""
    passed = threading.Event()

    def fly() -> None:
        with flights.alone(second, Clock(10)):
            passed.set()

    thread = threading.Thread(target=fly)
    thread.start()
    waited = not passed.wait(limit_s)
    if not waited:
        thread.join()
    return waited


def passes(flights: Any, second: Request) -> bool:
    """Whether this request may go at once."""
    return not waits(flights, second, limit_s=5)


def test_a_second_call_of_a_prefix_in_flight_waits_and_others_do_not() -> None:
    flights = Flights(RULES)
    with flights.alone(request("system", "one"), Clock(10)):
        assert passes(flights, request("another", "one"))
        assert waits(flights, request("system", "two"))
    assert passes(flights, request("system", "three"))  # sent lately: it is in the cache


def test_any_shared_prefix_is_waited_for() -> None:
    flights = Flights(RULES)
    with flights.alone(request("system", "one", marks=(1, 2)), Clock(10)):
        assert waits(flights, request("system", "two", marks=(1, 2)))


def test_a_prefix_below_the_minimum_is_not_waited_for() -> None:
    import dataclasses

    flights = Flights(dataclasses.replace(RULES, minimum=4000))
    with flights.alone(request("system"), Clock(10)):
        assert passes(flights, request("system"))


def test_where_writing_is_free_or_nothing_is_marked_nobody_waits() -> None:
    for rules, marks in ((FREE, (1,)), (None, (1,)), (RULES, ())):
        flights = Flights(rules)
        with flights.alone(request("system", marks=marks), Clock(10)):
            assert passes(flights, request("system", marks=marks))


def test_the_next_one_goes_after_a_failure_and_after_the_lifetime(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(_single_flight, "time", SimpleNamespace(monotonic=lambda: now))
    flights = Flights(RULES)
    with pytest.raises(RuntimeError), flights.alone(request("system"), Clock(10)):
        raise RuntimeError
    with flights.alone(request("system"), Clock(10)):
        assert flights._flying  # the failed call filled nothing: this one writes
    with flights.alone(request("system"), Clock(10)):
        assert not flights._flying
    now += 301
    with flights.alone(request("system", lifetime="1h"), Clock(10)):
        assert flights._flying
    now += 3599
    with flights.alone(request("system"), Clock(10)):
        assert not flights._flying
    assert len(flights._sent) == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nobody_waits_longer_than_half_of_what_is_left(asynchronous: bool) -> None:
    flights = Flights(RULES)

    async def patient() -> None:
        async with flights.aalone(request("system"), Clock(0.4)):
            pass

    with flights.alone(request("system"), Clock(60)):
        started = time.monotonic()
        if asynchronous:
            asyncio.run(patient())
        else:
            with flights.alone(request("system"), Clock(0.4)):
                pass
        assert 0.15 < time.monotonic() - started < 0.5


def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    flights = Flights(RULES)

    async def cancelled() -> None:
        async def fly() -> None:
            async with flights.aalone(request("system"), Clock(60)):
                pass

        with flights.alone(request("system"), Clock(60)):
            task = asyncio.create_task(fly())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancelled())
    assert not flights._flying
    assert passes(flights, request("system"))


def test_a_forked_child_does_not_wait_for_its_parents_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    flights = Flights(RULES)
    with flights.alone(request("system"), Clock(60)), monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: -1)
        assert passes(flights, request("system"))


def test_only_so_many_prefixes_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_single_flight, "REMEMBERED", 5)
    flights = Flights(RULES)
    for number in range(20):
        with flights.alone(request(f"s{number}"), Clock(10)):
            pass
    assert len(flights._sent) == 5
