"""The verbs on records, each once: flows (flow.py) where something from outside is needed, plain functions where not.

Each gets the engine and the scope of the handle it was called on; the scope is part of every look-up's key. ``chat``
has a room of its own (chat.py), export and load too (transfer.py).
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import prompt
from .engine import Engine
from .errors import InvalidInput, ScopeError
from .flow import Embed, Flow
from .ledger import Report
from .plaintext import search as searching
from .plaintext.drafts import Draft, check_k, drafts
from .types import Context, Erasure, Hit, Record, Scope, Verification

__all__ = ["add", "catch_up", "context", "embedded", "forget", "report", "search", "update", "verify"]

#: Texts embedded at once when records of another embedder are embedded again.
BATCH = 256

When = dt.datetime | str | None


def add(
    engine: Engine,
    scope: Scope,
    content: Any,
    *,
    metadata: Mapping[str, Any] | None = None,
    at: When = None,
    valid_from: When = None,
    valid_until: When = None,
    source: str | None = None,
) -> Flow[list[Record]]:
    """Normalise, embed in one call, store in one transaction. No language model in the path."""
    new = drafts(
        content, scope=scope, metadata=metadata, at=at, valid_from=valid_from, valid_until=valid_until, source=source
    )
    vectors = yield from embedded(engine, new)
    return engine.records.insert(new, vectors, engine.space)


def embedded(engine: Engine, new: Sequence[Draft]) -> Flow[Any]:
    """The vectors of these drafts or records, or None where search is lexical only."""
    embedder = engine.embedder
    if embedder is None or not new:
        return None
    return (yield Embed(embedder, [draft.passage for draft in new]))


def catch_up(engine: Engine) -> Flow[int]:
    """Embed the records that have no vector in this embedder's space: left by another embedder or by a failed one.

    Batch by batch, each committed, so that it can be interrupted and goes on where it stopped. Returns how many.
    """
    space, embedder = engine.space, engine.embedder
    done = 0
    if space is None or embedder is None:
        return done
    while rows := engine.records.pending(space, limit=BATCH):
        vectors = yield Embed(embedder, [passage for _, passage in rows])
        done += engine.records.embed_rows(rows, vectors, space)
    return done


def search(
    engine: Engine,
    scope: Scope,
    query: str,
    *,
    k: int = 10,
    where: Mapping[str, Any] | None = None,
    at: When = None,
    explain: bool = False,
) -> Flow[list[Hit]]:
    """One embedding, one pass over both indexes, scope and validity inside the search."""
    check_k(k)
    searching.check_query(query)
    yield from catch_up(engine)
    vector = None
    if engine.embedder is not None:
        vector = (yield Embed(engine.embedder, [query], query=True))[0]
    return searching.search(
        engine.database,
        engine.records,
        engine.index,
        vector,
        query,
        scope=scope,
        k=k,
        where=where,
        at=at,
        now=engine.clock(),
        explain=explain,
    )


def update(
    engine: Engine,
    scope: Scope,
    id: str,
    *,
    text: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Flow[Record]:
    """A new version of a record. Core blocks and LoRA versions made from the old text are dropped or retired."""
    vector = None
    old = engine.records.get(id, scope)
    if text is not None and engine.embedder is not None:
        changed = drafts({"role": old.role, "content": text, "name": old.name}, scope=old.scope)
        vector = (yield Embed(engine.embedder, [changed[0].passage]))[0]
    with engine.database.write():
        record = engine.records.update(id, scope, text=text, metadata=metadata, vector=vector, space=engine.space)
        if text is not None and text != old.text:
            _drop_derived(engine, [id], pages=False)
    engine.finish_erasures()
    return record


def forget(
    engine: Engine,
    scope: Scope,
    ids: str | Sequence[str] | None = None,
    *,
    where: Mapping[str, Any] | None = None,
    everything: bool = False,
    dry_run: bool = False,
) -> Erasure:
    """Erase records and all that was made from them.

    The rows go, and what is to be deleted beyond them is written down, in one transaction; then the files are deleted.
    Interrupted in between, the rest is deleted at the next open.
    """
    if (ids is None) == (where is None):
        raise InvalidInput("forget needs ids or where=…, one of them; where={} means everything in this scope")
    if where is not None and not where and scope == Scope() and not everything:
        raise ScopeError("where={} on the root handle would erase every scope: add everything=True to do that")
    if ids is not None and not isinstance(ids, Iterable):
        raise InvalidInput(f"ids is a {type(ids).__name__}: give a record id or a list of them")
    wanted = [ids] if isinstance(ids, str) else None if ids is None else list(ids)
    dry_run = bool(dry_run)
    with engine.database.write():
        gone = engine.records.select(scope, ids=wanted, where=where)
        receipt = _receipt(engine, gone, dry_run=dry_run)
        if dry_run or not gone:
            return receipt
        counts = engine.records.delete(gone)
        receipt = receipt.model_copy(update={"versions": counts.versions, "vectors": counts.vectors})
        _drop_derived(engine, gone, pages=True, vectors=True)
        with engine.database.write() as connection:
            connection.executemany("DELETE FROM shown WHERE record = ?", [(record,) for record in gone])
            connection.executemany(
                "DELETE FROM lineage WHERE kind = 'reply' AND (record = ? OR key = ?)", [(r, r) for r in gone]
            )
    engine.finish_erasures()
    return receipt


def _made_from(engine: Engine, kind: str, records: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for record in records:
        rows = engine.database.query("SELECT key FROM lineage WHERE record = ? AND kind = ?", (record, kind))
        found.update((row["key"], None) for row in rows)
    return list(found)


def _receipt(engine: Engine, gone: Sequence[str], *, dry_run: bool) -> Erasure:
    forgotten = set(gone)
    return Erasure(
        dry_run=dry_run,
        records=list(gone),
        pages=engine.pages.made_from(gone) if _made_from(engine, "page", gone) else [],
        cores=_made_from(engine, "core", gone),
        loras=_made_from(engine, "lora", gone),
        replies=[reply for reply in _made_from(engine, "reply", gone) if reply not in forgotten],
        hosted=engine.ledger.may_hold(gone),
    )


def _drop_derived(engine: Engine, records: Sequence[str], *, pages: bool, vectors: bool = False) -> None:
    """Drop core blocks now and write down which pages and LoRA versions are to go (`Engine.finish_erasures`)."""
    work = {
        "pages": engine.pages.made_from(records) if pages and _made_from(engine, "page", records) else [],
        "loras": _made_from(engine, "lora", records),
        "vectors": vectors,
    }
    with engine.database.write() as connection:
        for core in _made_from(engine, "core", records):
            levels = json.loads(core)
            connection.execute("DELETE FROM cores WHERE tenant = ? AND user = ? AND agent = ? AND session = ?", levels)
            connection.execute("DELETE FROM lineage WHERE kind = 'core' AND key = ?", (core,))
        connection.execute("INSERT INTO erasures (at, work) VALUES (?, ?)", (engine.clock(), json.dumps(work)))


def context(engine: Engine, scope: Scope, query: str | None = None, *, max_tokens: int = 500) -> Flow[Context]:
    """The records for a query (or the newest ones) as a fenced block of at most ``max_tokens`` tokens."""
    check_k(max_tokens, "max_tokens")
    if query is None:
        newest = engine.records.newest(scope, limit=200)
        hits = [Hit(record=record, score=0.0) for record in newest]
    else:
        hits = yield from search(engine, scope, query, k=50)
    overhead = engine.count(prompt.quote([]))
    chosen = {record.id for record in prompt.fit([hit.record for hit in hits], max_tokens - overhead, engine.count)}
    hits = [hit for hit in hits if hit.record.id in chosen]
    text = prompt.quote(hit.record for hit in hits) if hits else ""
    return Context(text=text, tokens=engine.count(text) if text else 0, hits=hits)


def report(engine: Engine, scope: Scope) -> Report:
    """What memory cost and saved in this scope and beneath it."""
    held = engine.database.query(
        "SELECT (SELECT COUNT(*) FROM pages) AS pages, (SELECT COUNT(*) FROM loras WHERE state != 'retired') AS loras"
    )[0]
    return Report(
        lines=engine.ledger.lines(scope),
        bytes=engine.bytes_held(),
        records=engine.records.count(scope),
        pages=held["pages"],
        loras=held["loras"],
    )


def verify(engine: Engine) -> Verification:
    """Check every record, vector, page and LoRA version against its checksum."""
    problems = list(engine.records.verify())
    if engine.index is not None:
        problems += engine.index.verify()
    problems += engine.pages.verify()
    problems += engine.registry.verify()
    held = engine.database.query("SELECT (SELECT COUNT(*) FROM pages) AS pages, (SELECT COUNT(*) FROM loras) AS loras")[
        0
    ]
    return Verification(
        records=engine.records.count(Scope()), pages=held["pages"], loras=held["loras"], problems=problems
    )
