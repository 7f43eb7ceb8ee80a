"""The two drivers: the same flow, the same result; failures reach the flow; a cancelled task leaves nothing running."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from agentmem.errors import Unavailable
from agentmem.flow import Flow, arun, astream, local, run, stream, through


class Answering:
    """A need that answers with its own value, or raises it."""

    def __init__(self, value: object) -> None:
        self.value = value

    def answer(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    async def aanswer(self) -> Any:
        return self.answer()


def adding(*values: object) -> Flow[Any]:
    total: Any = 0
    for value in values:
        total += yield Answering(value)  # type: ignore[misc]
    return total


async def test_both_drivers_run_a_flow_to_its_result() -> None:
    assert run(adding(1, 2, 3)) == await arun(adding(1, 2, 3)) == 6


def recovering() -> Flow[str]:
    try:
        yield Answering(Unavailable("down"))  # type: ignore[misc]
    except Unavailable:
        return "recovered"
    return "answered"


async def test_a_failure_is_raised_inside_the_flow() -> None:
    assert run(recovering()) == await arun(recovering()) == "recovered"
    with pytest.raises(Unavailable):
        run(adding(Unavailable("down")))
    with pytest.raises(Unavailable):
        await arun(adding(Unavailable("down")))


async def test_local_work_leaves_the_event_loop_free() -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    ticker = asyncio.create_task(tick())
    await arun(local(time.sleep, 0.2))
    ticker.cancel()
    assert ticks > 5


async def test_cancelling_waits_for_the_local_step_to_end() -> None:
    started, finished = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        time.sleep(0.2)
        finished.set()

    task = asyncio.create_task(arun(local(work)))
    await asyncio.to_thread(started.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert finished.is_set()


def closing(log: list[str]) -> Flow[None]:
    try:
        yield Answering(1)  # type: ignore[misc]
        yield Answering(2)  # type: ignore[misc]
    finally:
        log.append("closed")


async def test_an_abandoned_flow_is_closed() -> None:
    log: list[str] = []
    flow = closing(log)
    next(flow)
    pieces: Iterator[str] = stream(flow)
    del pieces, flow
    asynchronous = astream(closing(log), lambda _: None)
    await asynchronous.aclose()
    assert "closed" in log


def test_a_flow_goes_through_a_change_of_its_needs() -> None:
    def doubled(need: Any) -> Any:
        return Answering(need.value if isinstance(need.value, Exception) else 2 * need.value)

    assert run(through(adding(1, 2, 3), doubled)) == 12
    assert run(through(recovering(), doubled)) == "recovered"
    assert run(through(local(lambda: 3), doubled)) == 3
    ended = []

    def giving_up() -> Flow[Any]:
        try:
            yield Answering(1)  # type: ignore[misc]
            yield Answering(2)  # type: ignore[misc]
        finally:
            ended.append(True)

    def refused(need: Any) -> Any:
        if need.value == 2:
            raise Unavailable("somebody chats")
        return need

    with pytest.raises(Unavailable):
        run(through(giving_up(), refused))
    assert ended == [True]
