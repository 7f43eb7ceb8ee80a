from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agentmem.cache_rules import CacheRules, Lifetime, overridden, pattern_of, rules_for, vendors
from agentmem.errors import ConfigError

TABLE = max((Path(__file__).parents[1] / "golden/prices").glob("*.json"))

#: genai-prices' names of vendors, and ours.
PRICED = {"anthropic": "anthropic", "openai": "openai", "deepseek": "deepseek"}

#: Read prices on which the two tables differ: theirs are of older models of the same name.
DIFFER = {"deepseek:deepseek-chat", "deepseek:deepseek-reasoner"}

#: Models without a prompt cache of their own in our table, although some price is listed for cached input.
NO_CHAT = re.compile(r"image|realtime|gpt-oss")


def known_prices() -> dict[str, dict[str, float]]:
    """What genai-prices has of the vendors above: input, read and write, in dollars a million tokens."""
    from genai_prices import data

    found: dict[str, dict[str, float]] = {}
    for provider in data.providers:
        for model in provider.models if provider.id in PRICED else ():
            prices = model.prices[-1].prices if isinstance(model.prices, list) else model.prices
            fields = {"input": prices.input_mtok, "read": prices.cache_read_mtok, "write": prices.cache_write_mtok}
            values = {name: float(str(getattr(value, "base", value))) for name, value in fields.items() if value}
            found[f"{PRICED[provider.id]}:{model.id}"] = values
    return found


def second_table() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(TABLE.read_text())["models"]
    return found


def test_the_table_names_every_model_that_the_prices_library_knows() -> None:
    assert [name for name in known_prices() if pattern_of(name) is None] == []


def test_a_second_table_s_models_are_all_covered() -> None:
    own = {name for name in second_table() if name.startswith(("anthropic:", "openai:", "deepseek:"))}
    assert len(own) > 60
    assert [name for name in own if pattern_of(name) is None] == []


@pytest.mark.parametrize("table", [known_prices, second_table])
def test_reads_and_writes_cost_what_two_price_tables_say(table: Any) -> None:
    compared = 0
    for name, prices in table().items():
        rules = rules_for(name)
        if rules is None:
            assert "read" not in prices or NO_CHAT.search(name), name
            continue
        if "read" in prices and name not in (DIFFER if table is known_prices else set()):
            assert prices["read"] / prices["input"] == pytest.approx(rules.read, abs=0.001), name
            compared += 1
        for field, life in (("write", 0), ("write_1h", -1), ("write_12h", -1)):
            if field in prices:
                wanted = rules.lifetimes[life].write
                assert prices[field] / prices["input"] == pytest.approx(wanted, abs=0.005), (name, field)
    assert compared > 40


def test_every_read_price_of_the_second_table_belongs_to_a_cache() -> None:
    for name, prices in second_table().items():
        assert ("read" in prices) == (rules_for(name) is not None), name


def test_no_window_is_wider_than_the_second_table_s_input_and_answer_together() -> None:
    for name, prices in second_table().items():
        rules = rules_for(name)
        if rules is not None and rules.context_tokens is not None and "max_input_tokens" in prices:
            assert 0.75 * prices["max_input_tokens"] <= rules.context_tokens <= prices["max_input_tokens"] + 130_000, (
                name
            )


def test_minimums_are_those_of_the_second_table() -> None:
    told = {name: prices["minimum"] for name, prices in second_table().items() if "minimum" in prices}
    assert len(told) > 20
    assert {name: rules.minimum for name in told if (rules := rules_for(name))} == told


@pytest.mark.parametrize(
    ("model", "minimum", "read", "marked"),
    [
        ("anthropic:claude-opus-5-5", 512, 0.05, True),
        ("anthropic:claude-opus-5-20260601", 512, 0.1, True),
        ("anthropic:claude-fable-5-20260601", 512, 0.1, True),
        ("anthropic:claude-fable-5-2-20261001", 512, 0.025, True),
        ("anthropic:claude-opus-4.6", 4096, 0.1, True),
        ("anthropic:claude-opus-4-20250514", 1024, 0.1, True),
        ("anthropic:claude-something-new", 512, 0.1, True),
        ("openai:gpt-6.1-sol", 1024, 0.05, True),
        ("openai:gpt-9", 1024, 0.1, True),
        ("openai:gpt-5.5-2026-04-01", 1024, 0.1, False),
        ("openai:gpt-4.1-mini", 1024, 0.25, False),
        ("openai:gpt-4o", 1024, 0.5, False),
        ("deepseek:deepseek-v4-flash", 64, 0.02, False),
    ],
)
def test_the_longest_pattern_or_the_vendor_s_default_counts(
    model: str, minimum: int, read: float, marked: bool
) -> None:
    rules = rules_for(model)
    assert rules is not None
    assert (rules.minimum, rules.read, rules.marked) == (minimum, read, marked)
    assert rules.seen >= "2026-11-22"
    assert rules.source


@pytest.mark.parametrize(
    "model",
    [
        "other:model",
        "local:smollm2",
        "openai:gpt-5.4-pro",
        "openai:text-embedding-3-small",
        "gemini:gemini-2.5-flash-tts",
        "",
    ],
)
def test_nothing_is_told_where_nothing_is_cached_or_known(model: str) -> None:
    assert rules_for(model) is None


