"""Prices: those of genai-prices to the last digit, those of a second table, and what this machine costs."""

from __future__ import annotations

import datetime as dt
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage as Used
from genai_prices import calc_price

from agentmem.cache_rules import CacheRules, Lifetime, rules_for
from agentmem.errors import ConfigError
from agentmem.ledger.costs import LocalCosts, input_price, price
from agentmem.types import Usage

TABLE = max((Path(__file__).parents[1] / "golden/prices").glob("*.json"))
#: At two in the morning DeepSeek asks for what the second table has: the price of busy hours.
SEEN = dt.datetime.fromisoformat(json.loads(TABLE.read_text())["seen"]).replace(hour=2, tzinfo=dt.UTC).timestamp()
SECOND: dict[str, dict[str, float]] = json.loads(TABLE.read_text())["models"]

#: Sold no longer, and the tables have not followed their last prices alike.
OLD = {f"deepseek:deepseek-{name}" for name in ("chat", "reasoner", "v3.2")}
#: Only the second table knows them.
UNPRICED = {f"anthropic:claude-mythos-{name}" for name in ("5", "5-1", "preview")}

#: As genai-prices calls it: an hour is the longer lifetime that it knows.
HOUR = Usage(
    input_tokens=100_000, cached_tokens=50_000, written_tokens=40_000, written_long_tokens=15_000, output_tokens=1_000
)


def test_money_is_the_price_tables_to_the_cent() -> None:
    # Claude Sonnet 4.5, per million: input 3, cache read 0.30, cache write 3.75, output 15 dollars.
    used = Usage(input_tokens=100_000, cached_tokens=80_000, written_tokens=10_000, output_tokens=1_000)
    found = price("anthropic:claude-sonnet-4-5", used)
    assert found is not None
    assert found[0] == pytest.approx(0.03 + 0.024 + 0.0375 + 0.015, abs=1e-9)
    assert found[1] == pytest.approx(0.3 + 0.015, abs=1e-9)


def test_an_hours_writes_are_dearer_than_short_ones() -> None:
    # Claude Sonnet 5.5, per million: input 2, read 0.10, write 2.50, an hour's 4, output 10 dollars.
    found = price("anthropic:claude-sonnet-5-5", HOUR)
    assert found is not None
    assert found[0] == pytest.approx(0.02 + 0.005 + 0.0625 + 0.06 + 0.01, abs=1e-9)
    assert found[1] == pytest.approx(0.2 + 0.01, abs=1e-9)


def test_twelve_hours_cost_what_the_rules_say_and_nothing_is_guessed_without_them() -> None:
    # GPT-6 Sol, per million: input 2, read 0.20, write 2.50, output 10; twelve hours 2.5 times the input.
    rules = rules_for("openai:gpt-6-sol")
    found = price("openai:gpt-6-sol", HOUR, rules=rules)
    assert found is not None
    assert found[0] == pytest.approx(0.02 + 0.01 + 0.0625 + 0.015 * 2 * 2.5 + 0.01, abs=1e-9)
    assert price("openai:gpt-6-sol", HOUR) is None
    one = CacheRules(
        kind="breakpoints", minimum=1024, read=0.1, lifetimes=(Lifetime(name="30m", seconds=1800.0, write=1.25),)
    )
    assert price("openai:gpt-6-sol", HOUR, rules=one) is None


@pytest.mark.parametrize("model", sorted(SECOND.keys() - OLD - UNPRICED))
def test_a_second_table_says_the_same(model: str) -> None:
    theirs = SECOND[model]
    tokens = 10_000
    counts: dict[str, dict[str, int]] = {
        "input": {},
        "read": {"cached_tokens": tokens},
        "write": {"written_tokens": tokens},
        "write_1h": {"written_tokens": tokens, "written_long_tokens": tokens},
        "write_12h": {"written_tokens": tokens, "written_long_tokens": tokens},
    }
    for name, more in counts.items():
        if name in theirs:
            found = price(model, Usage(input_tokens=tokens, **more), rules=rules_for(model), at=SEEN)
            assert found is not None, name
            assert found[0] == pytest.approx(theirs[name] * tokens / 1e6, rel=1e-6), name


