"""The ledger: every use is written down, summed by scope, priced where a price is known, and holds no text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agentmem.database import Database
from agentmem.ledger import Ledger, Report, price
from agentmem.testing import FakeClock
from agentmem.types import CacheUse, Scope, Usage


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def ledger(tmp_path: Path, clock: FakeClock) -> Iterator[Ledger]:
    database = Database(tmp_path / "memory.db")
    yield Ledger(database, clock)
    database.close()


def test_uses_are_summed_by_verb_and_model_within_a_scope(ledger: Ledger) -> None:
    used = Usage(input_tokens=100, cached_tokens=60, written_tokens=20, output_tokens=5, first_token_s=0.5, total_s=1.0)
    for user in ("ana", "ana", "ben"):
        ledger.note("chat", "local:small", Scope(user=user, session="s"), used)
    ledger.note("train", "local:small", Scope(user="ana"), Usage(total_s=9.0), size=1000)
    [chat, train] = ledger.lines(Scope(user="ana"))
    assert (chat.verb, chat.uses, chat.input_tokens, chat.cached_tokens, chat.seconds) == ("chat", 2, 200, 120, 2.0)
    assert (train.verb, train.uses, train.first_token_s) == ("train", 1, None)
    assert ledger.lines(Scope())[0].uses == 3
    assert ledger.lines(Scope(user="eve")) == []


def test_a_missed_cache_is_counted_with_its_reason(ledger: Ledger) -> None:
    ledger.note(
        "chat", "a:b", Scope(), Usage(), cache=CacheUse(expected_tokens=512, reason="the prompt's prefix changed")
    )
    ledger.note("chat", "a:b", Scope(), Usage(), cache=CacheUse())
    assert ledger.lines(Scope())[0].missed == 1


def test_money_is_the_price_tables_to_the_cent() -> None:
    # Claude Sonnet 4.5, per million: input 3, cache read 0.30, cache write 3.75, output 15 dollars.
    used = Usage(input_tokens=100_000, cached_tokens=80_000, written_tokens=10_000, output_tokens=1_000)
    found = price("anthropic:claude-sonnet-4-5", used)
    assert found is not None
    assert found[0] == pytest.approx(0.03 + 0.024 + 0.0375 + 0.015, abs=1e-9)
    assert found[1] == pytest.approx(0.3 + 0.015, abs=1e-9)


@pytest.mark.parametrize("model", ["local:smollm2", "ollama:llama3.2", "scripted:test", "openai:no-such-model", ""])
def test_an_unknown_price_is_none_and_not_zero(model: str) -> None:
    assert price(model, Usage(input_tokens=10)) is None


def test_the_report_adds_up_and_shows_itself(ledger: Ledger) -> None:
    ledger.note(
        "chat", "anthropic:claude-sonnet-4-5", Scope(), Usage(input_tokens=1000, cached_tokens=900, output_tokens=10)
    )
    report = Report(lines=ledger.lines(Scope()), bytes={"records": 2048}, records=1, pages=0, loras=0)
    assert report.cached_share == 0.9
    text = str(report)
    assert "anthropic:claude-sonnet-4-5" in text
    assert "2.0 KiB" in text
    assert report.lines[0].saved_money is not None
    assert report.lines[0].saved_money > 0


def test_hosts_are_named_until_their_caches_run_out(ledger: Ledger, clock: FakeClock) -> None:
    ledger.note_shown("openai:m", ["r1", "r2"], 600.0)
    ledger.note("chat", "local:m", Scope(), Usage(), shown=["r1"])
    clock.advance(60)
    ledger.note_shown("openai:m", ["r1"], 600.0)
    [sentence] = ledger.may_hold(["r1"])
    assert "openai:m" in sentence
    assert "22:24 UTC" in sentence  # 2023-11-14 22:13:20, and 60 s, and ten minutes
    assert ledger.times_shown(["r1", "r2", "r3"]) == {"r1": 3, "r2": 1}
    assert ledger.times_shown(["r2"]) == {"r2": 1}
