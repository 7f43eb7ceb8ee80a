"""An expected cache hit that did not come is told in the host's own words, in the reply, the ledger and the report."""

from __future__ import annotations

from typing import Any

import pytest

from agentmem import Memory
from agentmem.testing import FakeClock, HostServer

LONG = "We walked from the harbour to the old town and had lunch there. " * 300
CHANGED = [
    ("anthropic:claude-sonnet-5-5", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "messages_changed"),
    ("openai:gpt-5.6-luna", {"reasoning_effort": "high"}, "reasoning_effort_changed"),
]


@pytest.mark.parametrize(("model", "change", "reason"), CHANGED)
def test_the_hosts_reason_reaches_the_reply_and_the_report(model: str, change: dict[str, Any], reason: str) -> None:
    clock = FakeClock(1_795_000_000.0)
    with HostServer(clock=clock) as host:
        providers = {
            "anthropic": {"base_url": host.anthropic_url, "api_key": "k"},
            "openai": {"base_url": host.openai_url, "api_key": "k", "host": "openai"},
        }
        with Memory(":memory:", model=model, embedder="none", providers=providers, clock=clock) as memory:
            handle = memory.scope(user="ana", session="s")
            for text in (LONG, "And then?"):
                reply = handle.chat(text)
                assert reply.cache.reason is None
                clock.advance(10)
            assert reply.cache.cached_tokens > 3000
            missed = handle.chat("What did we do in the end?", **change)
            assert missed.cache.expected_tokens > 3000 > missed.cache.cached_tokens
            assert reason in (missed.cache.reason or "")
            assert host.requests[-1].miss == reason
            [told] = memory.report().misses
            assert reason in told.reason
            assert told.uses == 1
