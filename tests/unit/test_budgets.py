"""Budgets: what was spent is summed as it comes, from every process, and a spent budget stops or warns."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem.database import Database
from agentmem.errors import BudgetExceeded, InvalidInput
from agentmem.ledger.budgets import amount, begin, end
from agentmem.ledger.uses import Ledger
from agentmem.testing import FakeClock
from agentmem.types import Scope, Usage

ANA = Scope(user="ana")
NOON = dt.datetime(2026, 11, 30, 12, tzinfo=dt.UTC).timestamp()


def at(*moment: int) -> float:
    return dt.datetime(*moment, tzinfo=dt.UTC).timestamp()  # type: ignore[arg-type, misc]


@pytest.fixture
def clock() -> FakeClock:
    clock = FakeClock()
    clock.advance(NOON - clock())
    return clock


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "memory.db")
    yield database
    database.close()


@pytest.fixture
def ledger(database: Database, clock: FakeClock) -> Ledger:
    return Ledger(database, clock)


def spend(ledger: Ledger, scope: Scope, dollars: float) -> None:
    ledger.note("chat", "a:b", scope, Usage(), money=(dollars, dollars))


def test_a_spent_budget_stops_its_scope_and_no_other(ledger: Ledger, clock: FakeClock) -> None:
    ledger.budgets.set(ANA, 0.05)
    spend(ledger, Scope(user="ana", session="s"), 0.04)
    ledger.check(Scope(user="ana", session="t"), "a:b")
    spend(ledger, ANA, 0.02)
    with pytest.raises(BudgetExceeded) as raised:
        ledger.check(Scope(user="ana", session="t"), "a:b")
    for told in ("a:b", "user='ana'", "0.05", "0.06", "2026-12-01 00:00 UTC"):
        assert told in str(raised.value)
    assert (raised.value.limit, raised.value.frees_at) == (0.05, at(2026, 12, 1))
    assert raised.value.spent == pytest.approx(0.06)
    ledger.check(Scope(user="ben"), "a:b")
    ledger.check(Scope(), "a:b")
    clock.advance(43_200)
    ledger.check(ANA, "a:b")


def test_a_limit_below_a_cent_is_told_as_it_is(ledger: Ledger) -> None:
    budget = ledger.budgets.set(ANA, 0.0025)
    assert "of 0.0025 $ a day" in str(budget)
    spend(ledger, ANA, 0.003)
    with pytest.raises(BudgetExceeded, match=r"of 0\.0025 dollars a day"):
        ledger.check(ANA, "a:b")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"),
        (12345.678, "12,345.6780"),
        (0.00123456, "0.0012"),
        (0.0000421, "0.000042"),
        (-0.0000421, "-0.000042"),
    ],
)
def test_no_amount_is_told_as_nothing(value: float, text: str) -> None:
    assert amount(value) == text


def test_a_level_above_stops_what_lies_beneath(ledger: Ledger) -> None:
    ledger.budgets.set(Scope(tenant="acme"), 0.0)
    with pytest.raises(BudgetExceeded, match="tenant='acme'"):
        ledger.check(Scope(tenant="acme", user="ana"), "a:b")
    ledger.check(Scope(tenant="other", user="ana"), "a:b")


def test_the_setting_holds_for_the_whole_folder(database: Database, clock: FakeClock) -> None:
    ledger = Ledger(database, clock, day_budget=1.0)
    ledger.budgets.set(Scope(), 5.0)
    spend(ledger, ANA, 1.0)
    with pytest.raises(BudgetExceeded, match=r"\(root\)"):
        ledger.check(Scope(user="ben"), "a:b")


def test_a_warning_comes_once_a_day(ledger: Ledger, clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    ledger.budgets.set(ANA, 0.01, per="month", action="warn")
    spend(ledger, ANA, 0.02)
    with caplog.at_level(logging.WARNING, "agentmem"):
        for _ in range(3):
            ledger.check(ANA, "a:b")
        assert len(caplog.records) == 1
        clock.advance(43_200)  # another day, and another month: nothing is spent in it
        ledger.check(ANA, "a:b")
        spend(ledger, ANA, 0.02)
        ledger.check(ANA, "a:b")
    assert len(caplog.records) == 2
    assert "user='ana'" in caplog.text


def test_days_months_and_ever_are_summed_apart(ledger: Ledger, clock: FakeClock) -> None:
    sums = []
    for forward in (0, 43_200, 86_400):
        clock.advance(forward)
        spend(ledger, ANA, 1.0)
        sums.append([ledger.budgets.spent(ANA, per) for per in ("day", "month", "ever")])
    assert sums == [[1.0, 1.0, 1.0], [1.0, 1.0, 2.0], [1.0, 2.0, 3.0]]


def test_what_another_process_spends_is_seen(database: Database, clock: FakeClock, tmp_path: Path) -> None:
    mine = Ledger(database, clock)
    second = Database(tmp_path / "memory.db")
    try:
        theirs = Ledger(second, clock)
        mine.budgets.set(ANA, 0.10)
        spend(mine, ANA, 0.04)
        mine.check(ANA, "a:b")
        spend(theirs, Scope(user="ben"), 7.0)
        spend(theirs, ANA, 0.06)
        for ledger in (mine, theirs):
            with pytest.raises(BudgetExceeded):
                ledger.check(ANA, "a:b")
        theirs.budgets.set(ANA, None)
        mine.check(ANA, "a:b")
    finally:
        second.close()


def test_a_budget_is_replaced_and_removed(ledger: Ledger) -> None:
    ledger.budgets.set(ANA, 1.0, per="ever")
    ledger.budgets.set(ANA, 2.0, per="ever", action="warn")
    spend(ledger, ANA, 0.5)
    [budget] = ledger.budgets.applying(Scope(user="ana", session="s"))
    assert (budget.dollars, budget.action, budget.spent, budget.left) == (2.0, "warn", 0.5, 1.5)
    assert ledger.budgets.set(ANA, None, per="ever") is None
    assert ledger.budgets.applying(ANA) == []


def test_a_handle_is_told_its_own_budgets_and_those_beneath_it(database: Database, clock: FakeClock) -> None:
    ledger = Ledger(database, clock, day_budget=9.0)
    session = Scope(user="ana", session="s")
    for scope, dollars in ((Scope(), 5.0), (ANA, 2.0), (session, 1.0), (Scope(user="ben"), 3.0)):
        ledger.budgets.set(scope, dollars)
    spend(ledger, session, 0.5)
    told = {scope: ledger.budgets.listed(scope) for scope in (Scope(), ANA, session)}
    assert [[budget.dollars for budget in budgets] for budgets in told.values()] == [[9, 5, 3, 2, 1], [2, 1], [1]]
    assert all(budget.spent == (0.0 if budget.scope.user == "ben" else 0.5) for budget in told[Scope()])


@pytest.mark.parametrize(
    ("dollars", "words"),
    [
        *((value, {}) for value in (-1, math.nan, math.inf, "5", True, 10**400)),
        (1.0, {"per": "week"}),
        (1.0, {"action": "shout"}),
    ],
)
def test_a_bad_budget_changes_nothing(ledger: Ledger, dollars: Any, words: dict[str, Any]) -> None:
    ledger.budgets.set(ANA, 3.0)
    with pytest.raises(InvalidInput):
        ledger.budgets.set(ANA, dollars, **words)
    assert [budget.dollars for budget in ledger.budgets.applying(ANA)] == [3.0]


def test_a_use_that_was_rolled_back_is_not_counted(ledger: Ledger, database: Database) -> None:
    with contextlib.suppress(RuntimeError), database.write():
        spend(ledger, ANA, 5.0)
        raise RuntimeError
    assert ledger.budgets.spent(ANA, "day") == 0.0
    spend(ledger, ANA, 1.0)
    assert ledger.budgets.spent(ANA, "day") == 1.0


def test_periods_begin_and_end_by_utc() -> None:
    now = at(2028, 2, 29, 23, 59)
    assert (begin("day", now), end("day", now)) == (at(2028, 2, 29), at(2028, 3, 1))
    assert (begin("month", now), end("month", now)) == (at(2028, 2, 1), at(2028, 3, 1))
    assert end("month", at(2026, 12, 31)) == at(2027, 1, 1)
    assert end("ever", now) is None


@pytest.mark.slow
def test_a_check_is_cheap_over_a_hundred_thousand_uses(ledger: Ledger, database: Database) -> None:
    with database.write() as connection:
        connection.executemany(
            "INSERT INTO uses (at, verb, model, tenant, user, agent, session, input, cached, written, output, total_s,"
            " bytes, expected, money) VALUES (?, 'chat', 'a:b', '', ?, '', '', 9, 0, 0, 9, 1.0, 0, 0, 0.001)",
            [(NOON - number / 10, "ana" if number % 2 else f"u{number % 1000}") for number in range(100_000)],
        )
    for scope in (Scope(), ANA):
        ledger.budgets.set(scope, 1e6)
        ledger.budgets.set(scope, 1e6, per="ever")
    ledger.check(Scope(user="ana", session="s"), "a:b")
    took = []
    for _ in range(50):
        spend(ledger, ANA, 0.001)
        begun = time.thread_time()
        ledger.check(Scope(user="ana", session="s"), "a:b")
        took.append(time.thread_time() - begun)
    assert sorted(took)[25] < 0.001  # about 0.1 ms, of this thread alone
    assert ledger.budgets.spent(ANA, "ever") == pytest.approx(50.05)
