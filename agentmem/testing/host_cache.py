"""The prompt caches of a stand-in host: prefix matching on the rendered bytes of a prompt, by the host's rules.

Knows bytes, tokens and the clock it is given; no vendor's format. Written apart from
``activation/cache_model.py``, which matches keys of blocks, so that each can be held against the other.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ..cache_rules import CacheRules
from ..tokens import encoding

__all__ = ["HostCaches", "Piece", "Prompt", "Visit", "tokens_of"]

#: Seconds over which a host counts the requests of one routing key.
MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class Piece:
    """One content block of a prompt as the host renders it, without its cache marker.

    ``level`` is the part of the prompt that it belongs to. ``facts`` are settings that the host's entries from here on
    depend on though they add no token (a forced tool, a thinking budget). ``lifetime`` is set at a marked end: an index
    into `CacheRules.lifetimes`.
    """

    content: bytes
    level: str
    facts: bytes = b""
    lifetime: int | None = None


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A request as every host here sees it, once its vendor's format is read.

    ``owner`` and ``route`` say whose cache it is and which of its machines: what differs in either shares nothing.
    ``caching`` is False where the request opted out. ``seconds`` overrides the rules' lifetime (Ollama's keep_alive).
    ``compared`` holds the fields that a diagnosis names when they changed; ``previous`` is the answer to compare with,
    None if no diagnosis was asked for.
    """

    model: str
    owner: str
    pieces: tuple[Piece, ...]
    route: str = ""
    caching: bool = True
    seconds: float | None = None
    compared: Mapping[str, Any] = field(default_factory=dict)
    diagnose: bool = False
    previous: str | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    prewarm: bool = False


@lru_cache(maxsize=1 << 15)
def _ids(content: bytes) -> bytes:
    """The content's tokens (o200k_base), four bytes each."""
    ids = encoding("o200k_base").encode(content.decode(errors="replace"), disallowed_special=())
    return struct.pack(f"<{len(ids)}I", *ids)


def tokens_of(content: bytes | str) -> int:
    """How many tokens a host here counts: o200k_base, each content block by itself."""
    return len(_ids(content.encode() if isinstance(content, str) else content)) // 4


class Visit:
    """What one request reads, writes and pays in full, in tokens. What it writes can be read after `began`."""

    def __init__(self, tokens: int, read: int, written: tuple[int, ...], store: Callable[[], None]) -> None:
        self.tokens, self.read, self.written = tokens, read, written
        self.uncached = tokens - read - sum(written)
        self._store: Callable[[], None] | None = store

    def began(self) -> None:
        """The first byte of the answer is on its way: from now on others can read what this request wrote."""
        store, self._store = self._store, None
        if store is not None:
            store()


@dataclass
class _Entry:
    until: float
    seconds: float


