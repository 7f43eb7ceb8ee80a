"""What a host's prompt cache does and costs, as facts of one model.

The facts lie in cache_rules.toml beside this file, each with the day it was seen: they differ by model and change
monthly, and a user may override any of them. Knows no provider, no prompt and no clock.
"""

from __future__ import annotations

import functools
import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import ConfigError

__all__ = ["CacheRules", "Depth", "Lifetime", "check_overrides", "overridden", "pattern_of", "rules_for", "vendors"]

KINDS = ("breakpoints", "automatic", "engine")

#: Fields of which 0 says "no limit": TOML has no word for None.
UNLIMITED = ("lookback", "per_minute", "context_tokens")


@dataclass(frozen=True, kw_only=True)
class Lifetime:
    """How long an entry is kept after its last use, and what writing it costs.

    ``name`` is the vendor's ("5m"), ``write`` the price of a written token in input tokens (1.0: writing is free, the
    token is paid as any other).
    """

    name: str
    seconds: float
    write: float


@dataclass(frozen=True, kw_only=True)
class Depth:
    """What a token costs on an engine of one's own by how many stand before it, since it attends to all of them.

    Computing one costs ``first`` and ``each`` for each token before it, reading one from the cache ``read``.
    """

    first: float
    each: float
    read: float

    def over(self, unit: float) -> Depth:
        """The same in units of so much."""
        return Depth(first=self.first / unit, each=self.each / unit, read=self.read / unit)


@dataclass(frozen=True, kw_only=True)
class CacheRules:
    """The prompt cache of one model. All prices are in units of one uncached input token.

    ``kind``: ``breakpoints`` (a prefix is kept where it is marked), ``automatic`` (the host keeps what it saw),
    ``engine`` (as automatic, in an engine that the user runs: tokens have no price there).
    ``marked``: a prefix is kept only where it is marked (Anthropic, OpenAI's explicit mode); else the host keeps what
    it saw. ``minimum`` is the fewest tokens of a prefix that is kept; hits come in steps of ``step`` tokens above it
    (1: exactly). ``marks`` is how many ends of prefixes one request may mark, ``lookback`` how many content blocks
    before a mark the host looks for an earlier entry (None: all). ``lifetimes`` are sorted, the shortest first.
    ``renewed`` says that a read starts the lifetime anew. ``diagnoses``: the host says why it missed, if asked;
    ``prewarms``: it fills its cache without an answer. ``per_minute`` is how many requests one routing key can take.
    ``vendor`` is who sells the tokens, where that is known: the scheme of a model does not always say it. ``depth`` is
    measured of an engine of one's own; at a host a token has one price wherever it stands.
    """

    kind: str
    minimum: int
    read: float
    lifetimes: tuple[Lifetime, ...]
    marked: bool = False
    step: int = 1
    marks: int = 0
    lookback: int | None = None
    renewed: bool = True
    diagnoses: bool = False
    prewarms: bool = False
    per_minute: int | None = None
    context_tokens: int | None = None
    tokenizer: str | None = None
    seen: str = ""
    source: str = ""
    vendor: str = ""
    depth: Depth | None = None

    @property
    def priced(self) -> bool:
        """False for engines that the user runs: ``read`` and ``write`` then say what computing is spared, not money."""
        return self.kind != "engine"

    def anew(self, tokens: float) -> float:
        """What writing so many tokens at the head of a prompt costs beyond reading them."""
        write = self.lifetimes[0].write
        if self.depth is None:
            return tokens * (write - self.read)
        return tokens * (self.depth.first + self.depth.each * tokens / 2 + write - 1.0 - self.depth.read)


def rules_for(model: str, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> CacheRules | None:
    """What is known of the prompt cache of ``"scheme:model"``, where the scheme is a vendor's name.

    The longest pattern that matches counts; a model that none names has its vendor's defaults. None: an unknown vendor,
    or a model that caches nothing. ``overrides`` as in `overridden`, whose `ConfigError` may be raised.
    """
    return overridden(_known(model), model, overrides or {})


def check_overrides(overrides: Mapping[str, Mapping[str, Any]]) -> None:
    """`ConfigError` that names the first wrong pattern, field or value."""
    for pattern, values in overrides.items():
        _checked(pattern, values)


def overridden(rules: CacheRules | None, model: str, overrides: Mapping[str, Mapping[str, Any]]) -> CacheRules | None:
    """``rules`` with what the user knows better: ``{"anthropic:claude-opus-*": {"minimum": 1024}}``.

    Of several patterns that match ``model`` the longest is applied last. Where there are no rules yet, an override that
    names at least minimum, read and lifetimes makes them. ``lifetimes`` is a list of {name, seconds, write} and
    replaces the known ones. All overrides are checked, also those of other models: `ConfigError`.
    """
    check_overrides(overrides)
    matching = [pattern for pattern in overrides if fnmatchcase(_plain(model), _plain(pattern))]
    for pattern in sorted(matching, key=_literal):
        values = _checked(pattern, overrides[pattern])
        if rules is None:
            missing = sorted({"minimum", "read", "lifetimes"} - set(values))
            if missing:
                raise ConfigError(f"rules.{pattern!r}: nothing is known of this model; give {', '.join(missing)} too")
            kind = "breakpoints" if values.get("marked") else "automatic"
            told: dict[str, Any] = {"kind": kind, **values}
            rules = CacheRules(**told)
        else:
            rules = replace(rules, **values)
        if rules.marked and not rules.marks:
            raise ConfigError(f"rules.{pattern!r}: marked = true needs marks, how many a request may have")
    return rules


def pattern_of(model: str) -> str | None:
    """The pattern of the table that names ``"scheme:model"``; None where only a vendor's defaults apply, or nothing."""
    vendor, _, name = model.partition(":")
    best = _entry(vendor, name)
    return best[0] if best else None


def vendors(base_url: str) -> str | None:
    """Whose prompt cache stands behind this address, as `rules_for` takes it before the colon; None if unknown."""
    host = (urlsplit(base_url if "//" in base_url else f"//{base_url}").hostname or "").lower()
    for known, vendor in _table()["hosts"].items():
        if host == known or host.endswith(f".{known}"):
            return str(vendor)
    return None


@functools.cache
def _table() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "cache_rules.toml").read_text(encoding="utf-8"))


