"""What is wrong with the records in ``memory.db``: every row against its checksum, all of them against their totals.

Knows how records, versions, passages and words must fit together. Repairs nothing: it names what is damaged.
"""

from __future__ import annotations

import datetime as dt
import sqlite3
import zlib
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from agentmem.database import Database
from agentmem.errors import StoreError

from .drafts import utc_seconds
from .rows import checksum, version_checksum

__all__ = ["damages"]

#: Rows read at once.
BATCH = 1_000
RESTORE = "restore a backup, or export what is there and load it into a new folder"


def damages(database: Database) -> list[str]:
    """One line for each damage, with the id of the record it is of; empty if all is well."""
    problems: list[str] = []
    for check in (_file, _records, _versions, _totals, _passages, _tokens, _words):
        try:
            problems += check(database)
        except StoreError as error:  # what can't be read at all
            problems.append(f"{check.__name__[1:]}: {error}")
    return problems


def _file(database: Database) -> list[str]:
    return database.integrity()


def _rows(database: Database, table: str) -> Iterator[tuple[int, sqlite3.Row | None, str]]:
    """(row number, row, why not) of all rows; a row that can't be read is None."""
    last = -(2**63)
    while numbers := [
        row[0]
        for row in database.query(f"SELECT rowid FROM {table} WHERE rowid > ? ORDER BY rowid LIMIT ?", (last, BATCH))
    ]:
        some = f"SELECT rowid AS place, * FROM {table} WHERE rowid BETWEEN ? AND ? ORDER BY rowid"
        try:
            yield from ((row["place"], row, "") for row in database.query(some, (numbers[0], numbers[-1])))
        except StoreError:
            for number in numbers:
                try:
                    for row in database.query(some, (number, number)):
                        yield number, row, ""
                except StoreError as error:
                    yield number, None, str(error)
        last = numbers[-1]


def _records(database: Database) -> list[str]:
    problems = []
    for number, row, why in _rows(database, "records"):
        if row is None:
            problems.append(f"the record in row {number}: {why}")
        elif row["checksum"] != checksum(row):
            problems.append(f"record {row['id']}: the row fails its checksum")
        elif row["at_s"] != _seconds(row["at"]):  # the checksum is of older formats, which had no such column
            problems.append(f"record {row['id']}: its time in seconds is not that of its date")
    lacking = (
        "SELECT id, version, (SELECT count(*) FROM versions WHERE versions.id = records.id) AS kept FROM records"
        " WHERE version != kept + 1"
    )
    for id_, version, kept in database.query(lacking):
        problems.append(f"record {id_}: {kept} of its {version - 1} earlier versions are there")
    return problems


def _seconds(moment: Any) -> float | None:
    return None if moment is None else utc_seconds(dt.datetime.fromisoformat(moment))


def _versions(database: Database) -> list[str]:
    problems = []
    for number, row, why in _rows(database, "versions"):
        if row is None:
            problems.append(f"the earlier version in row {number}: {why}")
        elif row["checksum"] != version_checksum(row):
            problems.append(f"record {row['id']}: version {row['version']} fails its checksum")
    stray = "SELECT id, count(*) FROM versions WHERE id NOT IN (SELECT id FROM records) GROUP BY id"
    problems += [f"record {id_} is gone, {kept} versions of it are there" for id_, kept in database.query(stray)]
    return problems


def _totals(database: Database) -> list[str]:
    problems = []
    for table, place in (("records", "seq"), ("versions", "version")):
        [[there, digest]] = database.query(f"SELECT count(*), coalesce(row_digest(checksum, {place}), 0) FROM {table}")
        noted = database.query("SELECT held, digest FROM totals WHERE name = ?", (table,))
        if not noted:
            problems.append(f"{table}: how many there should be is not known")
        elif noted[0][0] != there:
            problems.append(f"{table}: {noted[0][0]} were stored, {there} are there: {RESTORE}")
        elif noted[0][1] != digest:
            problems.append(f"{table}: their checksums don't add up, so one is of an older state: {RESTORE}")
    return problems


def _passages(database: Database) -> list[str]:
    problems = []
    rows = database.query(
        "SELECT v.space, v.seq, v.part, v.start, v.stop, v.vector, v.checksum, s.dimension, r.id,"
        " length(r.text) AS whole FROM vectors v LEFT JOIN spaces s ON s.id = v.space"
        " LEFT JOIN records r ON r.seq = v.seq ORDER BY v.space, v.seq, v.part"
    )
    for (_, seq), group in groupby(rows, lambda row: (row["space"], row["seq"])):
        parts = list(group)
        name = parts[0]["id"]
        if name is None:
            problems.append(f"row {seq}: there are vectors that belong to no record")
            continue
        end = 0
        for number, row in enumerate(parts):
            if not _sound(row["vector"], row["checksum"]) or len(row["vector"]) != 4 * (row["dimension"] or 0):
                problems.append(f"record {name}: its vector {number} fails its checksum")
            stop = row["stop"] if isinstance(row["stop"], int) else -1
            if row["part"] != number or row["start"] != end or not end < stop <= row["whole"]:
                problems.append(f"record {name}: its passage {number} has other bounds than it was cut at")
            end = stop
        if end != parts[-1]["whole"]:
            problems.append(f"record {name}: its last passage does not end with its text")
    return problems


def _sound(blob: Any, expected: Any) -> bool:
    """True for bytes with this checksum; a damaged row may hold anything."""
    return isinstance(blob, bytes) and zlib.crc32(blob) == expected


def _tokens(database: Database) -> list[str]:
    problems = []
    for number, row, why in _rows(database, "tokens"):
        if row is None:
            problems.append(f"the token vectors in row {number}: {why}")
        elif not _sound(row["codes"], row["checksum"]):
            problems.append(f"record in row {row['seq']}: its token vectors fail their checksum")
    stray = (
        "SELECT DISTINCT t.seq FROM tokens t LEFT JOIN vectors v"
        " ON v.space = t.space AND v.seq = t.seq AND v.part = t.part WHERE v.seq IS NULL"
    )
    problems += [f"row {seq}: there are token vectors that belong to no passage" for (seq,) in database.query(stray)]
    return problems


def _words(database: Database) -> list[str]:
    try:
        with database.write() as connection:
            connection.execute("INSERT INTO records_fts (records_fts, rank) VALUES ('integrity-check', 1)")
    except StoreError as error:
        return [f"the full-text index does not fit the records (compact() makes it anew): {error}"]
    return []