def test_an_automatic_cache_has_steps_and_free_writes() -> None:
    rules = rules_for("openai:gpt-5.4")
    assert rules is not None
    assert (rules.kind, rules.step, rules.marks, rules.lifetimes[0].write) == ("automatic", 128, 0, 1.0)


@pytest.mark.parametrize("vendor", ["ollama", "llamacpp", "vllm", "sglang", "lmstudio"])
def test_engines_have_no_price(vendor: str) -> None:
    rules = rules_for(f"{vendor}:any")
    assert rules is not None
    assert not rules.priced
    assert rules.read == 0.0


def test_a_host_s_name_says_whose_cache_it_is() -> None:
    assert vendors("https://api.deepseek.com/v1") == "deepseek"
    assert vendors("https://eu.api.mistral.ai/v1") == "mistral"
    assert vendors("api.x.ai/v1") == "xai"
    assert vendors("https://evil-api.deepseek.com.example.org/v1") is None
    assert vendors("http://127.0.0.1:8000/v1") is None


def test_every_field_can_be_overridden() -> None:
    lifetimes = [{"name": "10m", "seconds": 600, "write": 1.5}, {"name": "1d", "seconds": 86400, "write": 3}]
    told: dict[str, Any] = {
        "kind": "automatic", "minimum": 7, "read": 0.3, "lifetimes": lifetimes, "marked": False, "step": 9, "marks": 2,
        "lookback": 0, "renewed": False, "diagnoses": False, "prewarms": False, "per_minute": 3,
        "context_tokens": 1234, "tokenizer": "own", "seen": "2027-01-01", "source": "mine", "vendor": "me",
    }  # fmt: skip
    rules = rules_for("anthropic:claude-opus-5-5", {"anthropic:claude-opus-*": told})
    kept = (Lifetime(name="10m", seconds=600, write=1.5), Lifetime(name="1d", seconds=86400, write=3))
    wanted: dict[str, Any] = {**told, "lifetimes": kept, "lookback": None}
    assert rules == CacheRules(**wanted)
    assert rules_for("anthropic:claude-sonnet-5", {"anthropic:claude-opus-*": told}) == rules_for(
        "anthropic:claude-sonnet-5"
    )


def test_the_longest_override_is_applied_last() -> None:
    overrides: Mapping[str, Mapping[str, Any]] = {
        "anthropic:claude-opus-4.6": {"minimum": 2},
        "anthropic:*": {"minimum": 1, "per_minute": 5},
    }
    rules = rules_for("anthropic:claude-opus-4-6", overrides)
    assert rules is not None
    assert (rules.minimum, rules.per_minute) == (2, 5)


def test_an_override_can_describe_a_host_that_nobody_knows() -> None:
    told = {"minimum": 100, "read": 0.2, "lifetimes": [{"name": "x", "seconds": 60, "write": 1.0}]}
    rules = overridden(None, "own:model", {"own:*": told})
    assert rules is not None
    assert (rules.kind, rules.minimum, rules.marked) == ("automatic", 100, False)
    with pytest.raises(ConfigError, match="give lifetimes, read too"):
        overridden(None, "own:model", {"own:*": {"minimum": 100}})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mimimum": 3}, "unknown field 'mimimum'"),
        ({"minimum": -1}, "minimum is -1"),
        ({"minimum": True}, "minimum is True"),
        ({"minimum": 1.5}, "minimum is 1.5"),
        ({"step": 0}, "step is 0"),
        ({"read": 1.1}, "read is 1.1"),
        ({"read": float("nan")}, "read is nan"),
        ({"marked": 1}, "marked is 1"),
        ({"kind": "magic"}, "kind is 'magic'"),
        ({"lookback": -3}, "lookback is -3"),
        ({"tokenizer": 3}, "tokenizer is 3"),
        ({"source": None}, "source is None"),
        ({"lifetimes": []}, "lifetimes is"),
        ({"lifetimes": "5m"}, "lifetimes is '5m'"),
        ({"lifetimes": [{"name": "5m"}]}, "a lifetime is"),
        ({"lifetimes": [{"name": "", "seconds": 1, "write": 1}]}, "a lifetime's name is ''"),
        ({"lifetimes": [{"name": "a", "seconds": 0, "write": 1}]}, "seconds 0"),
        ({"lifetimes": [{"name": "a", "seconds": 1, "write": -1}]}, "write -1"),
        ({"lifetimes": [{"name": n, "seconds": 1, "write": 1} for n in "ab"]}, "the shortest first"),
        (3, "give a table of fields"),
    ],
)
def test_nonsense_in_an_override_is_a_named_error(values: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        rules_for("anthropic:claude-opus-5-5", {"openai:*": values})


def test_an_override_without_a_vendor_is_refused() -> None:
    with pytest.raises(ConfigError, match="write 'vendor:model'"):
        rules_for("anthropic:claude-opus-5-5", {"claude-opus-5-5": {"minimum": 3}})


def test_a_marked_cache_needs_marks() -> None:
    with pytest.raises(ConfigError, match="needs marks"):
        rules_for("openai:gpt-4o", {"openai:gpt-4o": {"marked": True}})
