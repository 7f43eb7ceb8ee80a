"""Which record came from which: texts written from others (``record``), and what took whose place (``supersedes``).

Knows these two kinds of rows of the table ``lineage`` and the jobs that wrote them; knows nothing of who may see a
record, nor of pages, cores and LoRA versions, which have lineage of their own.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence

from agentmem.database import Database

__all__ = ["chain", "derived", "edges", "forget_links", "link", "redo", "sources"]

_LISTED = "(SELECT value FROM json_each(?))"


def link(connection: sqlite3.Connection, kind: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Note (derived or newer record, source or older record); what is gone by now is passed over."""
    connection.executemany(
        "INSERT OR IGNORE INTO lineage SELECT ?, new.id, old.id FROM records AS new, records AS old"
        " WHERE new.id = ? AND old.id = ?",
        [(kind, new, old) for new, old in pairs],
    )


def derived(database: Database, ids: Sequence[str]) -> list[str]:
    """The records whose text was written from one of these, at any remove, without these; in order of arrival."""
    found: dict[str, None] = {}
    last = list(ids)
    while last:
        rows = database.query(
            f"SELECT DISTINCT id FROM lineage JOIN records ON id = key WHERE kind = 'record' AND record IN {_LISTED}"
            " ORDER BY seq",
            (json.dumps(last),),
        )
        known = {*ids, *found}
        last = [row["id"] for row in rows if row["id"] not in known]
        found.update(dict.fromkeys(last))
    return list(found)


def sources(database: Database, ids: Sequence[str]) -> dict[str, list[str]]:
    """Of each of these records that was written from others: from which."""
    rows = database.query(
        f"SELECT key, record FROM lineage WHERE kind = 'record' AND key IN {_LISTED} ORDER BY key, record",
        (json.dumps(list(ids)),),
    )
    found: dict[str, list[str]] = {}
    for key, record in rows:
        found.setdefault(key, []).append(record)
    return found


def edges(database: Database, ids: Sequence[str]) -> list[tuple[str, str]]:
    """(newer, older) of all that supersede or were superseded by one of these."""
    listed = json.dumps(list(ids))
    rows = database.query(
        f"SELECT key, record FROM lineage WHERE kind = 'supersedes' AND key IN {_LISTED}"
        f" UNION SELECT key, record FROM lineage WHERE kind = 'supersedes' AND record IN {_LISTED}",
        (listed, listed),
    )
    return [(row["key"], row["record"]) for row in rows]


def chain(database: Database, id_: str) -> list[str]:
    """All records that this one is linked with by superseding, itself included, in order of arrival."""
    found = {id_}
    last = [id_]
    while last:
        met = {record for edge in edges(database, last) for record in edge}
        last = sorted(met - found)
        found.update(last)
    rows = database.query(f"SELECT id FROM records WHERE id IN {_LISTED} ORDER BY seq", (json.dumps(sorted(found)),))
    return [row["id"] for row in rows]


def forget_links(connection: sqlite3.Connection, gone: Sequence[str]) -> None:
    """Drop what ties these forgotten records to others. What one of them stood between stays in one chain."""
    for id_ in gone:
        connection.execute(
            "INSERT OR IGNORE INTO lineage SELECT 'supersedes', newer.key, older.record FROM lineage AS newer, lineage"
            " AS older WHERE newer.kind = 'supersedes' AND newer.record = ? AND older.kind = 'supersedes'"
            " AND older.key = ?",
            (id_, id_),
        )
        connection.execute(
            "DELETE FROM lineage WHERE kind IN ('record', 'supersedes') AND (key = ? OR record = ?)", (id_, id_)
        )
        connection.execute("DELETE FROM jobs WHERE record = ?", (id_,))


def redo(connection: sqlite3.Connection, ids: Iterable[str]) -> None:
    """Let what is written from these records be written again by the next run of its job."""
    connection.executemany("DELETE FROM jobs WHERE record = ?", [(id_,) for id_ in ids])
