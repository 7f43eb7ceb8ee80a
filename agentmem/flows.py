"""The verbs on records, each once: flows (flow.py) where something from outside is needed, plain functions where not.

Each gets the engine and the scope of the handle it was called on; the scope is part of every look-up's key. ``chat``
has a room of its own (chat.py), export and load too (transfer.py).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import prompt
from .engine import Engine
from .errors import InvalidInput, ProviderError, StoreError
from .flow import Embed, Flow
from .forgetting import drop_derived, learnt_questions, record_ids, retire_ended
from .plaintext import lineage
from .plaintext import search as searching
from .plaintext.conditions import matching
from .plaintext.drafts import Draft, check_k, drafts, moment, passage, redacted_metadata, utc_seconds
from .plaintext.rows import Passages
from .progress import progress
from .publishing import withdraw
from .serving import Served
from .types import Compaction, Context, Hit, Record, Scope, Usage, Verification

if TYPE_CHECKING:
    from .plaintext.encoded import Embedder, Encoded

__all__ = [
    "add",
    "catch_up",
    "compact",
    "context",
    "embedded",
    "encoded_query",
    "note_embeddings",
    "search",
    "update",
    "verify",
]

#: Texts embedded at once when records of another embedder are embedded again.
BATCH = 256
#: Records that `context` shows at most.
CONTEXT_K = 50

When = dt.datetime | str | None
_log = logging.getLogger("agentmem")


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
    trust: str | None = None,
    supersedes: str | Sequence[str] | None = None,
) -> Flow[list[Record]]:
    """Normalise, embed in one call, store in one transaction. No language model in the path."""
    new = drafts(
        content,
        scope=scope,
        metadata=metadata,
        at=at,
        valid_from=valid_from,
        valid_until=valid_until,
        source=source,
        trust=trust,
        redact=engine.redact,
    )
    old: list[str] = []
    ended = False
    if supersedes is not None:
        old = engine.records.select(scope, ids=record_ids(supersedes, "supersedes"))
        new = [_from_then(draft, engine.clock()) for draft in new]
    noted: list[Usage] = []
    vectors = yield from embedded(engine, [(draft.text, draft.name) for draft in new], noted)
    space = engine.space
    with engine.database.write() as connection:
        records = engine.records.insert(new, vectors, space)
        if old and new:
            engine.records.end(
                old, scope, min((draft.valid_from for draft in new if draft.valid_from), key=utc_seconds)
            )
            lineage.link(connection, "supersedes", [(record.id, id_) for record in records for id_ in old])
            ended = retire_ended(engine, old)
        note_embeddings(engine, scope, noted)
    if ended:
        engine.finish_erasures()
        withdraw(engine, [])
    return records


def _from_then(draft: Draft, now: float) -> Draft:
    """The draft of something that took another's place: it holds from when it was said to, or was said, or from now."""
    begins = draft.valid_from or draft.at or dt.datetime.fromtimestamp(now, dt.UTC)
    if draft.valid_until is not None and utc_seconds(draft.valid_until) <= utc_seconds(begins):
        raise InvalidInput(f"valid_until {draft.valid_until.isoformat()} must lie after {begins.isoformat()}")
    return replace(draft, valid_from=begins)


def embedded(
    engine: Engine, said: Sequence[tuple[str, str | None]], noted: list[Usage], *, by: Served | None = None
) -> Flow[Passages | None]:
    """The vectors of these (text, name), passage by passage, or None where search is lexical only.

    They know their space: the folder may turn to another one before they are stored. What an embedder outside this
    machine was asked for, or any one where this machine's seconds have a price, is appended to ``noted``, for
    `note_embeddings`. ``by`` is another embedder than what serves.
    """
    served = by or engine.serving.now()
    if served is None or not said:
        return None
    embedder = served.embedder
    import numpy as np

    from .plaintext.encoded import passages_with
    from .plaintext.late import pack

    spans = [passages_with(embedder, text, name) for text, name in said]
    texts = [
        passage(text[start:stop], name)
        for (text, name), pieces in zip(said, spans, strict=True)
        for start, stop in pieces
    ]
    vectors: list[Any] = []
    codes: list[bytes] = []
    # Token vectors are large until they are packed: a long list is never in memory whole.
    for first in range(0, len(texts), BATCH):
        encoded = yield from _encoded(engine, embedder, texts[first : first + BATCH], noted)
        vectors.append(encoded.vectors)
        codes += map(pack, encoded.tokens or ())
    packed = codes if len(codes) == len(texts) else None
    return Passages(spans, np.concatenate(vectors), packed, space=served.space)


