"""Forgetting: the records of a scope with all that was made from them, and the receipt that says what went.

Knows every derived thing that lineage leads to and in which order they go; the files are deleted by the engine, after
the transaction. What a LoRA version learnt wrongly from now on (a record was changed, or ended) is taken back here too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .engine import Engine
from .errors import InvalidInput, ScopeError
from .ledger.uses import LISTED
from .plaintext import lineage
from .provider import HoldsSlots
from .publishing import withdraw
from .types import Erasure, Record, Scope

if TYPE_CHECKING:
    from .parametric.corpus import Example

__all__ = ["drop_derived", "forget", "learnt_questions", "questions_of", "record_ids", "retire_ended"]


def record_ids(ids: Any, what: str) -> list[str]:
    """Record ids as a list; each is looked up later, so only the shape is checked here."""
    if isinstance(ids, str):
        return [ids]
    if isinstance(ids, (bytes, Mapping)) or not isinstance(ids, Iterable):
        raise InvalidInput(f"{what} is a {type(ids).__name__}: give a record id or a list of them")
    return list(ids)


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
    Interrupted in between, the rest is deleted at the next open. What was extracted from a forgotten record goes with
    it; where it was also written from others, those are read again by the next extraction. LoRA versions that learnt
    one answer nobody from the same transaction on; `learning.retrain` trains their shards again without it.
    """
    if (ids is None) == (where is None):
        raise InvalidInput("forget needs ids or where=…, one of them; where={} means everything in this scope")
    if where is not None and not where and scope == Scope() and not everything:
        raise ScopeError("where={} on the root handle would erase every scope: add everything=True to do that")
    wanted = None if ids is None else record_ids(ids, "ids")
    receipt, asked = engine.database.despite_full(lambda: _erase(engine, scope, wanted, where, dry_run=bool(dry_run)))
    if receipt.records and not receipt.dry_run:
        engine.questions.update(asked)
        engine.finish_erasures()
        # Also where no version is retired now: one that ended before may be at an engine still.
        if told := withdraw(engine, receipt.loras):
            receipt = receipt.model_copy(update={"hosted": [*receipt.hosted, *told]})
    return receipt


def _erase(
    engine: Engine, scope: Scope, ids: list[str] | None, where: Mapping[str, Any] | None, *, dry_run: bool
) -> tuple[Erasure, dict[str, tuple[Example, ...]]]:
    """The one transaction of `forget`: the receipt, and what may be asked about records that a LoRA version learnt."""
    with engine.database.write():
        gone = engine.records.select(scope, ids=ids, where=where)
        # A text that a model wrote from a forgotten one says what should be gone, whatever else it was written from.
        written = lineage.derived(engine.database, gone)
        read = [record for origins in lineage.sources(engine.database, written).values() for record in origins]
        gone += written
        receipt = _receipt(engine, gone, dry_run=dry_run)
        if dry_run or not gone:
            return receipt, {}
        asked = learnt_questions(engine, gone) if receipt.loras else {}
        counts = engine.records.delete(gone)
        receipt = receipt.model_copy(update={"versions": counts.versions, "vectors": counts.vectors})
        drop_derived(engine, gone, pages=True, vectors=True)
        with engine.database.write() as connection:
            connection.executemany("DELETE FROM shown WHERE record = ?", [(record,) for record in gone])
            connection.executemany("DELETE FROM kept WHERE record = ? OR turn = ?", [(r, r) for r in gone])
            connection.executemany(
                "DELETE FROM lineage WHERE kind = 'reply' AND (record = ? OR key = ?)", [(r, r) for r in gone]
            )
            lineage.forget_links(connection, gone)
            lineage.redo(connection, read)
    return receipt, asked


def _made_from(engine: Engine, kind: str, records: Sequence[str]) -> list[str]:
    rows = engine.database.query(
        f"SELECT DISTINCT key FROM lineage WHERE kind = ? AND record IN ({LISTED}) ORDER BY key",
        (kind, json.dumps(records)),
    )
    return [row["key"] for row in rows]


