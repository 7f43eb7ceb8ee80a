"""The rows and files of the KV pages of one folder, kept in step.

Knows the tables ``pages`` and ``lineage``, the names in the folder and its lock; decides nothing about what may stay
or be used (store.py does). Every change of both goes through here.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from ..database import Database
from ..errors import StoreError
from .eviction import PageRow, descendants
from .pages import publish, sync_folder

__all__ = ["FILE", "Catalog", "marks", "parts"]

logger = logging.getLogger("agentmem")

_T = TypeVar("_T")

#: How long a seal waits for a sweep of another process to end before it gives up (the sweep lists one folder).
LOCK_S = 10.0
#: Damaged files kept for a look at what happened; older ones are deleted.
QUARANTINED = 8

#: Pages that name a record which is not there. Each record that lineage names is looked at once, by steps through the
#: index: of a long session every page names all records before it.
UNSTORED = """
WITH RECURSIVE named (record) AS (
    SELECT min(record) FROM lineage UNION ALL
    SELECT (SELECT min(record) FROM lineage WHERE record > named.record) FROM named WHERE record IS NOT NULL
)
SELECT DISTINCT key FROM lineage WHERE kind = 'page' AND record IN (
    SELECT record FROM named WHERE record IS NOT NULL AND record NOT IN (SELECT id FROM records)
)
"""

#: A file of the folder: a page, one that is being written, or one that was put aside.
FILE = re.compile(r"([0-9a-f]{64})(\.page|\.[0-9a-f]{16}\.(?:tmp|bad))")


class Catalog:
    """Which pages a folder holds. Its methods raise `StoreError` and OSError."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.folder = folder
        self._database = database
        self._quarantine = folder / "quarantine"
        self._lock = threading.Lock()
        self._touched: dict[bytes, tuple[float, int]] = {}

    def renew_lock(self) -> None:
        """For a forked child: the thread that held the lock may not exist there."""
        self._lock = threading.Lock()

    def path(self, key: bytes) -> Path:
        """Where the file of this page is, or would be."""
        return self.folder / f"{key.hex()}.page"

    def listing(self) -> list[str]:
        """The names in the folder, in order."""
        try:
            return sorted(entry.name for entry in os.scandir(self.folder) if entry.name not in {".lock", "quarantine"})
        except FileNotFoundError:
            return []

    def rows(self, keys: Iterable[bytes] | None = None) -> dict[bytes, PageRow]:
        """The rows of these pages, or of all."""
        select = "SELECT key, identity, parent, number, bytes, created, used, uses, pinned, codec, grid FROM pages"
        if keys is None:
            found = self._database.query(select)
        else:
            found = [
                row
                for part in parts(list(keys))
                for row in self._database.query(f"{select} WHERE key IN ({marks(part)})", part)
            ]
        return {
            row["key"]: PageRow(
                key=row["key"],
                identity=row["identity"],
                parent=row["parent"],
                number=row["number"],
                bytes=row["bytes"],
                created=row["created"],
                used=row["used"],
                uses=row["uses"],
                pinned=bool(row["pinned"]),
                codec=row["codec"],
                grid=row["grid"],
            )
            for row in found
        }

    def forgotten(self, records: Iterable[str]) -> set[str]:
        """Which of these records were forgotten."""
        return {
            row["record"]
            for part in parts(sorted(set(records)))
            for row in self._database.query(f"SELECT record FROM tombstones WHERE record IN ({marks(part)})", part)
        }

    def unstored(self, before: float) -> list[bytes]:
        """Pages written before this moment, by the store's clock, that name a record which is not there."""
        named = [bytes.fromhex(row["key"]) for row in self._database.query(UNSTORED)]
        return [key for key, row in self.rows(named).items() if row.created < before]

    def bytes_of_files(self) -> int:
        """Bytes of all stored pages."""
        return int(self._database.query("SELECT COALESCE(SUM(bytes), 0) AS total FROM pages")[0]["total"])

    def insert(self, connection: sqlite3.Connection, row: PageRow, records: Iterable[str], *, replace: bool) -> None:
        """Add a page and its lineage; of a page that has a row only the lineage, or with ``replace`` its new file's."""
        kept = "DO UPDATE SET bytes = excluded.bytes, codec = excluded.codec" if replace else "DO NOTHING"
        connection.execute(
            "INSERT INTO pages (key, identity, parent, number, bytes, created, used, uses, pinned, codec, grid) "
            f"VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) {kept}",
            (
                *(row.key, row.identity, row.parent, row.number, row.bytes),
                *(row.created, row.used, row.uses, int(row.pinned), row.codec, row.grid),
            ),
        )
        connection.executemany(
            "INSERT OR IGNORE INTO lineage (kind, key, record) VALUES ('page', ?, ?)",
            [(row.key.hex(), record) for record in records],
        )

    def flush(self, connection: sqlite3.Connection) -> None:
        """Write the noted uses down in this transaction."""
        with self._lock:
            touched, self._touched = self._touched, {}
        connection.executemany(
            "UPDATE pages SET used = MAX(used, ?), uses = uses + ? WHERE key = ?",
            [(used, uses, key) for key, (used, uses) in touched.items()],
        )

    def touch(self, keys: Iterable[bytes], now: float) -> None:
        """Note a use of these pages; written down with the next change, so that a hit costs no disk sync."""
        with self._lock:
            for key in keys:
                self._touched[key] = (now, self._touched.get(key, (now, 0))[1] + 1)

    def flush_now(self) -> None:
        """Write the noted uses down, where anything can be written: all they decide is what is evicted first."""
        try:
            if self._touched:
                with self._database.write() as connection:
                    self.flush(connection)
        except StoreError as error:
            logger.warning("uses of KV pages could not be noted: %s", error)

    def remove(self, connection: sqlite3.Connection, keys: Sequence[bytes], *, durable: bool = False) -> None:
        """Delete files (also those put aside), then rows and lineage, of these pages."""
        for key in keys:
            self.path(key).unlink(missing_ok=True)
        names = {key.hex() for key in keys}
        aside = [file for file in self._aside() if file.name[:64] in names]
        for file in aside:
            file.unlink(missing_ok=True)
        if durable and keys:
            sync_folder(self.folder)
            if aside:
                sync_folder(self._quarantine)
        connection.executemany("DELETE FROM pages WHERE key = ?", [(key,) for key in keys])
        connection.executemany("DELETE FROM lineage WHERE kind = 'page' AND key = ?", [(name,) for name in names])

    def _aside(self) -> list[Path]:
        """The files in quarantine, oldest first."""
        found: list[tuple[float, Path]] = []
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._quarantine):
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.stat(follow_symlinks=False).st_ctime, Path(entry.path)))
        return [path for _, path in sorted(found)]

    def put_aside(self, key: bytes, why: str) -> None:
        """Move a damaged file to quarantine and drop its row and all pages behind it.

        The lineage of the file that was put aside stays: forgetting one of its records must still find and delete it.
        """
        logger.warning("a damaged KV page was put aside and will be computed anew: %s", why)
        try:
            with self._database.write() as connection:
                below = [other for other in descendants(self.rows().values(), [key]) if other != key]
                self.remove(connection, below)
                self._quarantine.mkdir(mode=0o700, exist_ok=True)
                number = os.urandom(8).hex()
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self.path(key), self._quarantine / f"{key.hex()}.{number}.bad")
                connection.execute("DELETE FROM pages WHERE key = ?", (key,))
                for file in self._aside()[:-QUARANTINED]:
                    file.unlink(missing_ok=True)
        except (OSError, StoreError) as error:
            logger.warning("KV page %s could not be put aside: %s", key.hex()[:12], error)

    def tidy(self) -> None:
        """Remove what belongs to nothing: temporary files, files without rows, rows without files, lineage of neither.

        Does nothing while any process is writing pages (the next time will do) or where the folder can't be written.
        """
        try:
            self._sweep()
        except (OSError, StoreError) as error:
            logger.warning("the KV pages in %s can't be tidied up: %s", self.folder, error)

    def _sweep(self) -> None:
        with self.locked(exclusive=True) as held:
            if not held:
                return
            with self._database.write() as connection:
                rows = self.rows()
                files: set[bytes] = set()
                for name in self.listing():
                    match = FILE.fullmatch(name)
                    if match is None:
                        continue
                    key = bytes.fromhex(match[1])
                    if match[2] == ".page" and key in rows:
                        files.add(key)
                    else:
                        (self.folder / name).unlink(missing_ok=True)
                lost = [
                    key for key, row in rows.items() if key not in files or (row.number > 0 and row.parent not in rows)
                ]
                if lost:
                    self.remove(connection, descendants(rows.values(), lost))
                aside = {file.name[:64] for file in self._aside()}
                kept = aside.union(key.hex() for key in rows)
                for row in connection.execute("SELECT DISTINCT key FROM lineage WHERE kind = 'page'").fetchall():
                    if row["key"] not in kept:
                        connection.execute("DELETE FROM lineage WHERE kind = 'page' AND key = ?", (row["key"],))

    @contextlib.contextmanager
    def locked(self, *, exclusive: bool) -> Generator[bool]:
        """The folder's lock: shared while pages are being written, exclusive and without waiting for tidying up.

        Yields whether it is held.
        """
        descriptor = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            operation = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB
            deadline = time.monotonic() + (0.0 if exclusive else LOCK_S)
            while True:
                try:
                    fcntl.flock(descriptor, operation)
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        yield False
                        return
                    time.sleep(0.005)
                else:
                    yield True
                    return
        finally:
            # Said aloud: a child that was forked meanwhile holds the same lock, and closing ours would not free it.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def publish(self, staged: dict[bytes, Path]) -> int:
        """Give staged files, whose rows are committed, their names; how many are there now."""
        if not staged:
            return 0
        try:
            publish([(temporary, self.path(key)) for key, temporary in staged.items()], self.folder)
        finally:
            # Whoever deleted a row since our commit found no file to delete: that is ours to do.
            present = self.rows(staged)
            for key in staged.keys() - present.keys():
                self.path(key).unlink(missing_ok=True)
        return len(present)


def parts(values: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """The values in parts that one statement of SQLite takes."""
    for start in range(0, len(values), 500):
        yield values[start : start + 500]


def marks(values: Sequence[object]) -> str:
    """As many question marks, for ``IN (...)``."""
    return ",".join("?" * len(values))