def embedded_if_up(engine: Engine, new: Sequence[Draft], noted: list[Usage], what: str) -> Flow[Passages | None]:
    """As `embedded`, of drafts that must not be lost where the embedder fails: ``what`` it is, is logged, and its
    vectors are made at the next search."""
    try:
        return (yield from embedded(engine, [(draft.text, draft.name) for draft in new], noted))
    except ProviderError as error:
        _log.warning("%s is stored without vectors, the embedder failed: %s", what, error)
        return None


def encoded_query(engine: Engine, query: str, noted: list[Usage]) -> Flow[Encoded | None]:
    """What is searched with: the query's vector and those of its tokens, or None where search is lexical only."""
    while (served := engine.serving.now()) is not None:
        encoded = yield from _encoded(engine, served.embedder, [query], noted, query=True)
        if engine.space == served.space:  # else the folder turned to another embedder meanwhile
            return encoded
    return None


def _encoded(
    engine: Engine, embedder: Embedder, texts: Sequence[str], noted: list[Usage], *, query: bool = False
) -> Flow[Encoded]:
    begun = time.perf_counter()
    encoded: Encoded = yield Embed(embedder, texts, query=query)
    if (count := getattr(embedder, "count_tokens", None)) is not None:
        noted.append(Usage(input_tokens=count(texts), total_s=time.perf_counter() - begun))
    elif engine.ledger.costs.second is not None:  # this machine's: only where its seconds were given a price
        noted.append(Usage(total_s=time.perf_counter() - begun))
    return encoded


def note_embeddings(engine: Engine, scope: Scope, noted: Sequence[Usage]) -> None:
    """Write uses of the embedder into the ledger, in the transaction that is open, if one is."""
    embedder = engine.embedder if noted else None
    here = getattr(embedder, "count_tokens", None) is None
    for usage in noted:
        engine.ledger.note("embed", embedder.name if embedder else "", scope, usage, here=here)