def _receipt(engine: Engine, gone: Sequence[str], *, dry_run: bool) -> Erasure:
    forgotten = set(gone)
    rows = engine.records.rows_of(gone)
    return Erasure(
        dry_run=dry_run,
        records=list(gone),
        versions=rows.versions,
        vectors=rows.vectors,
        pages=engine.pages.made_from(gone) if _made_from(engine, "page", gone) else [],
        cores=_made_from(engine, "core", gone),
        loras=_made_from(engine, "lora", gone),
        slots=engine.slots.made_from(gone),
        saved=engine.pages.saved_with(gone),
        replies=[reply for reply in _made_from(engine, "reply", gone) if reply not in forgotten],
        hosted=engine.ledger.may_hold(gone),
    )


def drop_derived(engine: Engine, records: Sequence[str], *, pages: bool, vectors: bool = False) -> bool:
    """Drop core blocks, take LoRA versions out of use, and write down which files are to go (`Engine.finish_erasures`).

    In the transaction that is open. Returns True if there is anything to finish.
    """
    work = {
        "pages": engine.pages.made_from(records) if pages and _made_from(engine, "page", records) else [],
        "loras": _taint(engine, records),
        "runs": engine.learning_now(),
        "slots": engine.slots.made_from(records) if pages else [],
        "live": pages and isinstance(engine.provider, HoldsSlots),
        "vectors": vectors,
    }
    with engine.database.write() as connection:
        for core in _made_from(engine, "core", records):
            levels = json.loads(core)
            connection.execute("DELETE FROM cores WHERE tenant = ? AND user = ? AND agent = ? AND session = ?", levels)
            connection.execute("DELETE FROM lineage WHERE kind = 'core' AND key = ?", (core,))
        if any(work.values()):
            connection.execute("INSERT INTO erasures (at, work) VALUES (?, ?)", (engine.clock(), json.dumps(work)))
    return any(work.values())


def _taint(engine: Engine, records: Sequence[str]) -> list[str]:
    """The LoRA versions that learnt one of these: from this transaction on none of them answers anywhere."""
    learnt = _made_from(engine, "lora", records)
    if learnt:
        engine.registry.taint(learnt, records)
    return learnt


def retire_ended(engine: Engine, records: Sequence[str]) -> bool:
    """Take LoRA versions out of use that learnt one of these records which hold no longer (superseded, ended).

    In the transaction that is open; True if `Engine.finish_erasures` has files to delete.
    """
    rows = engine.database.query(
        f"SELECT id FROM records WHERE id IN ({LISTED}) AND until_s <= ?", (json.dumps(records), engine.clock())
    )
    learnt = _taint(engine, [row["id"] for row in rows])
    if learnt:
        work = {"pages": [], "loras": learnt, "vectors": False}
        with engine.database.write() as connection:
            connection.execute("INSERT INTO erasures (at, work) VALUES (?, ?)", (engine.clock(), json.dumps(work)))
    return bool(learnt)


def learnt_questions(engine: Engine, records: Sequence[str]) -> dict[str, tuple[Example, ...]]:
    """By record, the questions that a LoRA version could answer from it: to prove later that it no longer does.

    They hold the record's words, so they are kept in this process's memory only, until the proof is made.
    """
    listed = json.dumps(list(records))
    rows = engine.database.query(
        f"SELECT DISTINCT record FROM lineage WHERE kind = 'lora' AND record IN ({LISTED})", (listed,)
    )
    if not rows:
        return {}
    named = engine.records.named([row["record"] for row in rows], Scope())
    return {record.id: questions_of(record) for record in named}


def questions_of(record: Record) -> tuple[Example, ...]:
    """What can be asked of one record, as it is learnt: trained, held-out and natural wordings."""
    from .parametric import corpus as corpora

    corpus = corpora.build([record.model_copy(update={"trust": "trusted", "valid_until": None})])
    return (*corpus.examples, *corpus.held_out, *corpus.natural)
