"""Search over records without a language model: words (FTS5, BM25) and meaning (vectors), weighed by their evidence.

Knows how signals are computed and added up. A record's scope, validity and the caller's ``where`` are conditions inside
every statement, never a filter over what was found. Knows nothing of embedders: the query's vector comes in as numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentmem.database import Database
from agentmem.types import Hit, Scope

from .conditions import Condition, joined, matching, valid_at, visible
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

#: Weights of the signals, each in standard deviations over the pool. Chosen on the development half of LoCoMo and
#: PrefEval (tests/benchmarks): a turn's neighbours say more than the turn itself, and an answer more than its question.
WEIGHTS = {"bm25": 0.5, "bm25_window": 1.0, "dense": 0.3, "dense_window": 1.0, "question": -1.0, "speaker": 1.0}
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
    import numpy as np

    query, k = check_query(query), check_k(k)
    when = moment(at, "at")
    conditions = joined([visible(scope), valid_at(now if when is None else utc_seconds(when)), matching(where)])
    allowed = _allowed(database, conditions)
    count = sum(len(rows) for rows in allowed.values())
    limit = min(count, max(POOL, 2 * k))
    words, evidence = _lexical(database, terms(query), conditions, count)
    found = set(sorted(words, key=words.__getitem__, reverse=True)[:limit])
    cosines: dict[int, float] = {}
    if index is not None and vector is not None:
        rows, scores = index.search(vector, limit, allowed)
        cosines = dict(zip(rows.tolist(), scores.tolist(), strict=True))
        found |= cosines.keys()
    pool = _pool(database, found, allowed)
    if not pool:
        return []
    if index is not None and vector is not None:
        cosines |= index.scores(vector, _by_tenant(turn for turn in pool if turn.row not in cosines))
    parts = _parts(pool, words, cosines, evidence, query)
    total = np.sum(list(parts.values()), axis=0)
    best = sorted(range(len(pool)), key=lambda i: (-total[i], -pool[i].row))[:k]
    kept = records.at_rows([pool[i].row for i in best], scope)
    hits = []
    for i in best:
        row = pool[i].row
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


@dataclass(frozen=True)
class _Turn:
    """A record in the pool: its row, its neighbours in the same session, and what its form says."""

    row: int
    tenant: str
    before: int | None
    after: int | None
    asks: bool
    name: str | None


def _allowed(database: Database, conditions: Condition) -> dict[str, Rows]:
    """The rows that may be found, by tenant, ascending."""
    import numpy as np

    sql, values = conditions
    groups: dict[str, list[int]] = {}
    for tenant, row in database.query(f"SELECT tenant, seq FROM records WHERE {sql}", values):
        groups.setdefault(tenant, []).append(row)
    return {tenant: np.sort(np.array(rows, np.int64)) for tenant, rows in groups.items()}


def _lexical(
    database: Database, words: Sequence[str], conditions: Condition, count: int
) -> tuple[dict[int, float], float]:
    """BM25 by row, and the evidence: what the best row has of the score that a row with all the words would have.

    FTS5's own bm25() takes a word's rarity from every tenant's records: a neighbour could change what is found here,
    and scores would tell of foreign texts. So its idf is divided out, and that of the allowed rows is put in.
    """
    sql, values = conditions
    scores: dict[int, float] = {}
    possible = 0.0
    everything = database.query("SELECT count(*) FROM records")[0][0]
    for word in words:
        quoted = f'"{word}"'
        rows = database.query(
            "SELECT records.seq, bm25(records_fts) "
            "FROM records_fts CROSS JOIN records ON records.seq = records_fts.rowid "
            f"WHERE records_fts MATCH ? AND {sql}",
            [quoted, *values],
        )
        rarity = math.log1p((count - len(rows) + 0.5) / (len(rows) + 0.5))
        possible += rarity * SATURATION
        if not rows:
            continue
        having = database.query("SELECT count(*) FROM records_fts WHERE records_fts MATCH ?", (quoted,))[0][0]
        theirs = math.log(max(everything - having + 0.5, 0.5) / (having + 0.5))
        theirs = theirs if theirs > 0 else 1e-6  # as FTS5 does
        for row, score in rows:
            scores[row] = scores.get(row, 0.0) - score / theirs * rarity
    return scores, max(scores.values(), default=0.0) / possible if possible else 0.0


def _pool(database: Database, found: set[int], allowed: Mapping[str, Rows]) -> list[_Turn]:
    """What was found and its neighbours: the turn that answers is often the one beside the turn that matches."""
    pool = _turns(database, found, allowed)
    beside = {row for turn in pool for row in (turn.before, turn.after) if row is not None} - found
    return pool + (_turns(database, beside, allowed) if beside else [])


def _turns(database: Database, rows: set[int], allowed: Mapping[str, Rows]) -> list[_Turn]:
    import numpy as np

    same = " AND ".join(f"other.{level} = records.{level}" for level in ("tenant", "user", "agent", "session"))
    turns = database.query(
        "SELECT seq, tenant, name, substr(rtrim(text), -1) IN ('?', '\uff1f') AS asks, "
        f"iif(session = '', NULL, (SELECT max(seq) FROM records AS other WHERE {same} AND other.seq < records.seq)), "
        f"iif(session = '', NULL, (SELECT min(seq) FROM records AS other WHERE {same} AND other.seq > records.seq)) "
        "FROM records WHERE seq IN (SELECT value FROM json_each(?)) ORDER BY seq",
        (json.dumps(sorted(rows)),),
    )

    def seen(tenant: str, row: int | None) -> int | None:
        """``row`` if it is allowed: what a condition leaves out has no say in what is found."""
        if row is None:
            return None
        at = int(np.searchsorted(allowed[tenant], row))
        return row if at < len(allowed[tenant]) and allowed[tenant][at] == row else None

    return [
        _Turn(row, tenant, seen(tenant, before), seen(tenant, after), bool(asks), name)
        for row, tenant, name, asks, before, after in turns
        if seen(tenant, row) is not None
    ]


def _by_tenant(turns: Any) -> dict[str, Rows]:
    import numpy as np

    groups: dict[str, list[int]] = {}
    for turn in turns:
        groups.setdefault(turn.tenant, []).append(turn.row)
    return {tenant: np.array(rows, np.int64) for tenant, rows in groups.items()}


def _parts(
    pool: Sequence[_Turn], words: Mapping[int, float], cosines: Mapping[int, float], evidence: float, query: str
) -> dict[str, Numbers]:
    """Each signal's part of each turn's score."""
    import numpy as np

    usual = sum(cosines.values()) / len(cosines) if cosines else 0.0
    asks = {turn.row: turn.asks for turn in pool}

    def window(scores: Mapping[int, float], share: float, missing: float) -> Numbers:
        """A turn's score and a share of its neighbours'; an answer takes its question's once more."""

        def at(row: int | None) -> float:
            return 0.0 if row is None else share * scores.get(row, missing)

        return np.array(
            [
                scores.get(turn.row, missing)
                + at(turn.before) * (2 if turn.before is not None and asks.get(turn.before) else 1)
                + at(turn.after)
                for turn in pool
            ]
        )

    signals = {
        "bm25": np.array([words.get(turn.row, 0.0) for turn in pool]),
        "bm25_window": window(words, 1.0, 0.0),
        "dense": np.array([cosines.get(turn.row, usual) for turn in pool]),
        "dense_window": window(cosines, 0.5, usual),
    }
    signals = {name: (signal - signal.mean()) / (signal.std() + 1e-6) for name, signal in signals.items()}
    if cosines:
        low, high = EVIDENCE
        trust = min(1.0, max(0.0, (evidence - low) / (high - low)))
        signals["bm25"] = signals["bm25"] * trust
        signals["bm25_window"] = signals["bm25_window"] * trust
    signals["question"] = np.array([float(turn.asks) for turn in pool])
    named = {
        turn.name for turn in pool if turn.name and re.search(rf"\b{re.escape(turn.name)}\b", query, re.IGNORECASE)
    }
    speaker = named.pop() if len(named) == 1 else None
    signals["speaker"] = np.array([float(speaker is not None and turn.name == speaker) for turn in pool])
    return {name: WEIGHTS[name] * signal for name, signal in signals.items()}