def catch_up(engine: Engine) -> Flow[int]:
    """Embed the records that have no vector in this embedder's space: left by another embedder or by a failed one.

    Batch by batch, each committed, so that it can be interrupted and goes on where it stopped. Returns how many.
    """
    served = engine.serving.now()
    done = 0
    if served is None:
        return done
    space = served.space
    rows = engine.records.pending(space, limit=BATCH)
    if not rows:
        return done
    with progress("embedding") if len(rows) == BATCH else contextlib.nullcontext() as moved:
        total = engine.records.count(Scope()) if moved else 0
        while rows:
            noted: list[Usage] = []
            vectors = yield from embedded(engine, [(text, name) for _, text, name in rows], noted, by=served)
            with engine.database.write():
                done += engine.records.embed_rows(rows, vectors, space) if vectors is not None else 0
                note_embeddings(engine, Scope(), noted)
            if moved:
                moved(done, total)
            rows = engine.records.pending(space, limit=BATCH)
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
    noted: list[Usage] | None = None,
    words_if_down: bool = False,
    without: Collection[str] = (),
) -> Flow[list[Hit]]:
    """One embedding, one pass over both indexes, scope and validity inside the search.

    Records whose ids are in ``without`` are left out before anything is scored.
    A caller that gives ``noted`` writes the embedder's use down itself, in a transaction of its own. With
    ``words_if_down`` a failing embedder leaves a search by words, and a warning in the log.
    """
    check_k(k)
    searching.check_query(query)
    matching(where)
    moment(at, "at")
    uses: list[Usage] = [] if noted is None else noted
    encoded = None
    try:
        yield from catch_up(engine)
        encoded = yield from encoded_query(engine, query, uses)
    except ProviderError as error:
        if not words_if_down:
            raise
        _log.warning("searching by words only, the embedder failed: %s", error)
    if noted is None and uses:
        try:
            note_embeddings(engine, scope, uses)
        except StoreError as error:  # a full disk must not keep anybody from reading
            _log.warning("a use of the embedder could not be noted: %s", error)
    return engine.searcher.search(
        query,
        encoded,
        index=None if encoded is None else engine.index,
        tokens=None if encoded is None else engine.tokens,
        scope=scope,
        k=k,
        where=where,
        at=at,
        now=engine.clock(),
        explain=explain,
        without=without,
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
    noted: list[Usage] = []
    vectors = None
    old = engine.records.get(id, scope)
    if metadata is not None and engine.redact is not None:
        metadata = redacted_metadata(engine.redact, metadata)
    if text is not None:
        changed = drafts({"role": old.role, "content": text, "name": old.name}, scope=old.scope, redact=engine.redact)
        text = changed[0].text
        vectors = yield from embedded(engine, [(changed[0].text, changed[0].name)], noted)
    space = engine.space
    with engine.database.write() as connection:
        old = engine.records.get(id, scope)
        asked = {} if text is None else learnt_questions(engine, [id])
        record = engine.records.update(id, scope, text=text, metadata=metadata, vectors=vectors, space=space)
        note_embeddings(engine, scope, noted)
        derived = record.text != old.text and drop_derived(engine, [id], pages=False)
        if record.text != old.text:
            # What was written from the old wording holds no longer, and the new one is to be read.
            told = lineage.derived(engine.database, [id])
            engine.records.end(told, Scope(), dt.datetime.fromtimestamp(engine.clock(), dt.UTC), begun=True)
            read = [record for origins in lineage.sources(engine.database, told).values() for record in origins]
            lineage.redo(connection, [id, *read])
    if derived:
        # What was asked of the text that was learnt, not of one that came and went since.
        engine.questions = asked | engine.questions
        engine.finish_erasures()
        withdraw(engine, [])
    return record


def context(engine: Engine, scope: Scope, query: str | None = None, *, max_tokens: int = 500) -> Flow[Context]:
    """The records that a query needs (or the newest ones) as a fenced block of at most ``max_tokens`` tokens.

    As many as are likely to be evidence, none for small talk; a long one is shown by its best passage.
    """
    from .plaintext.asking import tells
    from .plaintext.fusion import taken

    check_k(max_tokens, "max_tokens")
    if query is None:
        newest = engine.records.newest(scope, limit=200, at=engine.clock())
        hits = [Hit(record=record, score=0.0) for record in newest]
    else:
        hits = yield from search(engine, scope, query, k=CONTEXT_K)
        hits = hits[: taken([hit.score for hit in hits], asking=not tells(query))]
    overhead = engine.count(prompt.quote([]))
    fitting = prompt.fit(map(prompt.shown, hits), max_tokens - overhead, engine.count)
    chosen = {record.id for record in fitting}
    hits = [hit for hit in hits if hit.record.id in chosen]
    text = prompt.quote(fitting) if hits else ""
    return Context(text=text, tokens=engine.count(text) if text else 0, hits=hits)


def compact(engine: Engine) -> Compaction:
    """Give back the room of what was deleted and leave no byte of it: in the database, its log, the vector index and
    backups made before an upgrade. Derived tables and indexes that are damaged are made anew.

    Needs as much free room as ``memory.db`` has bytes, else `Full`. Other processes read on meanwhile; their writes
    wait. Can be interrupted: what was done stays done, nothing is lost.
    """
    before = engine.bytes_held()
    engine.finish_erasures()
    engine.database.drop_backups()
    emptied = engine.database.compact()
    if engine.index is not None:
        engine.index.compact()
        engine.index.rewrite()
    return Compaction(before=before, after=engine.bytes_held(), emptied=emptied)


def verify(engine: Engine) -> Verification:
    """Check every record, vector, page, saved slot and LoRA version against its checksum, and what the database says
    against its own totals."""
    problems: list[str] = []
    facts: list[str] = []
    counts = {"records": 0, "pages": 0, "loras": 0, "slots": 0}

    def slots() -> list[str]:
        counts["slots"], damaged = engine.slots.verify()
        return damaged

    def count() -> list[str]:
        for table in ("records", "pages", "loras"):
            held = " WHERE state != 'retired'" if table == "loras" else ""
            counts[table] = engine.database.query(f"SELECT count(*) FROM {table}{held}")[0][0]
        return []

    def index() -> list[str]:
        if engine.index is None:
            return []
        found = engine.index.verify()
        facts.extend(engine.index.facts())
        return found

    for check in (engine.records.verify, index, engine.pages.verify, slots, engine.registry.verify, count):
        try:
            problems += check()
        except StoreError as error:  # damage that keeps one check from being made is itself a finding
            problems.append(str(error))
    return Verification(**counts, problems=list(dict.fromkeys(problems)), facts=facts)
