"""How a record lies in the tables of ``memory.db``: its columns, its checksum, its words and vectors.

Knows one row at a time, inside the caller's transaction. Knows nothing of who may see or change it.
"""

from __future__ import annotations

import datetime as dt
import json
import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from agentmem.errors import Corrupt
from agentmem.types import LEVELS, Record, Scope

from .drafts import Draft, check_metadata, check_scope, check_text, dump_metadata, utc_seconds

__all__ = [
    "build",
    "checksum",
    "drop_words",
    "insert_row",
    "levels",
    "new_row",
    "note_changes",
    "past_rows",
    "record_of",
    "scope_of",
    "version_checksum",
    "write_vectors",
    "write_version",
]

#: What the checksum of a row covers, in this order.
CONTENT = (
    *("id", "text", "role", "name", "at", "valid_from", "valid_until", "from_s", "until_s"),
    *LEVELS,
    *("metadata", "source", "trust", "created", "version"),
)
VERSION = ("id", "version", "text", "metadata", "created")
#: How many rows of ``changes`` are kept: an index that is further behind is rebuilt.
KEPT_CHANGES = 65_536


def levels(scope: Scope) -> list[str]:
    """A scope as its four columns: an unset level is '', which no scope value can be."""
    return [value or "" for _, value in check_scope(scope).levels()]


def new_row(draft: Draft, id_: str, created: float) -> dict[str, Any]:
    """A draft as a row of ``records``."""
    start, end = draft.valid_from, draft.valid_until
    row: dict[str, Any] = {
        "id": id_,
        "text": draft.text,
        "role": draft.role,
        "name": draft.name,
        "at": draft.at.isoformat() if draft.at else None,
        "valid_from": start.isoformat() if start else None,
        "valid_until": end.isoformat() if end else None,
        "from_s": utc_seconds(start) if start else None,
        "until_s": utc_seconds(end) if end else None,
        **dict(zip(LEVELS, levels(draft.scope), strict=True)),
        "metadata": draft.metadata,
        "source": draft.source,
        "trust": draft.trust,
        "created": created,
        "version": 1,
    }
    return {**row, "checksum": checksum(row)}


def insert_row(connection: sqlite3.Connection, row: Mapping[str, Any]) -> int:
    """Store a row; returns its number."""
    columns = (*CONTENT, "checksum")
    cursor = connection.execute(
        f"INSERT INTO records ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
        [row[column] for column in columns],
    )
    return int(cursor.lastrowid or 0)


def past_rows(row: dict[str, Any], past: Sequence[Record]) -> list[dict[str, Any]]:
    """Earlier versions as rows, numbered from 1; the current row comes after them."""
    versions = [
        {
            "id": row["id"],
            "version": number,
            "text": check_text(version.text),
            "metadata": dump_metadata(check_metadata(version.metadata)),
            "created": row["created"] if version.created is None else utc_seconds(version.created),
        }
        for number, version in enumerate(past, start=1)
    ]
    row["version"] = len(versions) + 1
    row["checksum"] = checksum(row)
    return versions


def write_version(connection: sqlite3.Connection, row: Mapping[str, Any]) -> None:
    """Keep what a row says now as a version of it."""
    connection.execute(
        "INSERT INTO versions (id, version, text, metadata, created, checksum) VALUES (?, ?, ?, ?, ?, ?)",
        (*(row[key] for key in VERSION), version_checksum(row)),
    )


def drop_words(connection: sqlite3.Connection, row: sqlite3.Row | Mapping[str, Any]) -> None:
    """Take a row out of the full-text index, which needs the very words that were put in."""
    connection.execute(
        "INSERT INTO records_fts (records_fts, rowid, text, name) VALUES ('delete', ?, ?, ?)",
        (row["seq"], row["text"], row["name"]),
    )


def write_vectors(connection: sqlite3.Connection, space: int | None, rows: Sequence[tuple[str, int, bytes]]) -> None:
    """Store (tenant, row, vector) and note that they changed."""
    connection.executemany(
        "INSERT OR REPLACE INTO vectors (seq, space, vector, checksum) VALUES (?, ?, ?, ?)",
        [(seq, space, blob, zlib.crc32(blob)) for _, seq, blob in rows],
    )
    note_changes(connection, [(tenant, seq, 1) for tenant, seq, _ in rows])


def note_changes(connection: sqlite3.Connection, changes: Sequence[tuple[str, int, int]]) -> None:
    """Note (tenant, row, 1 for added or 0 for removed) for the vector indexes of every process."""
    last = 0
    for change in changes:
        last = connection.execute("INSERT INTO changes (tenant, seq, added) VALUES (?, ?, ?)", change).lastrowid or 0
        if last % 4096 == 0:
            connection.execute("DELETE FROM changes WHERE change < ?", (last - KEPT_CHANGES,))


def checksum(row: sqlite3.Row | Mapping[str, Any]) -> int:
    """CRC-32 over what a row of ``records`` says."""
    return _crc([row[key] for key in CONTENT])


def version_checksum(row: sqlite3.Row | Mapping[str, Any]) -> int:
    """CRC-32 over what a row of ``versions`` says."""
    return _crc([row[key] for key in VERSION])


def _crc(values: list[Any]) -> int:
    return zlib.crc32(json.dumps(values, ensure_ascii=False, default=repr).encode(errors="surrogatepass"))


def scope_of(row: sqlite3.Row | Mapping[str, Any]) -> Scope:
    """Whose row it is."""
    return Scope(**{level: row[level] or None for level in LEVELS})


def record_of(row: sqlite3.Row | Mapping[str, Any]) -> Record:
    """The record of a row that passes its checksum, else `Corrupt`: never a text that was not given."""
    if row["checksum"] != checksum(row):
        raise Corrupt(
            f"record {row['id']} fails its checksum: forget it, or restore memory.db from an export or a backup"
        )
    return build(row)


def build(row: sqlite3.Row | Mapping[str, Any]) -> Record:
    """The record of a row whose checksum was looked at already."""
    times = {
        key: dt.datetime.fromisoformat(row[key]) if row[key] else None for key in ("at", "valid_from", "valid_until")
    }
    return Record(
        id=row["id"],
        text=row["text"],
        role=row["role"],
        name=row["name"],
        **times,
        scope=scope_of(row),
        metadata=json.loads(row["metadata"]),
        source=row["source"],
        trust=row["trust"],
        created=dt.datetime.fromtimestamp(row["created"], dt.UTC),
        version=row["version"],
    )
