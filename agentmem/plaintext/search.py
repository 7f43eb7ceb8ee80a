"""Search without a language model: candidates by words and by meaning, weighed by all that speaks for them.

Knows the order of the steps: what may be found, candidates, their neighbours, late interaction, signals, fusion. A
record's scope, validity and the caller's ``where`` decide before anything is scored, and what is left out has no say in
a score. Knows nothing of embedders: the query comes in encoded.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentmem.database import Database
from agentmem.errors import InvalidInput
from agentmem.types import Hit, Record, Scope

from .conditions import matching
from .drafts import check_k, check_text, moment, utc_seconds
from .passages import by_characters
from .records import Records

if TYPE_CHECKING:
    import datetime as dt

    import numpy as np
    import numpy.typing as npt

    from .catalog import Catalog, View
    from .encoded import Encoded, Vectors
    from .index import VectorIndex
    from .late import Matches, TokenStore
    from .signals import Pool, Query, Signals
    from .words import Lexical, Words

    Bools = npt.NDArray[np.bool_]
    Numbers = npt.NDArray[np.float32]
    Places = npt.NDArray[np.int32]

__all__ = ["Measured", "Searcher", "check_query"]

#: Candidates of each kind (words, vectors) that are weighed against each other, at least; their neighbours come on top.
POOL = 60


def check_query(query: object) -> str:
    """``query`` if it is a str that says something, else `InvalidInput`."""
    return check_text(query, "the query")


@dataclass(frozen=True, eq=False)
class Measured:
    """What a search knows before it ranks: the candidates and all that speaks for them."""

    query: Query
    pool: Pool
    signals: Signals
    matches: Matches | None


class Searcher:
    """Searches one folder's records. Follows what any process commits. Safe to use from many threads.

    Must not be called inside a `Database.write` block: it would learn what may be undone.
    """

    def __init__(self, database: Database, records: Records) -> None:
        self._database = database
        self._records = records
        self.start()
        _ALL.add(self)

    def start(self) -> None:
        """Begin with nothing in RAM and a free lock, as a forked child has to: no thread came with it."""
        self._lock = threading.Lock()
        self._parts: tuple[Catalog, Words] | None = None
        self._followed: weakref.WeakKeyDictionary[TokenStore, tuple[int, int]] = weakref.WeakKeyDictionary()

    def search(
        self,
        query: str,
        encoded: Encoded | None = None,
        *,
        index: VectorIndex | None = None,
        tokens: TokenStore | None = None,
        scope: Scope,
        k: int,
        where: Mapping[str, Any] | None = None,
        at: dt.datetime | str | None = None,
        now: float,
        explain: bool = False,
        without: Collection[str] = (),
    ) -> list[Hit]:
        """The best ``k`` records that ``scope`` sees, that hold at ``at`` (default: ``now``, UTC seconds), best first.

        ``encoded`` is the query in the space of ``index`` and ``tokens``; without it or ``index``, by words alone.
        `Hit.score` is the probability that the record is evidence for the query, `Hit.why` the parts of its log-odds;
        with ``explain`` also each signal (``signal.*``) and what the query is like (``query.*``). Records with an id
        in ``without`` count as not there.
        """
        from . import fusion

        k = check_k(k)
        found = self.measure(
            query,
            encoded,
            index=index,
            tokens=tokens,
            scope=scope,
            k=k,
            where=where,
            at=at,
            now=now,
            without=without,
        )
        pool, signals = found.pool, found.signals
        if not len(pool):
            return []
        fused = fusion.load(signals.kind).fuse(signals)
        best = _best(fused.score, pool.places, k)
        seqs = pool.view.seq[pool.places[best]].tolist()
        kept = self._records.at_rows(seqs, scope)
        spans = _spans(found, best, seqs, tokens)
        hits = []
        for place, seq, why in zip(best.tolist(), seqs, fused.why(best), strict=True):
            if seq not in kept:
                continue  # forgotten by another process this very moment
            if explain:
                why |= {f"signal.{name}": float(row[place]) for name, row in signals.rows.items()}
                why |= {f"query.{name}": value for name, value in signals.query.items()}
            start, stop = spans.get(seq) or _by_words(kept[seq], found.query)
            hits.append(Hit(record=kept[seq], score=float(fused.probability[place]), why=why, start=start, stop=stop))
        return hits

    def measure(
        self,
        query: str,
        encoded: Encoded | None = None,
        *,
        index: VectorIndex | None = None,
        tokens: TokenStore | None = None,
        scope: Scope,
        k: int = POOL,
        where: Mapping[str, Any] | None = None,
        at: dt.datetime | str | None = None,
        now: float,
        without: Collection[str] = (),
    ) -> Measured:
        """The candidates for `search` and their signals; the arguments are those of `search`."""
        from .signals import MOST_TOKENS, Query, measure

        query = check_query(query)
        when = moment(at, "at")
        condition = matching(where)
        if encoded is not None and len(encoded.vectors) != 1:
            raise InvalidInput(f"the query was encoded as {len(encoded.vectors)} texts: give one")
        catalog, words = self._followers()
        view = catalog.view(scope.tenant)
        allowed = view.allowed(scope, now if when is None else utc_seconds(when))
        if where:
            allowed = self._holding(view, allowed, condition)
        if without:
            allowed = self._less(view, allowed, without)
        stems = words.stems(query)  # first: it asks FTS5 for all words that are new at once
        asked = Query.of(query, encoded)
        lexical = words.score(view, stems, allowed)
        near = None if encoded is None or index is None else (index, encoded.vectors[0])
        pool, cosines = _pool(view, allowed, lexical, near, max(POOL, k))
        matches = None
        if encoded is not None and encoded.tokens and len(encoded.tokens[0]) and tokens is not None and len(pool):
            self._follow(tokens)
            matches = tokens.match(encoded.tokens[0][:MOST_TOKENS], view.seq[pool.places])
        return Measured(asked, pool, measure(asked, pool, lexical, cosines, matches), matches)

    def _followers(self) -> tuple[Catalog, Words]:
        """What follows the records in RAM; made at the first search, since it loads numpy."""
        with self._lock:
            if self._parts is None:
                from .catalog import Catalog
                from .words import Words

                self._parts = Catalog(self._database), Words()
            return self._parts

    def _holding(self, view: View, allowed: Bools, condition: tuple[str, Sequence[Any]]) -> Bools:
        """Those of the allowed rows that the condition holds for."""
        import numpy as np

        sql, values = condition
        whose, tenants = ("", []) if view.tenant is None else ("tenant IN ('', ?) AND ", [view.tenant])
        rows = self._database.query(
            f"SELECT json_group_array(seq) FROM records WHERE {whose}({sql})", [*tenants, *values]
        )
        places = view.places(np.array(json.loads(rows[0][0]), np.int64))
        held = np.zeros(view.n, bool)
        held[places[places >= 0]] = True
        held &= allowed
        held.flags.writeable = False
        return held

    def _less(self, view: View, allowed: Bools, without: Collection[str]) -> Bools:
        """The allowed rows but for those of these records."""
        import numpy as np

        rows = self._database.query(
            "SELECT seq FROM records WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(list(without)),)
        )
        places = view.places(np.array([row[0] for row in rows], np.int64))
        kept = allowed.copy()
        kept[places[places >= 0]] = False
        kept.flags.writeable = False
        return kept

    def _follow(self, tokens: TokenStore) -> None:
        """Have the store let go of what has changed since the last search."""
        import numpy as np

        from .catalog import changes_since, last_change

        with self._lock:
            last = self._followed.get(tokens)
            changes = None if last is None else changes_since(self._database, last)
            if changes is None:
                last = last_change(self._database)
                tokens.clear()
            elif changes:
                last = changes[-1][0], changes[-1][4]
                tokens.drop(np.array(sorted({row[2] for row in changes}), np.int64))
            else:
                return
            self._followed[tokens] = last  # only now: what Ctrl-C kept from being dropped is dropped the next time


def _pool(
    view: View, allowed: Bools, lexical: Lexical, near: tuple[VectorIndex, Vectors] | None, limit: int
) -> tuple[Pool, Numbers | None]:
    """The candidates with their neighbours, and the cosine of each; None where there are no vectors."""
    import numpy as np

    from .signals import Pool

    found = lexical.best(limit)
    if near is None:
        return Pool.of(view, allowed, found), None
    index, vector = near
    places, scores = index.search(vector, limit, view, allowed)
    pool = Pool.of(view, allowed, np.concatenate([found, places]))
    cosines = np.full(len(pool), np.nan, np.float32)
    cosines[np.searchsorted(pool.places, places)] = scores
    missing = np.isnan(cosines)
    if missing.any():
        cosines[missing] = index.scores(vector, view, pool.places[missing])
    return pool, cosines


def _spans(
    found: Measured, best: Any, seqs: Sequence[int], tokens: TokenStore | None
) -> dict[int, tuple[int, int | None]]:
    """Of the best records whose passages were told apart: the characters of the best one."""
    import numpy as np

    if found.matches is None or tokens is None:
        return {}
    counts = np.bincount(found.matches.owner, minlength=found.matches.records)[best].tolist()
    parts = found.signals.part[best].tolist()
    spans: dict[int, tuple[int, int | None]] = {
        seq: (0, None) for seq, count in zip(seqs, counts, strict=True) if count == 1
    }
    several = [(seq, part) for seq, part, count in zip(seqs, parts, counts, strict=True) if count > 1]
    if several:
        told = tokens.spans([seq for seq, _ in several], [part for _, part in several])
        spans |= {seq: span for (seq, _), span in zip(several, told, strict=True) if span is not None}
    return spans


def _best(score: Numbers, places: Places, k: int) -> Any:
    """The rows with the best scores, the newest first among equals."""
    import numpy as np

    return np.lexsort((-places, -score))[:k]


def _by_words(record: Record, query: Query) -> tuple[int, int | None]:
    """The passage of a long text that has most of the query's words; (0, None) for a short one: all of it."""
    spans = by_characters(record.text)
    if len(spans) == 1:
        return 0, None
    wanted = {word for word, stems in zip(query.words, query.stems_of, strict=True) if stems}
    lower = record.text.lower()
    if len(lower) != len(record.text):  # a letter whose small form is two: the offsets would be off
        lower = record.text
    return max(spans, key=lambda span: sum(word in lower[slice(*span)] for word in wanted))


#: The searchers whose locks a forked child must not find held.
_ALL: weakref.WeakSet[Searcher] = weakref.WeakSet()


def _after_fork() -> None:
    for searcher in _ALL:
        searcher.start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
