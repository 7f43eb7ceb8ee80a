"""The ledger's sums: by verb, provider, day, scope and kind, against other policies, and whether prefixes paid."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentmem.activation.turns import Turn
from agentmem.cache_rules import rules_for
from agentmem.database import Database
from agentmem.ledger.accounts import REPLAYED, Accounts
from agentmem.ledger.uses import TURNS_KEPT, Ledger
from agentmem.testing import FakeClock
from agentmem.types import CacheUse, Scope, Usage

HOSTED = "anthropic:claude-sonnet-5-5"  # per million: input 2, read 0.10, write 2.50, an hour's 4, output 10 dollars
LOCAL = "local:small"
ANA, BEN = Scope(user="ana"), Scope(user="ben")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "memory.db")
    yield database
    database.close()


@pytest.fixture
def ledger(database: Database, clock: FakeClock) -> Ledger:
    return Ledger(database, clock, costs={"watts": 100, "kwh_price": 0.36}, rules=rules_for)


def turn(number: int, clock: FakeClock, *, session: str = "s") -> Turn:
    recalled = ((f"r{number}", 30), ("r", 10))
    return Turn(
        id=f"t{number}",
        at=clock(),
        session=session,
        system=1500,
        core=200,
        message=40,
        reply=60,
        recalled=recalled,
    )


def test_the_same_uses_are_told_by_provider_day_and_scope(ledger: Ledger, clock: FakeClock) -> None:
    used = Usage(input_tokens=1000, cached_tokens=600, output_tokens=10)
    ledger.note("chat", HOSTED, ANA, used)
    ledger.note("chat", "openai:gpt-6-sol", BEN, used)
    clock.advance(86_400)
    ledger.note("chat", HOSTED, ANA, used)
    ledger.note("embed", "unknown:m", Scope(), used)
    accounts = Accounts(ledger, Scope())
    assert [(share.name, share.uses) for share in accounts.providers()] == [
        ("anthropic", 2),
        ("openai", 1),
        ("unknown", 1),
    ]
    assert [(share.name, share.uses) for share in accounts.days()] == [("2023-11-14", 2), ("2023-11-15", 2)]
    assert {share.name: share.uses for share in accounts.scopes()} == {"user='ana'": 2, "user='ben'": 1, "no user": 1}
    assert [share.unpriced for share in accounts.providers()] == [0, 0, 1]


def test_a_handle_sees_its_own_uses_only(ledger: Ledger) -> None:
    ledger.note("chat", HOSTED, Scope(user="ana", session="a"), Usage(input_tokens=1), cache=CacheUse(reason="mine"))
    ledger.note("chat", HOSTED, BEN, Usage(input_tokens=10), cache=CacheUse(reason="theirs"))
    accounts = Accounts(ledger, ANA)
    assert sum(line.input_tokens for line in accounts.lines()) == 1
    assert [share.name for share in accounts.scopes()] == ["session='a'"]
    assert [miss.reason for miss in accounts.misses()] == ["mine"]
    assert Accounts(ledger, Scope(user="eve")).lines() == []


def test_a_span_of_time_holds_its_first_moment_and_not_its_last(ledger: Ledger, clock: FakeClock) -> None:
    begun = clock()
    for _ in range(3):
        ledger.note("chat", HOSTED, ANA, Usage(input_tokens=1))
        clock.advance(10)
    accounts = Accounts(ledger, Scope(), since=begun + 10, until=begun + 20)
    assert [line.uses for line in accounts.lines()] == [1]


def test_many_scopes_are_summed_at_the_end(ledger: Ledger) -> None:
    for number in range(60):
        ledger.note("chat", HOSTED, Scope(user=f"u{number:02}"), Usage(input_tokens=100 + number))
    shares = Accounts(ledger, Scope()).scopes()
    assert len(shares) == 51
    assert (shares[0].name, shares[-1].name, shares[-1].uses) == ("user='u59'", "10 more", 10)
    assert sum(share.input_tokens for share in shares) == sum(range(100, 160))


def test_reasons_are_counted_with_the_tokens_they_cost(ledger: Ledger) -> None:
    for cached in (0, 400):
        cache = CacheUse(expected_tokens=1000, cached_tokens=cached, reason="tools_changed")
        ledger.note("chat", HOSTED, ANA, Usage(input_tokens=2000, cached_tokens=cached), cache=cache)
    ledger.note("chat", HOSTED, ANA, Usage(), cache=CacheUse(reason="the prompt's prefix changed"))
    [first, second] = Accounts(ledger, Scope()).misses()
    assert (first.reason, first.uses, first.tokens) == ("tools_changed", 2, 1600)
    assert second.tokens == 0


def test_cached_tokens_of_a_local_model_save_the_time_that_computing_takes(ledger: Ledger) -> None:
    cold = Usage(input_tokens=1000, output_tokens=5, first_token_s=2.0, total_s=3.0)
    warm = Usage(input_tokens=1000, cached_tokens=900, output_tokens=5, first_token_s=0.3, total_s=1.0)
    for used in (cold, warm):
        ledger.note("chat", LOCAL, ANA, used, here=True)
    [line] = Accounts(ledger, Scope()).lines()
    second = 100 / 1000 * 0.36 / 3600
    assert line.money == pytest.approx(4.0 * second)
    assert line.saved_seconds == pytest.approx(900 * 0.002)
    assert line.saved_money == pytest.approx(1.8 * second)
    assert line.unpriced == 0


def test_without_costs_a_local_model_has_no_money_but_saves_time(database: Database, clock: FakeClock) -> None:
    ledger = Ledger(database, clock)
    ledger.note("chat", LOCAL, ANA, Usage(input_tokens=100, first_token_s=1.0, total_s=2.0), here=True)
    ledger.note("chat", LOCAL, ANA, Usage(input_tokens=100, cached_tokens=90, first_token_s=0.1), here=True)
    [line] = Accounts(ledger, Scope()).lines()
    assert (line.money, line.saved_money, line.unpriced) == (None, None, 2)
    assert line.saved_seconds == pytest.approx(0.9)


def test_a_price_beats_the_machines_own_cost(ledger: Ledger) -> None:
    # A gateway on this machine may sell a vendor's model.
    assert ledger.money(HOSTED, Usage(input_tokens=1_000_000, total_s=9.0), here=True) == (2.0, 2.0)
    assert ledger.money("openai:unheard-of", Usage(input_tokens=9, total_s=9.0)) is None


def test_a_written_prefix_has_paid_once_it_was_read_often_enough(ledger: Ledger) -> None:
    write = Usage(input_tokens=1100, written_tokens=1000, output_tokens=1)
    ledger.note("chat", HOSTED, ANA, write)
    [prefix] = Accounts(ledger, Scope()).prefixes()
    assert prefix.reads_needed == pytest.approx(0.25 / 0.95)
    assert (prefix.name, prefix.tokens, prefix.paid) == ("user='ana'", 1000, False)
    assert prefix.money == pytest.approx(250 * 2e-6)
    ledger.note("chat", HOSTED, ANA, Usage(input_tokens=1100, cached_tokens=1000))
    [prefix] = Accounts(ledger, Scope()).prefixes()
    assert prefix.paid
    assert prefix.gained == pytest.approx(950)


def test_an_hours_writes_take_more_reads(ledger: Ledger) -> None:
    ledger.note("chat", HOSTED, ANA, Usage(input_tokens=100, written_tokens=100, written_long_tokens=100))
    [prefix] = Accounts(ledger, Scope()).prefixes()
    assert prefix.reads_needed == pytest.approx(1.0 / 0.95)


def test_kinds_tell_what_was_carried_cached_and_learnt(ledger: Ledger, clock: FakeClock) -> None:
    used = Usage(input_tokens=2000, cached_tokens=1500, written_tokens=300, output_tokens=10)
    for number in range(2):
        ledger.note("chat", HOSTED, ANA, used, turn=turn(number, clock))
    ledger.note("embed", "openai:text-embedding-3-small", ANA, Usage(input_tokens=1_000_000))
    ledger.note("train", LOCAL, ANA, Usage(total_s=36.0), size=1000, here=True)
    plain, active, learnt = Accounts(ledger, Scope()).kinds({"plaintext": 1, "activation": 2, "parametric": 3})
    assert (plain.uses, plain.tokens, plain.bytes) == (2, 2 * (40 + 200), 1)
    assert plain.money == pytest.approx(0.02 + 2 * (40 + 200 * 0.05) * 2e-6)
    assert (active.uses, active.tokens, active.bytes) == (2, 3000, 2)
    assert active.money == pytest.approx(600 * 0.25 * 2e-6)
    assert active.saved_money == pytest.approx(2 * (1500 * 0.95 - 300 * 0.25) * 2e-6)
    assert (learnt.uses, learnt.seconds) == (1, 36.0)
    assert learnt.money == pytest.approx(36 * 1e-5)


def test_turns_come_back_oldest_first_by_scope_and_model(ledger: Ledger, clock: FakeClock) -> None:
    turns = [turn(number, clock) for number in range(5)]
    for one in turns:
        ledger.note("chat", HOSTED, Scope(user="ana", session="s"), Usage(), turn=one)
    ledger.note("chat", HOSTED, BEN, Usage(), turn=turn(7, clock))
    ledger.note("chat", LOCAL, ANA, Usage(), turn=turn(8, clock))
    assert ledger.turns(ANA, HOSTED, 3) == turns[2:]
    assert ledger.turns(ANA, HOSTED, 100) == turns
    assert ledger.turns(Scope(user="eve"), HOSTED, 100) == []


def test_old_turns_go_and_their_sums_stay(ledger: Ledger, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TURNS_KEPT > REPLAYED
    monkeypatch.setattr("agentmem.ledger.uses.TURNS_KEPT", 3)
    for number in range(8):
        ledger.note("chat", HOSTED, ANA, Usage(input_tokens=1), turn=turn(number, clock))
    assert [one.id for one in ledger.turns(ANA, HOSTED, 100)] == ["t5", "t6", "t7"]
    assert Accounts(ledger, ANA).lines()[0].uses == 8


def test_other_policies_are_priced_by_the_hosts_rules(ledger: Ledger, clock: FakeClock) -> None:
    spent = 0.0
    for number in range(40):
        first = number % 20 == 0
        used = Usage(input_tokens=2000, cached_tokens=0 if first else 1700, written_tokens=1700 * first)
        ledger.note("chat", HOSTED, ANA, used, turn=turn(number, clock, session=f"s{number // 20}"))
        spent += (ledger.money(HOSTED, used) or (0.0, 0.0))[0]
        clock.advance(30 if (number + 1) % 20 else 86_400)
    compared = {one.policy: one for one in Accounts(ledger, Scope()).compared()}
    assert {"no memory", "full history", "no cache"} <= compared.keys()
    assert "planned" not in compared
    assert all(one.requests == 40 and one.spent == pytest.approx(spent) for one in compared.values())
    assert compared["no cache"].money == pytest.approx(40 * 2000 * 2e-6)
    assert compared["no cache"].saved > 0
    # The second session's every request reads the first one: 20 turns of 100 tokens more.
    assert compared["full history"].money > compared["no memory"].money


def test_full_history_counts_what_was_said_before_what_is_replayed(
    ledger: Ledger, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentmem.ledger.accounts.AT_ONCE", 5)
    for number in range(5):
        ledger.note("chat", HOSTED, ANA, Usage(input_tokens=2000), turn=turn(number, clock))
    young = {one.policy: one.money for one in Accounts(ledger, Scope()).compared()}
    for number in range(5, 405):
        ledger.note("chat", HOSTED, ANA, Usage(input_tokens=2000), turn=turn(number, clock))
    old = {one.policy: one.money for one in Accounts(ledger, Scope()).compared()}
    # 40,000 tokens of earlier turns, read five times and written once at most.
    assert 4 * 40_000 * 0.05 < (old["full history"] - young["full history"]) / 2e-6 < 1.6 * 40_000
    assert old["no memory"] == pytest.approx(young["no memory"], rel=0.2)


def test_a_turn_that_cannot_be_read_spoils_no_sum(ledger: Ledger, database: Database, clock: FakeClock) -> None:
    for number in range(3):
        ledger.note("chat", HOSTED, ANA, Usage(input_tokens=2000), turn=turn(number, clock))
    with database.write() as connection:
        connection.execute("UPDATE uses SET turn = '{\"id\": 5}' WHERE id = 2")
    assert [one.id for one in ledger.turns(ANA, HOSTED, 9)] == ["t0", "t2"]
    accounts = Accounts(ledger, Scope())
    assert accounts.compared() == []
    assert accounts.lines()[0].uses == 3


@pytest.mark.parametrize("model", [LOCAL, "openai:unheard-of"])
def test_what_has_no_price_is_not_compared(ledger: Ledger, clock: FakeClock, model: str) -> None:
    ledger.note("chat", model, ANA, Usage(input_tokens=9, total_s=1.0), turn=turn(0, clock), here=True)
    assert Accounts(ledger, Scope()).compared() == []


@pytest.mark.slow
def test_a_hundred_thousand_uses_are_summed(ledger: Ledger, database: Database, clock: FakeClock) -> None:
    now = clock()
    written = turn(0, clock).model_dump_json()
    with database.write() as connection:
        connection.executemany(
            "INSERT INTO uses (at, verb, model, tenant, user, agent, session, input, cached, written, output, total_s,"
            " bytes, expected, reason, money, uncached_money, turn)"
            " VALUES (?, 'chat', ?, '', ?, '', ?, 2000, 1500, 100, 50, 1.0, 0, 1500, ?, 0.002, 0.005, ?)",
            [
                (
                    *(now - 60 * (100_000 - number), HOSTED, f"u{number % 300}", f"s{number // 20}"),
                    *("input_changed" if number % 7 == 0 else None, written if number >= 80_000 else None),
                )
                for number in range(100_000)
            ],
        )
    accounts = Accounts(ledger, Scope())
    begun = time.process_time()
    lines, compared = accounts.lines(), accounts.compared()
    kinds, shares = accounts.kinds({}, compared), [accounts.days(), accounts.scopes(), accounts.providers()]
    rest = [accounts.prefixes(), accounts.misses()]
    took = time.process_time() - begun
    assert lines[0].uses == 100_000
    assert all([*kinds, *shares, *rest])
    assert took < 20  # seconds of CPU; about 1.4 here: fails only where a sum grows with the square of the uses
