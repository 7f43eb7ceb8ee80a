"""Whatever was used, by whom and when: a report's lines, days, providers and scopes are the same uses and money."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from genai_prices import Usage as Used
from genai_prices import calc_price
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.cache_rules import rules_for
from agentmem.database import Database
from agentmem.ledger.accounts import Accounts
from agentmem.ledger.report import Line, Share
from agentmem.ledger.uses import Ledger
from agentmem.testing import FakeClock
from agentmem.types import Scope, Usage

MODELS = ("anthropic:claude-sonnet-5-5", "openai:gpt-6-sol", "openai:gpt-4.1", "local:small", "nobody:knows")
NAMES = st.one_of(st.none(), st.sampled_from(["a", "b", "it's", 'quo"ted', "%"]))
SUMS: dict[str, Callable[[Line | Share], float]] = {
    "uses": lambda row: row.uses,
    "input": lambda row: row.input_tokens,
    "cached": lambda row: row.cached_tokens,
    "written": lambda row: row.written_tokens,
    "output": lambda row: row.output_tokens,
    "seconds": lambda row: row.seconds,
    "money": lambda row: row.money or 0.0,
    "saved": lambda row: row.saved_money or 0.0,
    "unpriced": lambda row: row.unpriced,
}


@dataclass(frozen=True)
class Use:
    model: str
    scope: Scope
    after: float
    usage: Usage


@st.composite
def uses(draw: st.DrawFn) -> Use:
    read, written, rest, output = (draw(st.integers(0, 50_000)) for _ in range(4))
    model = draw(st.sampled_from(MODELS))
    usage = Usage(
        input_tokens=read + written + rest,
        cached_tokens=read,
        written_tokens=written,
        written_long_tokens=draw(st.integers(0, written)) if model.startswith("anthropic") else 0,
        output_tokens=output,
        first_token_s=draw(st.one_of(st.none(), st.floats(0.0, 5.0))),
        total_s=draw(st.floats(0.0, 9.0)),
    )
    scope = Scope(user=draw(NAMES), session=draw(NAMES))
    return Use(model, scope, draw(st.sampled_from([0.0, 30.0, 40_000.0, 200_000.0])), usage)


def priced(use: Use) -> float:
    vendor, _, name = use.model.partition(":")
    if vendor not in ("anthropic", "openai"):
        return 0.0
    usage = use.usage
    counts = Used(
        input_tokens=usage.input_tokens,
        cache_read_tokens=usage.cached_tokens,
        cache_write_tokens=usage.written_tokens,
        cache_write_1h_tokens=usage.written_long_tokens,
        output_tokens=usage.output_tokens,
    )
    return float(calc_price(counts, name, provider_id=vendor).total_price)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(uses(), max_size=25),
    st.sampled_from([Scope(), Scope(user="a"), Scope(user="it's", session="b")]),
    st.booleans(),
)
def test_every_way_to_sum_gives_the_same(made: Sequence[Use], scope: Scope, costs: bool) -> None:
    clock = FakeClock()
    database = Database(":memory:")
    try:
        prices = {"watts": 50.0, "kwh_price": 0.3} if costs else None
        ledger = Ledger(database, clock, costs=prices, rules=rules_for)
        for use in made:
            clock.advance(use.after)
            ledger.note("chat", use.model, use.scope, use.usage, here=use.model.startswith("local"))
        accounts = Accounts(ledger, scope)
        lines, mine = accounts.lines(), [use for use in made if use.scope.within(scope)]
        ways: list[Sequence[Line | Share]] = [lines, accounts.days(), accounts.providers()]
        if scopes := accounts.scopes():  # there is none where no use lies beneath
            ways.append(scopes)
        for name, column in SUMS.items():
            totals = [sum(map(column, way)) for way in ways]
            assert totals == pytest.approx([totals[0]] * len(totals)), name
        assert sum(line.uses for line in lines) == len(mine)
        hosted = sum(line.money or 0.0 for line in lines if not line.model.startswith("local"))
        assert hosted == pytest.approx(sum(map(priced, mine)), rel=1e-9)
        spent = sum(line.money or 0.0 for line in lines)
        assert ledger.budgets.spent(scope, "ever") == pytest.approx(spent)
        today = dt.datetime.fromtimestamp(clock(), dt.UTC).date().isoformat()
        spent_today = sum(day.money or 0.0 for day in accounts.days() if day.name == today)
        assert ledger.budgets.spent(scope, "day") == pytest.approx(spent_today)
    finally:
        database.close()