def _entry(vendor: str, name: str) -> tuple[str, Mapping[str, Any]] | None:
    """The longest pattern of this vendor that matches the name, with its fields."""
    plain = _plain_model(vendor, name)
    found = [
        (pattern, entry)
        for entry in _table()["vendors"].get(vendor, {}).get("models", [])
        for pattern in entry["match"]
        if fnmatchcase(plain, pattern)
    ]
    return max(found, key=lambda pair: _literal(pair[0]), default=None)


def _known(model: str) -> CacheRules | None:
    vendor, _, name = model.partition(":")
    facts = _table()["vendors"].get(vendor)
    if facts is None:
        return None
    entry = _entry(vendor, name)
    merged = {**facts, **(entry[1] if entry else {})}
    if not merged.pop("caches", True):
        return None
    merged.pop("models", None)
    merged.pop("match", None)
    told: dict[str, Any] = {"seen": _table()["seen"], "vendor": vendor, **_checked(model, merged)}
    return CacheRules(**told)


def _plain(model: str) -> str:
    vendor, _, name = model.partition(":")
    return f"{vendor.lower()}:{_plain_model(vendor, name)}"


def _plain_model(vendor: str, name: str) -> str:
    plain = name.lower()
    return plain.replace(".", "-") if vendor == "anthropic" else plain


def _literal(pattern: str) -> tuple[int, bool]:
    """How much of a name a pattern fixes."""
    return len(pattern.replace("*", "")), "*" not in pattern


def _checked(pattern: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with their types, or `ConfigError` that names the first wrong one."""
    if ":" not in pattern:
        raise ConfigError(f"rules.{pattern!r}: write 'vendor:model', such as 'anthropic:claude-opus-*'")
    if not isinstance(values, Mapping):
        raise ConfigError(f"rules.{pattern!r}: give a table of fields, got {values!r}")
    names = {field.name for field in fields(CacheRules)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in names:
            raise ConfigError(f"rules.{pattern!r}: unknown field {name!r}; known are {', '.join(sorted(names))}")
        checked[name] = _lifetimes(pattern, value) if name == "lifetimes" else _field(pattern, name, value)
    return checked


def _field(pattern: str, name: str, value: Any) -> Any:
    if name in UNLIMITED and value in (None, 0) and not isinstance(value, bool):
        return None
    if name in ("marked", "renewed", "diagnoses", "prewarms"):
        good, wanted = isinstance(value, bool), "true or false"
    elif name == "kind":
        good, wanted = value in KINDS, " or ".join(KINDS)
    elif name == "tokenizer":
        good, wanted = value is None or isinstance(value, str), "a name"
    elif name in ("seen", "source", "vendor"):
        good, wanted = isinstance(value, str), "a text"
    elif name == "read":
        good, wanted = _price(value, 1), "a price from 0 to 1, in uncached tokens"
    else:
        least = 0 if name in ("minimum", "marks") else 1
        good = isinstance(value, int) and not isinstance(value, bool) and value >= least
        wanted = f"a whole number, at least {least}"
    if not good:
        raise ConfigError(f"rules.{pattern!r}: {name} is {value!r}; give {wanted}")
    return value


def _lifetimes(pattern: str, value: Any) -> tuple[Lifetime, ...]:
    wanted = "a list of {name, seconds, write}, the shortest first"
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__") or not list(value):
        raise ConfigError(f"rules.{pattern!r}: lifetimes is {value!r}; give {wanted}")
    found: list[Lifetime] = []
    for item in value:
        told: Any = (
            {"name": item.name, "seconds": item.seconds, "write": item.write} if isinstance(item, Lifetime) else item
        )
        if not isinstance(told, Mapping) or set(told) != {"name", "seconds", "write"}:
            raise ConfigError(f"rules.{pattern!r}: a lifetime is {item!r}; give {wanted}")
        name, seconds, write = told["name"], told["seconds"], told["write"]
        if not isinstance(name, str) or not name:
            raise ConfigError(f"rules.{pattern!r}: a lifetime's name is {name!r}; give the vendor's, such as '5m'")
        if not _price(seconds, 1e12) or seconds == 0 or not _price(write, 10):
            raise ConfigError(
                f"rules.{pattern!r}: lifetime {name!r} has seconds {seconds!r} and write {write!r}; give seconds "
                "above 0 and a price from 0 to 10, in uncached tokens"
            )
        found.append(Lifetime(name=name, seconds=float(seconds), write=float(write)))
    if len({lifetime.name for lifetime in found}) < len(found) or any(
        a.seconds >= b.seconds for a, b in itertools.pairwise(found)
    ):
        raise ConfigError(f"rules.{pattern!r}: lifetimes need names of their own and must grow, the shortest first")
    return tuple(found)


def _price(value: Any, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