class _Machine:
    """One machine's entries: the digest of each kept prefix, when it goes, for how long it is kept."""

    def __init__(self, rules: CacheRules) -> None:
        self._rules = rules
        self._entries: dict[bytes, _Entry] = {}

    def visit(self, prompt: Prompt, now: float) -> Visit:
        return (self._marked if self._rules.marked else self._automatic)(prompt, now)

    def _live(self, digest: bytes, now: float) -> bool:
        entry = self._entries.get(digest)
        return entry is not None and now < entry.until

    def _renew(self, digests: Sequence[bytes], now: float) -> None:
        if self._rules.renewed:
            for digest in digests:
                if self._live(digest, now):
                    entry = self._entries[digest]
                    entry.until = max(entry.until, now + entry.seconds)

    def _marked(self, prompt: Prompt, now: float) -> Visit:
        rules, ends = self._rules, list(_piece_ends(prompt.pieces))
        marks = [(at, life) for at, piece in enumerate(prompt.pieces) if (life := piece.lifetime) is not None]
        hit = -1
        for at, _ in marks:
            first = 0 if rules.lookback is None else max(0, at - rules.lookback)
            hit = max([hit, *(i for i in range(first, at + 1) if self._live(ends[i][0], now))])
        read = ends[hit][1] if hit >= 0 else 0
        self._renew([digest for digest, _ in ends[: hit + 1]], now)
        written, paid, new = [0] * len(rules.lifetimes), read, []
        for at, lifetime in marks:
            digest, tokens = ends[at]
            if at > hit and tokens >= rules.minimum:
                written[lifetime] += tokens - paid
                paid = tokens
                new.append((digest, prompt.seconds or rules.lifetimes[lifetime].seconds))
        return Visit(ends[-1][1] if ends else 0, read, tuple(written), lambda: self._store(new, now))

    def _automatic(self, prompt: Prompt, now: float) -> Visit:
        rules = self._rules
        total = sum(tokens_of(piece.content) for piece in prompt.pieces)
        steps = list(_steps(prompt.pieces, rules.minimum, rules.step))
        hit = max((i for i, (digest, _) in enumerate(steps) if self._live(digest, now)), default=-1)
        read = steps[hit][1] if hit >= 0 else 0
        self._renew([digest for digest, _ in steps[: hit + 1]], now)
        lifetime = rules.lifetimes[0]
        kept = max(0, steps[-1][1] - read) if steps and lifetime.write != 1.0 else 0
        seconds = lifetime.seconds if prompt.seconds is None else prompt.seconds
        new = [(digest, seconds) for digest, _ in steps if not self._live(digest, now)]
        return Visit(total, read, (kept, *[0] * (len(rules.lifetimes) - 1)), lambda: self._store(new, now))

    def _store(self, entries: Sequence[tuple[bytes, float]], at: float) -> None:
        for digest, seconds in entries:
            self._entries[digest] = _Entry(at + seconds, seconds)


def _piece_ends(pieces: Sequence[Piece]) -> Iterator[tuple[bytes, int]]:
    """(digest of all bytes so far, tokens so far) at the end of each piece."""
    running, tokens = hashlib.sha256(), 0
    for piece in pieces:
        for part in (piece.facts, piece.content):
            running.update(struct.pack("<Q", len(part)) + part)
        tokens += tokens_of(piece.content)
        yield running.digest(), tokens


def _steps(pieces: Sequence[Piece], minimum: int, step: int) -> Iterator[tuple[bytes, int]]:
    """(digest of all tokens so far, their number) after ``minimum`` tokens and each further ``step``."""
    ids = b"".join(_ids(piece.content) for piece in pieces)
    facts = b"".join(piece.facts for piece in pieces)
    running, done = hashlib.sha256(facts), 0
    for tokens in range(max(minimum, 1), len(ids) // 4 + 1, step):
        running.update(ids[4 * done : 4 * tokens])
        done = tokens
        yield running.digest(), tokens


class HostCaches:
    """All caches of one host: one per owner, model and route, with more machines where one is asked too often.

    ``spills`` follows `CacheRules.per_minute`: what comes on a route beyond that goes to a machine that knows nothing
    of it. Off by default, since a clock that stands still makes all requests come within a minute.
    """

    def __init__(self, *, spills: bool = False) -> None:
        self._spills = spills
        self._lock = threading.Lock()
        self._machines: dict[tuple[str, str, str, int], _Machine] = {}
        self._came: dict[tuple[str, str, str], list[float]] = {}

    def visit(self, rules: CacheRules | None, prompt: Prompt, now: float) -> Visit:
        """Send ``prompt`` to the cache at ``now`` (Unix seconds)."""
        tokens = sum(tokens_of(piece.content) for piece in prompt.pieces)
        if rules is None or not prompt.caching:
            return Visit(tokens, 0, (0,) * len(rules.lifetimes if rules else ()), lambda: None)
        route = (prompt.owner, prompt.model, prompt.route)
        with self._lock:
            number = 0
            if self._spills and rules.per_minute:
                came = [at for at in self._came.get(route, []) if now - at < MINUTE_S]
                self._came[route] = [*came, now]
                number = len(came) // rules.per_minute
            visit = self._machines.setdefault((*route, number), _Machine(rules)).visit(prompt, now)
        store = visit.began

        def locked() -> None:
            with self._lock:
                store()

        return Visit(visit.tokens, visit.read, visit.written, locked)
