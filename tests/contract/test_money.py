"""Money through the door: what hosts charge by their rules is what the report says, and a spent budget asks nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage as Used
from genai_prices import calc_price

from agentmem import AsyncMemory, Memory
from agentmem.activation.store import PageEntry
from agentmem.errors import BudgetExceeded, ConfigError, InvalidInput
from agentmem.provider import Capabilities
from agentmem.testing import FakeClock, HostServer, ScriptedProvider
from agentmem.types import Scope, Usage

SYSTEM = "You help people to remember what they did, and to plan what they want to do. " * 150
MODELS = ["anthropic:claude-sonnet-5-5", "openai:gpt-6-sol", "openai:gpt-4.1"]


@pytest.fixture
def clock() -> FakeClock:
    clock = FakeClock()
    clock.advance(1_795_000_000 - clock())  # in November 2026, when these models are sold
    return clock


@pytest.fixture
def host(clock: FakeClock) -> Iterator[HostServer]:
    with HostServer(clock=clock) as host:
        yield host


def opened(host: HostServer, model: str, clock: FakeClock, path: Path | str = ":memory:", **settings: Any) -> Memory:
    return Memory(path, **_how(host, model, clock), **settings)


def _how(host: HostServer, model: str, clock: FakeClock) -> dict[str, Any]:
    providers = {
        "anthropic": {"base_url": host.anthropic_url, "api_key": "k"},
        "openai": {"base_url": host.openai_url, "api_key": "k"},
    }
    return {"model": model, "embedder": "none", "system": SYSTEM, "clock": clock, "providers": providers}


def charged(host: HostServer, model: str) -> float:
    """What genai-prices says of the usage that the host itself counted."""
    vendor, _, name = model.partition(":")
    total = 0.0
    for request in host.requests:
        usage = request.usage
        counts = Used(
            input_tokens=usage.input_tokens,
            cache_read_tokens=usage.cached_tokens,
            cache_write_tokens=usage.written_tokens,
            cache_write_1h_tokens=usage.written_long_tokens,
            output_tokens=usage.output_tokens,
        )
        total += float(calc_price(counts, name, provider_id=vendor).total_price)
    return total


@pytest.mark.parametrize("model", MODELS)
def test_the_report_is_what_the_host_charged_to_the_cent(host: HostServer, model: str, clock: FakeClock) -> None:
    with opened(host, model, clock) as mem:
        for number in range(5):
            mem.scope(user="ana", session="s").chat(f"Message {number}: what was it that I wanted to do?")
            clock.advance(30)
        mem.scope(user="ben", session="t").chat("Hello, what do you know of me?")
        report, spent = mem.report(), mem.spent()
        assert report.money == pytest.approx(charged(host, model), abs=1e-9)
        assert spent.day == spent.month == spent.ever == pytest.approx(report.money)
        assert report.saved_money is not None
        assert report.saved_money > 0
        assert {share.name for share in report.scopes} == {"user='ana'", "user='ben'"}
        mine = mem.scope(user="ana").report()
        assert sum(line.uses for line in mine.lines) == 5
        assert mine.money == pytest.approx(mem.scope(user="ana").spent().ever)
        assert {"no memory", "full history", "no cache"} <= {one.policy for one in report.compared}
        assert report.html().count("<svg") >= 4


def test_a_spent_budget_asks_nobody_and_keeps_what_is_there(host: HostServer, clock: FakeClock, tmp_path: Path) -> None:
    with opened(host, MODELS[0], clock, tmp_path) as mem:
        ana = mem.scope(user="ana", session="s")
        ana.chat("I like hazelnuts.")
        budget = mem.scope(user="ana").budget(0.000001)
        assert budget is not None
        assert budget.left == 0.0
        sent, held = len(host.requests), len(ana.list())
        for stream in (False, True):
            with pytest.raises(BudgetExceeded, match="user='ana'"):
                "".join(map(str, ana.chat("And what else?", stream=stream)))
        assert (len(host.requests), len(ana.list())) == (sent, held)
        mem.scope(user="ben").chat("Hello")
        clock.advance(86_400)
        ana.chat("Good morning.")
    with opened(host, MODELS[0], clock, tmp_path) as mem:  # and so in the next process
        with pytest.raises(BudgetExceeded):
            mem.scope(user="ana").chat("Hello?")
        mem.scope(user="ana").budget(None)
        mem.scope(user="ana").chat("Hello!")


def test_the_setting_stops_the_whole_folder(host: HostServer, clock: FakeClock) -> None:
    with opened(host, MODELS[1], clock, day_budget=0.001) as mem:
        mem.scope(user="ana").chat("Hello")
        with pytest.raises(BudgetExceeded, match=r"\(root\)"):
            mem.scope(user="ben").chat("Hello")


def test_it_is_the_same_under_asyncio(host: HostServer, clock: FakeClock) -> None:
    async def talk() -> None:
        async with AsyncMemory(":memory:", **_how(host, MODELS[0], clock)) as mem:
            ana = mem.scope(user="ana")
            await ana.chat("Hello")
            assert (await mem.report()).money == pytest.approx(charged(host, MODELS[0]))
            assert (await ana.budget(0.0, per="month")) is not None
            with pytest.raises(BudgetExceeded):
                await ana.chat("Hello")
            assert [budget.per for budget in (await ana.spent()).budgets] == ["month"]

    asyncio.run(talk())


def test_this_machine_costs_what_the_user_says(clock: FakeClock) -> None:
    costs = {"watts": 1000.0, "kwh_price": 3600.0}  # a dollar a second
    with Memory(":memory:", model=ScriptedProvider(["Hi."]), embedder="none", clock=clock, costs=costs) as mem:
        reply = mem.chat("Hello")
        assert mem.report().money == pytest.approx(reply.usage.total_s)


def test_embedding_on_this_machine_costs_its_seconds_where_they_have_a_price(clock: FakeClock) -> None:
    for costs in ({}, {"watts": 1000.0, "kwh_price": 3600.0}):
        with Memory(":memory:", embedder="hash", clock=clock, costs=costs) as mem:
            mem.add(["I like hazelnuts.", "I live in Lisbon."])
            mem.search("Where do I live?")
            lines = mem.report().lines
            assert len(lines) == bool(costs)
            if costs:
                assert (lines[0].verb, lines[0].uses) == ("embed", 2)
                assert lines[0].money == pytest.approx(lines[0].seconds)


def test_bad_costs_and_bad_spans_are_refused(clock: FakeClock) -> None:
    with pytest.raises(ConfigError, match="kwh_price"):
        Memory(":memory:", embedder="none", costs={"watts": 5})
    with Memory(":memory:", embedder="none", clock=clock) as mem:
        bad: list[dict[str, Any]] = [
            {"since": "yesterday"},
            {"until": 5},
            {"since": "2026-02-01", "until": "2026-01-01"},
        ]
        for span in bad:
            with pytest.raises(InvalidInput):
                mem.report(**span)
        with pytest.raises(InvalidInput):
            mem.budget(-1)


def test_wrong_rules_are_refused_at_once_also_those_of_other_models() -> None:
    for rules in ({"openai:gpt-*": {"minimun": 3}}, {"gpt": {"minimum": 3}}, {"openai:gpt-*": {"minimum": -3}}):
        with pytest.raises(ConfigError, match="rules"):
            Memory(":memory:", embedder="none", rules=rules)
    Memory(":memory:", embedder="none", rules={"*:*": {"minimum": 3}}).close()


def test_what_priming_cost_is_no_saving(host: HostServer, clock: FakeClock) -> None:
    with opened(host, MODELS[0], clock) as mem:
        ana, ben = mem.scope(user="ana", session="s"), mem.scope(user="ben", session="s")
        for handle in (ana, ben):
            handle.activation.prime()
            handle.chat("Hello, what do you know of me?")
        for report in (mem.report(), ana.report()):
            assert report.compared[0].spent == pytest.approx(report.money)
        ana.activation.prime()  # for a request that has not come
        assert ana.report().compared[0].spent < (ana.report().money or 0.0)


def test_a_budget_stops_priming_and_extracting_too(host: HostServer, clock: FakeClock) -> None:
    with opened(host, MODELS[0], clock) as mem:
        ana = mem.scope(user="ana", session="s")
        ana.chat("I moved to Lisbon last week.")
        mem.budget(0.0, per="ever")
        sent = len(host.requests)
        for spend in (ana.activation.prime, ana.plaintext.extract):
            with pytest.raises(BudgetExceeded):
                spend()
        assert len(host.requests) == sent


def test_pages_pay_by_the_seconds_that_they_spare(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = ScriptedProvider(["Hi."])
    provider.capabilities = Capabilities(chat=True, kv="tensors")
    keys = ["aa" * 16, "bb" * 16, "cc" * 16]
    pages = [
        PageEntry(
            key=key,
            parent=parent,
            identity="00",
            number=number,
            tokens=256,
            bytes=500_000_000,
            codec="raw",
            created=clock() - 86_400 * 365.2425 / 12,
            used=clock(),
            uses=uses,
            pinned=False,
            records=(),
        )
        for key, parent, number, uses in (
            *((keys[0], "00" * 16, 0, 3), (keys[1], keys[0], 1, 1)),
            (keys[2], "00" * 16, 0, 0),
        )
    ]
    monkeypatch.setattr("agentmem.reporting.entries", lambda *_: pages)
    with Memory(":memory:", model=provider, embedder="none", clock=clock, costs={"gb_month_price": 0.5}) as mem:
        used = Usage(input_tokens=1000, first_token_s=2.0, total_s=3.0)
        mem._engine.ledger.note("chat", provider.name, Scope(), used, here=True)
        first, second = mem.report().prefixes
    assert (first.name, first.tokens, first.read_tokens, first.unit) == (
        "2 KV pages, aaaaaaaaaaaa",
        512,
        1024,
        "seconds",
    )
    assert (first.cost, first.gained, first.money) == pytest.approx((1.024, 2.048, 0.5))
    assert first.paid
    assert not second.paid
