"""What a record said before, what took its place, and what changed in a matter.

Validity is about the world: a record that was superseded holds until its successor does, and a search as of then finds
it. Versions are about the store: a correction replaces a text for all times and the old wording is kept here alone.
"""

from __future__ import annotations

import datetime as dt
import itertools

from .engine import Engine
from .errors import InvalidInput
from .flow import Flow
from .flows import search
from .plaintext import lineage
from .plaintext.conditions import visible
from .plaintext.drafts import check_text, utc_seconds
from .types import Change, Record, Scope

__all__ = ["history"]

#: How many records a matter is looked for in, among those that hold and among those that ended.
FOUND = 20
#: Those that hold are of the matter if they are this likely beside the likeliest one.
BESIDE = 0.1


def history(
    engine: Engine, scope: Scope, id: str | None = None, *, about: str | None = None
) -> Flow[list[Record] | list[Change]]:
    """The versions of a record and of all in its chain, or with ``about`` the changes of a matter."""
    if (id is None) == (about is None):
        raise InvalidInput("history needs an id or about=…, one of them")
    if about is None:
        assert id is not None
        engine.records.get(id, scope)
        return [version for versions in _chain(engine, scope, id) for version in versions]
    check_text(about, "about")
    hits = yield from search(engine, scope, about, k=FOUND)
    near = [hit.record.id for hit in hits if hit.score >= BESIDE * hits[0].score]
    found = dict.fromkeys(near + _ended(engine, scope, about))
    changes: list[Change] = []
    seen: set[str] = set()
    for id_ in found:
        if id_ not in seen:
            versions = _chain(engine, scope, id_)
            seen.update(told[-1].id for told in versions)
            changes += _changes(engine, versions)
    return sorted(changes, key=lambda change: utc_seconds(change.at) if change.at else 0.0)


def _chain(engine: Engine, scope: Scope, id_: str) -> list[list[Record]]:
    """The versions of each record in the chain that this scope sees, in order of arrival."""
    members = engine.records.named(lineage.chain(engine.database, id_), scope)
    return [engine.records.history(member.id, scope) for member in members]


def _changes(engine: Engine, chain: list[list[Record]]) -> list[Change]:
    """The steps of a chain; none for a record that nothing ever happened to."""
    current = {versions[-1].id: versions[-1] for versions in chain}
    superseding = [
        (new, old) for new, old in lineage.edges(engine.database, list(current)) if new in current and old in current
    ]
    newer, older = {new for new, _ in superseding}, {old for _, old in superseding}
    steps: list[Change] = []
    for versions in chain:
        last = versions[-1]
        if last.id not in newer:
            steps.append(Change(at=last.valid_from or last.at or versions[0].created, old=None, new=versions[0]))
        steps += [
            Change(at=new.created, old=old, new=new)
            for old, new in itertools.pairwise(versions)
            if old.text != new.text
        ]
        if last.valid_until is not None and last.id not in older and _past(engine, last.valid_until):
            steps.append(Change(at=last.valid_until, old=last, new=None))
    first = {versions[-1].id: versions[0] for versions in chain}
    steps += [Change(at=current[old].valid_until, old=current[old], new=first[new]) for new, old in superseding]
    return steps if len(steps) > 1 else []


def _past(engine: Engine, moment: dt.datetime) -> bool:
    return utc_seconds(moment) <= engine.clock()


def _ended(engine: Engine, scope: Scope, about: str) -> list[str]:
    """Records that hold no longer and share words with ``about``, the best first: a search finds what holds."""
    from .plaintext.postings import terms

    words = terms(about)
    if not words:
        return []
    sql, values = visible(scope)
    rows = engine.database.query(
        "SELECT records.id FROM records_fts CROSS JOIN records ON records.seq = records_fts.rowid WHERE records_fts"
        f" MATCH ? AND records.until_s <= ? AND {sql} ORDER BY bm25(records_fts) LIMIT ?",
        [" OR ".join(f'"{word}"' for word in words), engine.clock(), *values, FOUND],
    )
    return [row["id"] for row in rows]