def test_dearer_context_is_priced_as_such() -> None:
    small, large = (price("openai:gpt-6-sol", Usage(input_tokens=tokens)) for tokens in (200_000, 300_000))
    assert small is not None
    assert large is not None
    assert small[0] == pytest.approx(0.4)
    assert large[0] == pytest.approx(1.2)


@pytest.mark.parametrize(
    "model",
    [
        *("local:smollm2", "ollama:llama3.2", "scripted:test", "openai:no-such-model", "", "openai", "anthropic:"),
        "openai_compatible:gpt-4o",  # another host's model of that name has another price
    ],
)
def test_an_unknown_price_is_none_and_not_zero(model: str) -> None:
    assert price(model, Usage(input_tokens=10)) is None
    assert input_price(model) is None


def test_a_vendor_behind_another_scheme_has_its_own_prices() -> None:
    used = Usage(input_tokens=1000, output_tokens=10)
    rules = rules_for("deepseek:deepseek-v4-flash")
    found = price("openai_compatible:deepseek-v4-flash", used, rules=rules, at=SEEN)
    assert found == price("deepseek:deepseek-v4-flash", used, at=SEEN)
    assert found is not None


def test_counts_that_do_not_fit_together_have_no_price() -> None:
    assert price("openai:gpt-6-sol", Usage(input_tokens=10, cached_tokens=11)) is None
    assert price("openai:gpt-6-sol", Usage(input_tokens=10, written_tokens=5, written_long_tokens=6)) is None


def test_prices_are_those_of_the_day() -> None:
    before, after = (
        price("openai:gpt-5.6-sol", Usage(input_tokens=1_000_000), at=dt.datetime(*day, tzinfo=dt.UTC).timestamp())
        for day in ((2026, 8, 1), (2026, 11, 1))
    )
    assert before is not None
    assert after is not None
    assert before[0] > after[0]


def test_a_random_ledger_costs_what_genai_prices_says_to_the_last_digit() -> None:
    rng = random.Random(6)
    models = ["openai:gpt-6-sol", "openai:gpt-4.1", "anthropic:claude-sonnet-5-5", "anthropic:claude-haiku-5-5"]
    for _ in range(200):
        model = rng.choice(models)
        read, written, rest, output = (rng.choice([0, rng.randrange(300_000)]) for _ in range(4))
        long = rng.randrange(written + 1) if model.startswith("anthropic") else 0
        used = Usage(
            input_tokens=read + written + rest,
            cached_tokens=read,
            written_tokens=written,
            written_long_tokens=long,
            output_tokens=output,
        )
        theirs = calc_price(
            Used(
                input_tokens=read + written + rest,
                cache_read_tokens=read,
                cache_write_tokens=written,
                cache_write_1h_tokens=long,
                output_tokens=output,
            ),
            model.partition(":")[2],
            provider_id=model.partition(":")[0],
        )
        found = price(model, used)
        assert found is not None
        assert found[0] == float(theirs.total_price)


def test_a_second_on_this_machine_is_energy_and_a_share_of_the_device() -> None:
    costs = LocalCosts.of({"watts": 100, "kwh_price": 0.30, "device_price": 1000, "device_years": 4})
    energy, device = 0.1 * 0.30, 1000 / (4 * 365.2425 * 24)
    assert costs.computing(3600) == pytest.approx(energy + device)
    assert costs.storing(10**9) is None
    assert LocalCosts.of({"gb_month_price": 0.02}).storing(5 * 10**9) == pytest.approx(0.10)
    assert LocalCosts.of({}).computing(1.0) is None


@pytest.mark.parametrize(
    ("costs", "named"),
    [
        ({"watt": 5}, "costs.watt "),
        ({"watts": -1, "kwh_price": 0.3}, "costs.watts"),
        ({"watts": math.nan, "kwh_price": 0.3}, "costs.watts"),
        ({"watts": math.inf, "kwh_price": 0.3}, "costs.watts"),
        ({"watts": True, "kwh_price": 0.3}, "costs.watts"),
        ({"watts": 100}, "costs.kwh_price"),
        ({"device_years": 3}, "costs.device_price"),
        ({"device_price": 100, "device_years": 0}, "costs.device_years"),
    ],
)
def test_bad_costs_are_named(costs: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        LocalCosts.of(costs)
