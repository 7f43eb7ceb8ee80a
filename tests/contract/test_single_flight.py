"""Parallel first calls of one prefix pay one write: the real SDKs at a host whose entries can be read late."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from agentmem.provider import CachePlan, Mark, Request, load
from agentmem.testing import HostServer
from agentmem.types import Message, Segment

#: About 1,500 tokens.
LONG = "word " * 1500
CLAUDE, GPT, OLDER = "claude-opus-5-5", "gpt-6.1-sol", "gpt-4o"


def planned(text: str) -> Request:
    """A request whose system part is marked."""
    system = Segment(name="system", messages=(Message(role="system", content=LONG),), stable=True)
    turn = Segment(name="turn", messages=(Message(role="user", content=text),), stable=False)
    return Request(segments=(system, turn), cache=CachePlan(marks=(Mark(messages=1),)), cache_key="k")


def provider_at(host: HostServer, scheme: str, **settings: Any) -> Any:
    if scheme == "anthropic":
        return load(f"anthropic:{CLAUDE}", {"api_key": "k", "base_url": host.anthropic_url, **settings})
    return load(f"openai:{GPT}", {"api_key": "k", "base_url": host.openai_url, "host": "openai", **settings})


@pytest.mark.parametrize("face", ["sync", "async", "streams", "async streams", "both"])
@pytest.mark.parametrize("scheme", ["anthropic", "openai"])
def test_parallel_first_calls_pay_one_write(scheme: str, face: str) -> None:
    count = 6
    with HostServer(delay_s=0.1) as host:
        provider = provider_at(host, scheme)

        async def whole(text: str) -> None:
            await provider.agenerate(planned(text))

        async def streamed(text: str) -> None:
            async for _ in provider.astream(planned(text)):
                pass

        async def together(work: Callable[[str], Any], number: int, *others: Any) -> None:
            try:
                await asyncio.gather(*(work(f"question {i}") for i in range(number)), *others)
            finally:
                await provider.aclose()

        def threads(number: int) -> None:
            def work(text: str) -> Any:
                request = planned(text)
                return list(provider.stream(request)) if face == "streams" else provider.generate(request)

            with ThreadPoolExecutor(number) as pool:
                list(pool.map(work, (f"thread {i}" for i in range(number))))

        async def both() -> None:
            await together(whole, count // 2, asyncio.to_thread(threads, count - count // 2))

        if face in ("sync", "streams"):
            threads(count)
        elif face == "both":
            asyncio.run(both())
        else:
            asyncio.run(together(streamed if face == "async streams" else whole, count))
        provider.close()
        usages = [request.usage for request in host.requests]
    assert len(usages) == count
    assert sorted(usage.written_tokens > 0 for usage in usages) == [False] * (count - 1) + [True]
    assert sum(usage.cached_tokens > 0 for usage in usages) == count - 1


def test_a_failed_first_call_lets_the_next_one_go_and_nobody_waits_past_a_deadline() -> None:
    failed = threading.Event()

    def reply(_: Any) -> str:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("down")
        return "Fine."

    with HostServer(reply=reply, delay_s=0.05) as host:
        provider = provider_at(host, "anthropic", max_retries=0)
        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(provider.generate, planned(str(i))) for i in range(3)]
            errors = [future.exception() for future in futures]
        provider.close()
    assert sum(error is not None for error in errors) == 1
    assert sum(request.usage.written_tokens > 0 for request in host.requests) == 1


def test_short_prefixes_and_free_writes_are_not_waited_for() -> None:
    small = Segment(name="system", messages=(Message(role="system", content="Be kind."),), stable=True)
    turn = Segment(name="turn", messages=(Message(role="user", content="Hi"),), stable=False)
    request = Request(segments=(small, turn), cache=CachePlan(marks=(Mark(messages=1),)))
    began = threading.Barrier(3, timeout=5)

    def reply(_: Any) -> str:
        began.wait()  # only passed if all three are here at once
        return "Fine."

    with HostServer(reply=reply) as host:
        provider = provider_at(host, "anthropic")
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: provider.generate(request), range(3)))
        provider.close()
        older = load(f"openai:{OLDER}", {"api_key": "k", "base_url": host.openai_url, "host": "openai"})
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda i: older.generate(planned(str(i))), range(3)))
        older.close()
