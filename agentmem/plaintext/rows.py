"""How a record lies in the tables of ``memory.db``: its columns, its checksum, its words and vectors.

Knows one row at a time, inside the caller's transaction. Knows nothing of who may see or change it.
"""

from __future__ import annotations

import datetime as dt
import json
import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from agentmem.errors import Corrupt
from agentmem.types import LEVELS, Record, Scope

from .drafts import Draft, check_metadata, check_scope, check_text, dump_metadata, utc_seconds

__all__ = [
    "Passages",
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
    "write_passages",
    "write_version",
]

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]

#: What the checksum of a row covers, in this order.
CONTENT = (
    *("id", "text", "role", "name", "at", "valid_from", "valid_until", "from_s", "until_s"),
    *LEVELS,
    *("metadata", "source", "trust", "created", "version"),
)
VERSION = ("id", "version", "text", "metadata", "created")
# Every hit of every search is checked and built, so the columns are picked in C.
_CONTENT_OF, _VERSION_OF, _LEVELS_OF = itemgetter(*CONTENT), itemgetter(*VERSION), itemgetter(*LEVELS)
_ENCODE = json.JSONEncoder(ensure_ascii=False, default=repr).encode
#: How many rows of ``changes`` are kept: an index that is further behind is rebuilt.
KEPT_CHANGES = 65_536


@dataclass(frozen=True)
class Passages:
    """Texts in the pieces that an embedder could read whole, with what it made of them.

    ``spans[i]`` are the pieces of text i as (start, stop) in characters; ``vectors`` float32 [pieces of all texts,
    dimension] and ``codes`` (late.py; None where the embedder has no token vectors) follow in the same order. ``space``
    is the embedding space that they are of, where they were told.
    """

    spans: Sequence[Sequence[tuple[int, int]]]
    vectors: Vectors
    codes: Sequence[bytes] | None = None
    space: int | None = None

    def pick(self, wanted: Sequence[int]) -> Passages:
        """The passages of some of the texts."""
        ends = [0]
        for spans in self.spans:
            ends.append(ends[-1] + len(spans))
        places = [at for i in wanted for at in range(ends[i], ends[i + 1])]
        codes = None if self.codes is None else [self.codes[at] for at in places]
        return Passages([self.spans[i] for i in wanted], self.vectors[places], codes, self.space)


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
        "at_s": utc_seconds(draft.at) if draft.at else None,
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
    columns = (*CONTENT, "at_s", "checksum")
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


def write_passages(connection: sqlite3.Connection, space: int | None, seqs: Sequence[int], passages: Passages) -> None:
    """Store the passages of these rows: their vectors, and those of their tokens where there are any."""
    at = 0
    vectors, tokens = [], []
    for seq, spans in zip(seqs, passages.spans, strict=True):
        for part, (start, stop) in enumerate(spans):
            blob = passages.vectors[at].astype("<f4").tobytes()
            vectors.append((seq, space, part, start, stop, blob, zlib.crc32(blob)))
            if passages.codes is not None:
                codes = passages.codes[at]
                tokens.append((seq, space, part, codes, zlib.crc32(codes)))
            at += 1
    connection.executemany(
        "INSERT OR REPLACE INTO vectors (seq, space, part, start, stop, vector, checksum) VALUES (?, ?, ?, ?, ?, ?, ?)",
        vectors,
    )
    connection.executemany(
        "INSERT OR REPLACE INTO tokens (seq, space, part, codes, checksum) VALUES (?, ?, ?, ?, ?)", tokens
    )


def note_changes(connection: sqlite3.Connection, changes: Sequence[tuple[str, int, int]]) -> None:
    """Note (tenant, row, 1 for new or changed or 0 for gone) for what every process derives from the records."""
    last = 0
    for change in changes:
        last = connection.execute("INSERT INTO changes (tenant, seq, added) VALUES (?, ?, ?)", change).lastrowid or 0
        if last % 4096 == 0:
            connection.execute("DELETE FROM changes WHERE change < ?", (last - KEPT_CHANGES,))


def checksum(row: sqlite3.Row | Mapping[str, Any]) -> int:
    """CRC-32 over what a row of ``records`` says."""
    return _crc(_CONTENT_OF(row))


def version_checksum(row: sqlite3.Row | Mapping[str, Any]) -> int:
    """CRC-32 over what a row of ``versions`` says."""
    return _crc(_VERSION_OF(row))


def _crc(values: tuple[Any, ...]) -> int:
    return zlib.crc32(_ENCODE(values).encode(errors="surrogatepass"))


def scope_of(row: sqlite3.Row | Mapping[str, Any]) -> Scope:
    """Whose row it is."""
    return _scope(*_LEVELS_OF(row))


@lru_cache(maxsize=4096)
def _scope(*values: str) -> Scope:
    return Scope(**{level: value or None for level, value in zip(LEVELS, values, strict=True)})


def record_of(row: sqlite3.Row | Mapping[str, Any]) -> Record:
    """The record of a row that passes its checksum, else `Corrupt`: never a text that was not given."""
    content = _CONTENT_OF(row)
    if row["checksum"] != _crc(content):
        raise Corrupt(
            f"record {row['id']} fails its checksum: forget it, or restore memory.db from an export or a backup"
        )
    return _built(content)


def build(row: Mapping[str, Any]) -> Record:
    """The record of a row whose checksum was looked at already."""
    return _built(_CONTENT_OF(row))


def _built(content: tuple[Any, ...]) -> Record:
    """The record that these columns say, in the order of `CONTENT`."""
    id_, text, role, name, at, start, end, _, _, tenant, user, agent, session = content[:13]
    metadata, source, trust, created, version = content[13:]
    return Record(
        id=id_,
        text=text,
        role=role,
        name=name,
        at=dt.datetime.fromisoformat(at) if at else None,
        valid_from=dt.datetime.fromisoformat(start) if start else None,
        valid_until=dt.datetime.fromisoformat(end) if end else None,
        scope=_scope(tenant, user, agent, session),
        metadata={} if metadata == "{}" else json.loads(metadata),
        source=source,
        trust=trust,
        created=dt.datetime.fromtimestamp(created, dt.UTC),
        version=version,
    )
