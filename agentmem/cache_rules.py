"""What a host's prompt cache does and costs, as facts of one model.

The facts lie in cache_rules.toml beside this file, each with the day it was seen: they differ by model and change
monthly, and a user may override any of them. Knows no provider, no prompt and no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CacheRules", "Lifetime"]


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
class CacheRules:
    """The prompt cache of one model. All prices are in units of one uncached input token.

    ``marked``: a prefix is kept only where it is marked (Anthropic, OpenAI's explicit mode); else the host keeps what
    it saw. ``minimum`` is the fewest tokens of a prefix that is kept; hits come in steps of ``step`` tokens above it
    (1: exactly). ``marks`` is how many ends of prefixes one request may mark, ``lookback`` how many content blocks
    before a mark the host looks for an earlier entry (None: all). ``lifetimes`` are sorted, the shortest first.
    ``renewed`` says that a read starts the lifetime anew. ``diagnoses``: the host says why it missed, if asked;
    ``prewarms``: it fills its cache without an answer. ``per_minute`` is how many requests one routing key can take.
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
