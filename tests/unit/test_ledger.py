"""The ledger: every use is written down, summed by scope, priced where a price is known, and holds no text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agentmem.database import Database
from agentmem.ledger.accounts import Accounts
from agentmem.ledger.uses import Ledger
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
    [chat, train] = Accounts(ledger, Scope(user="ana")).lines()
    assert (chat.verb, chat.uses, chat.input_tokens, chat.cached_tokens, chat.seconds) == ("chat", 2, 200, 120, 2.0)
    assert (train.verb, train.uses, train.first_token_s) == ("train", 1, None)
    assert Accounts(ledger, Scope()).lines()[0].uses == 3
    assert Accounts(ledger, Scope(user="eve")).lines() == []


def test_a_missed_cache_is_counted_with_its_reason(ledger: Ledger) -> None:
    ledger.note(
        "chat", "a:b", Scope(), Usage(), cache=CacheUse(expected_tokens=512, reason="the prompt's prefix changed")
    )
    ledger.note("chat", "a:b", Scope(), Usage(), cache=CacheUse())
    assert Accounts(ledger, Scope()).lines()[0].missed == 1


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
