"""Search over records without a language model: words (FTS5, BM25) and meaning (vectors), weighed by their evidence.

Knows how signals are computed and added up. A record's scope, validity and the caller's ``where`` are conditions inside
every statement, never a filter over what was found. Knows nothing of embedders: the query's vector comes in as numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentmem.database import Database
from agentmem.types import LEVELS, Hit, Scope

from .conditions import Condition, above, beneath, joined, matching, valid_at
from .drafts import check_k, check_text, moment, utc_seconds
from .records import Records

if TYPE_CHECKING:
    import datetime as dt

    import numpy as np
    import numpy.typing as npt

    from .index import Rows, VectorIndex, Vectors

    Numbers = npt.NDArray[np.float64]

__all__ = ["check_query", "search", "terms"]

#: English words too common to say what is asked for. In other languages BM25's own weights do most of this work.
STOP_WORDS = frozenset(
    """
    a about an and are as at be been being but by can could d did do does down for from had has have he
    her here him his how i if in into is it its ll m may me might my no not of on or our out over re s
    she should so t than that the their them then there these they this those to up us ve was we were
    what when where which who whom why will with would you your
    """.split()  # noqa: SIM905 - read as prose
)
#: The most words of a query that are looked up; what follows adds cost, not sense.
MOST_TERMS = 64
#: How many records of each kind (words, vectors) are weighed against each other, at least.
POOL = 400

#: Weights of the signals, each in standard deviations over the pool. Chosen on the development halves of LoCoMo,
#: PrefEval and BEAM (tests/benchmarks): a turn's neighbours say more than the turn itself, an answer more than its
#: question, and what a user said about their life more than what an assistant answered at length.
WEIGHTS = {
    "bm25": 0.5,
    "bm25_window": 1.0,
    "dense": 0.3,
    "dense_window": 1.0,
    "assistant": -1.5,
    "question": -1.0,
    "speaker": 1.0,
}
#: Where the best record matches less than the first share of the query's weight in words, words count for nothing; from
#: the second on they count in full. (Questions that share no words with their answer are then left to the vectors.)
EVIDENCE = (0.05, 0.2)
#: BM25's limit of a term's score over its idf (k1 + 1).
SATURATION = 2.2


def check_query(query: object) -> str:
    """``query`` if it is a str that says something, else `InvalidInput`."""
    return check_text(query, "the query")


def search(
    database: Database,
    records: Records,
    index: VectorIndex | None,
    vector: Vectors | None,
    query: str,
    *,
    scope: Scope,
    k: int,
    where: Mapping[str, Any] | None = None,
    at: dt.datetime | str | None = None,
    now: float,
    explain: bool = False,
) -> list[Hit]:
    """The best ``k`` records that ``scope`` sees, that hold at ``at`` (default: ``now``, UTC seconds), best first.

    Without ``index`` and ``vector`` by words alone. `Hit.why` holds the parts that add up to the score; with
    ``explain`` also ``bm25_raw``, ``cosine`` and ``evidence`` (how much of the query's words, by weight, the best
    record has).
    """
    query, k = check_query(query), check_k(k)
    when = moment(at, "at")
    holds = valid_at(now if when is None else utc_seconds(when))
    allowed = _allowed(database, scope, [holds, matching(where)])
    limit = min(sum(len(rows) for rows in allowed.values()), max(POOL, 2 * k))
    words, evidence = _lexical(database, terms(query), allowed)
    found = set(sorted(words, key=words.__getitem__, reverse=True)[:limit])
    cosines: dict[int, float] = {}
    if index is not None and vector is not None:
        rows, scores = index.search(vector, limit, allowed)
        cosines = dict(zip(rows.tolist(), scores.tolist(), strict=True))
        found |= cosines.keys()
    pool = _pool(database, found, allowed)
    if not pool.rows:
        return []
    if index is not None and vector is not None:
        cosines |= index.scores(vector, pool.by_tenant(without=cosines))
    parts = _parts(pool, words, cosines, evidence, query)
    total = sum(parts.values(), start=pool.asks * 0.0)
    best = sorted(range(len(pool.rows)), key=lambda i: (-total[i], -pool.rows[i]))[:k]
    kept = records.at_rows([pool.rows[i] for i in best], scope)
    hits = []
    for i in best:
        row = pool.rows[i]
        if row not in kept:
            continue  # forgotten by another process this very moment
        why = {name: float(part[i]) for name, part in parts.items()}
        score = sum(why.values())
        if explain:
            why |= {"bm25_raw": words.get(row, 0.0), "cosine": cosines.get(row, 0.0), "evidence": evidence}
        hits.append(Hit(record=kept[row], score=score, why=why))
    return hits


def terms(query: str) -> list[str]:
    """The words of a query to look up: letters and digits only, so nothing in it can be FTS syntax."""
    words = list(dict.fromkeys(re.findall(r"[^\W_]+", query.lower())))
    return ([word for word in words if word not in STOP_WORDS] or words)[:MOST_TERMS]


def _allowed(database: Database, scope: Scope, conditions: Sequence[Condition]) -> dict[str, Rows]:
    """The rows that may be found, by tenant, ascending."""
    import numpy as np

    groups: dict[str, list[int]] = {}
    # Two statements, so that each is answered by one index without reading the records.
    for whose in (beneath(scope), above(scope)):
        sql, values = joined([whose, *conditions])
        statement = f"SELECT tenant, json_group_array(seq) FROM records WHERE {sql} GROUP BY tenant"
        for tenant, rows in database.query(statement, values):
            groups.setdefault(tenant, []).extend(json.loads(rows))
    return {tenant: np.unique(np.array(rows, np.int64)) for tenant, rows in groups.items()}


def _lexical(database: Database, words: Sequence[str], allowed: Mapping[str, Rows]) -> tuple[dict[int, float], float]:
    """BM25 by row, and the evidence: what the best row has of the score that a row with all the words would have.

    FTS5's own bm25() takes a word's rarity from every tenant's records: a neighbour could change what is found here,
    and scores would tell of foreign texts. So its idf is divided out, and that of the allowed rows is put in.
    """
    import numpy as np

    everyone = np.concatenate([np.empty(0, np.int64), *allowed.values()])
    own = np.zeros(int(everyone.max(initial=0)) + 1, bool)
    own[everyone] = True
    count = len(everyone)
    stored = database.query("SELECT count(*) FROM records")[0][0]
    scores: dict[int, float] = {}
    possible = 0.0
    for word in words:
        rows = database.query(
            "SELECT rowid, bm25(records_fts) FROM records_fts WHERE records_fts MATCH ?", (f'"{word}"',)
        )
        theirs = math.log(max(stored - len(rows) + 0.5, 0.5) / (len(rows) + 0.5))
        theirs = theirs if theirs > 0 else 1e-6  # as FTS5 does
        mine = [(row, score) for row, score in rows if row < len(own) and own[row]]
        rarity = math.log1p((count - len(mine) + 0.5) / (len(mine) + 0.5))
        possible += rarity * SATURATION
        for row, score in mine:
            scores[row] = scores.get(row, 0.0) - score / theirs * rarity
    return scores, max(scores.values(), default=0.0) / possible if possible else 0.0


@dataclass(frozen=True)
class _Pool:
    """The records weighed against each other. ``before`` and ``after`` are places in the pool, -1 for none."""

    rows: list[int]
    tenants: list[str]
    names: list[str | None]
    roles: list[str]
    asks: npt.NDArray[np.bool_]
    before: Rows
    after: Rows

    def by_tenant(self, *, without: Mapping[int, float]) -> dict[str, Rows]:
        import numpy as np

        groups: dict[str, list[int]] = {}
        for row, tenant in zip(self.rows, self.tenants, strict=True):
            if row not in without:
                groups.setdefault(tenant, []).append(row)
        return {tenant: np.array(rows, np.int64) for tenant, rows in groups.items()}


def _pool(database: Database, found: set[int], allowed: Mapping[str, Rows]) -> _Pool:
    """What was found and its neighbours: the turn that answers is often the one beside the turn that matches.

    A neighbour that is not allowed is no neighbour: what a condition leaves out has no say in what is found.
    """
    import numpy as np

    turns = _turns(database, found)
    beside = np.array([row for turn in turns for row in turn[-2:] if row is not None], np.int64)
    near = [row for rows in allowed.values() for row in np.intersect1d(beside, rows).tolist() if row not in found]
    turns += _turns(database, near) if near else []
    place = {turn[0]: at for at, turn in enumerate(turns)}
    return _Pool(
        rows=[turn[0] for turn in turns],
        tenants=[turn[1] for turn in turns],
        names=[turn[2] for turn in turns],
        roles=[turn[3] for turn in turns],
        asks=np.array([turn[4] for turn in turns], bool),
        before=np.array([place.get(turn[5], -1) for turn in turns], np.int64),
        after=np.array([place.get(turn[6], -1) for turn in turns], np.int64),
    )


def _turns(database: Database, rows: Iterable[int]) -> list[tuple[Any, ...]]:
    """(row, tenant, name, role, whether it asks, the row before it in its session, the row after it)."""
    same = " AND ".join(f"other.{level} = records.{level}" for level in LEVELS)
    turns = database.query(
        "SELECT seq, tenant, name, role, substr(rtrim(text), -1) IN ('?', '\uff1f'), "
        f"iif(session = '', NULL, (SELECT max(seq) FROM records AS other WHERE {same} AND other.seq < records.seq)), "
        f"iif(session = '', NULL, (SELECT min(seq) FROM records AS other WHERE {same} AND other.seq > records.seq)) "
        "FROM records WHERE seq IN (SELECT value FROM json_each(?)) ORDER BY seq",
        (json.dumps(sorted(rows)),),
    )
    return [tuple(turn) for turn in turns]


def _parts(
    pool: _Pool, words: Mapping[int, float], cosines: Mapping[int, float], evidence: float, query: str
) -> dict[str, Numbers]:
    """Each signal's part of each record's score."""
    import numpy as np

    # A record without a vector counts as an average one.
    usual = sum(cosines.values()) / len(cosines) if cosines else 0.0
    bm25 = np.array([words.get(row, 0.0) for row in pool.rows])
    dense = np.array([cosines.get(row, usual) - usual for row in pool.rows])

    def window(own: Numbers, share: float) -> Numbers:
        """A turn's score and a share of its neighbours'; an answer takes its question's once more."""
        padded = np.append(own, 0.0)
        before, asked = padded[pool.before], np.append(pool.asks, False)[pool.before]
        return np.asarray(own + share * (before * (1 + asked) + padded[pool.after]))

    signals = {"bm25": bm25, "bm25_window": window(bm25, 1.0), "dense": dense, "dense_window": window(dense, 0.5)}
    signals = {name: (signal - signal.mean()) / (signal.std() + 1e-6) for name, signal in signals.items()}
    if cosines:
        low, high = EVIDENCE
        trust = min(1.0, max(0.0, (evidence - low) / (high - low)))
        signals |= {name: signals[name] * trust for name in ("bm25", "bm25_window")}
    signals["assistant"] = np.array([float(role == "assistant") for role in pool.roles])
    signals["question"] = pool.asks.astype(np.float64)
    said = [name for name in set(pool.names) if name and re.search(rf"\b{re.escape(name)}\b", query, re.IGNORECASE)]
    signals["speaker"] = np.array([float(said == [name]) for name in pool.names])
    return {name: WEIGHTS[name] * signal for name, signal in signals.items()}
