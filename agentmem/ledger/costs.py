"""What a use costs in dollars: hosted models by the table of ``genai-prices``, this machine by what the user sets.

Knows prices and seconds; knows no ledger, no prompt and no provider. What is not known is None, never a guess.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ..cache_rules import CacheRules
from ..errors import ConfigError
from ..provider import split_name
from ..types import Usage

__all__ = ["LocalCosts", "input_price", "price"]

#: A year as the Gregorian calendar has it on the average, in seconds.
YEAR_S = 365.2425 * 86_400
#: Sellers that genai-prices calls otherwise than cache_rules.toml does.
SELLERS = {"gemini": "google", "xai": "x-ai", "moonshot": "moonshotai"}
#: The settings that `LocalCosts` reads.
NAMES = ("watts", "kwh_price", "device_price", "device_years", "gb_month_price")


@dataclass(frozen=True, kw_only=True)
class LocalCosts:
    """What computing and storing on this machine costs, from the setting ``costs``.

    A second of computing costs ``watts / 1000 * kwh_price / 3600`` for energy plus ``device_price / (device_years *
    365.2425 * 86400)`` for the device, which is paid off over its life, at work or not: idle time is charged to
    nobody. Storage costs ``gb_month_price`` for 10^9 bytes a month. None where the numbers were not given.
    """

    second: float | None = None
    gb_month: float | None = None

    @classmethod
    def of(cls, costs: Mapping[str, object]) -> LocalCosts:
        """The costs that these settings describe.

        Raises `ConfigError` for an unknown name, a number that is negative or not finite, and one that says nothing
        without its partner (watts and kwh_price, device_price and device_years).
        """
        known: dict[str, float] = {}
        for name, value in costs.items():
            if name not in NAMES:
                raise ConfigError(f"costs.{name} is no cost of a machine: give {', '.join(NAMES)}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"costs.{name} is {value!r}: give a number of 0 or more")
            known[name] = value
        for one, other in (("watts", "kwh_price"), ("device_price", "device_years")):
            if (one in costs) != (other in costs):
                given, missing = (one, other) if one in costs else (other, one)
                raise ConfigError(f"costs.{given} needs costs.{missing} beside it")
        if known.get("device_years") == 0:
            raise ConfigError("costs.device_years is 0: give the years that the device is used")
        second = None
        if "watts" in known:
            second = known["watts"] / 1000 * known["kwh_price"] / 3600
        if "device_price" in known:
            second = (second or 0.0) + known["device_price"] / (known["device_years"] * YEAR_S)
        return cls(second=second, gb_month=known.get("gb_month_price"))

    def computing(self, seconds: float) -> float | None:
        """Dollars for this many seconds of computing."""
        return None if self.second is None else self.second * seconds

    def storing(self, size: int, seconds: float = YEAR_S / 12) -> float | None:
        """Dollars for keeping ``size`` bytes for this long (a month)."""
        return None if self.gb_month is None else self.gb_month * size / 1e9 * seconds / (YEAR_S / 12)


def price(
    model: str, usage: Usage, *, rules: CacheRules | None = None, at: float | None = None
) -> tuple[float, float] | None:
    """(what this use cost, what it would have cost with nothing cached) in dollars, or None where no price is known.

    Prices: genai-prices' packaged table, as of ``at`` (Unix seconds, else now), with its tiers by context. Its input
    count, like ours, includes cached and written tokens. The seller is the vendor that ``rules`` name, else the scheme.
    A longer lifetime than an hour is not in that table: such writes cost the input price times the factor that
    ``rules`` have for it.
    """
    table = _Table.of(model, rules, at)
    if table is None:
        return None
    long = usage.written_long_tokens
    written = usage.written_tokens
    hour = table.has("cache_write_1h_mtok")
    if long and not hour and table.has("cache_write_mtok"):
        if rules is None or len(rules.lifetimes) < 2:
            return None
        written -= long  # priced below as uncached input; the premium comes on top
    paid = table.total(
        input_tokens=usage.input_tokens,
        cache_read_tokens=usage.cached_tokens,
        cache_write_tokens=written,
        output_tokens=usage.output_tokens,
        **({"cache_write_1h_tokens": long} if hour else {}),
    )
    bare = table.total(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens)
    if paid is None or bare is None:
        return None
    if written != usage.written_tokens and rules is not None:
        input_only = table.total(input_tokens=usage.input_tokens)
        if input_only is None or not usage.input_tokens:
            return None
        paid += input_only / usage.input_tokens * long * Decimal(repr(rules.lifetimes[-1].write - 1.0))
    return float(paid), float(bare)


def input_price(model: str, *, rules: CacheRules | None = None, at: float | None = None) -> float | None:
    """Dollars for one uncached input token of a short prompt, or None where no price is known."""
    table = _Table.of(model, rules, at)
    million = None if table is None else table.total(input_tokens=1000)
    return None if million is None else float(million) / 1000


class _Table:
    """The prices of one model at one time."""

    def __init__(self, name: str, seller: str, at: dt.datetime) -> None:
        self._name, self._seller, self._at = name, seller, at
        #: Of the model, or None where it is not in the table.
        self.prices: Any = None

    @classmethod
    def of(cls, model: str, rules: CacheRules | None, at: float | None) -> _Table | None:
        scheme, name = split_name(model)
        vendor = rules.vendor if rules is not None and rules.vendor else scheme
        seller = SELLERS.get(vendor, vendor)
        if not seller or not name:
            return None
        when = dt.datetime.now(dt.UTC) if at is None else dt.datetime.fromtimestamp(at, dt.UTC)
        table = cls(name, seller, when)
        return table if table.total(input_tokens=1) is not None else None

    def has(self, key: str) -> bool:
        return getattr(self.prices, key, None) is not None

    def total(self, **counts: int) -> Decimal | None:
        """What these tokens cost; None where they are priced nowhere or don't fit together."""
        try:
            from genai_prices import Usage as Used
            from genai_prices import calc_price
        except ModuleNotFoundError:
            return None
        try:
            found = calc_price(
                Used(**counts), model_ref=self._name, provider_id=self._seller, genai_request_timestamp=self._at
            )
        except (LookupError, ValueError):
            return None
        # "openai_compatible" matches OpenAI there: what another host sells under one of its names has another price.
        if found.provider.id != self._seller:
            return None
        self.prices = found.model_price
        return found.total_price
