"""The one file of truth, ``memory.db``: opening it, upgrading it, reading and writing it safely, checking it.

Knows SQLite; knows nothing of what the rows mean. A write is one transaction under the write lock of the file (WAL,
``synchronous=FULL``: an acknowledged write survives ``kill -9`` and a power cut). Every SQLite error leaves here as a
`StoreError`. Usable from many threads (one connection, one lock) and from many processes (WAL).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import shutil
import sqlite3
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .errors import Corrupt, Full, Incompatible, InvalidInput, Locked, StoreError
from .schema import FORMAT, SCHEMA, UPGRADES, RowDigest, unix_seconds
from .watermark import Watermark

__all__ = ["FORMAT", "Database"]

BUSY_S = 30.0
#: A backup of the file as it was before an upgrade, with its format.
BACKUP = "memory.db.format-"
#: Room that is kept free for erasing on a full disk: what a forgotten record's pages take in the log, many times over.
RESERVE = 1024 * 1024
#: How far the database has come: it grows with every record, change and use, and never falls.
NUMBER = "SELECT coalesce(sum(seq), 0) FROM sqlite_sequence"
#: Levels of the full-text index from which on it is made anew.
MOST_LEVELS = 1_000
#: Steps of SQLite's machine between two looks at Ctrl-C, in work that takes long.
STEPS = 100_000

T = TypeVar("T")

_log = logging.getLogger("agentmem")


class Database:
    """``memory.db`` of one folder, open for this process.

    ``path`` is the file, or ``":memory:"``. Raises `Incompatible` for a newer format, `Corrupt` for a file that is not
    a database, that is gone, emptied or older than what was committed (`Watermark`), and `Locked` where another process
    holds the write lock for longer than 30 seconds.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self._lock = threading.RLock()
        self._broken: str | None = None
        self._failed: str | None = None
        self._depth = 0
        self._watermark = None if self.path == ":memory:" else Watermark(str(Path(path).with_name("memory.id")))
        self._connection: sqlite3.Connection | None = self._connect()
        _OPEN.add(self)
        self._keep_reserve()

    def _connect(self) -> sqlite3.Connection:
        expected = self._expected()
        if self.path != ":memory:":
            # Born private: the umask of the user's shell decides nothing about memories.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with _mapped(self.path):
            connection = self._opened()
            try:
                connection.execute("PRAGMA secure_delete = ON")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA temp_store = MEMORY")
                self._upgrade(connection)
                self._recognise(connection, expected)
                self._check_columns(connection)
            except BaseException:
                connection.close()
                raise
        return connection

    def _opened(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.create_function("unix_seconds", 1, unix_seconds, deterministic=True)
        connection.create_aggregate("row_digest", 2, RowDigest)
        connection.execute(f"PRAGMA busy_timeout = {BUSY_S * 1000:.0f}")
        return connection

    def _expected(self) -> tuple[bytes, int] | None:
        """What must be found: (identity, number), None where nothing is known. `Corrupt` for a file that is gone."""
        if self._watermark is None:
            return None
        try:
            expected = self._watermark.read()
        except (OSError, ValueError) as error:
            _log.warning("%s can't be used (%s): it is written anew", self._watermark.path, error)
            return None
        if expected is not None and expected[1] > 0:
            file = Path(self.path)
            if not file.exists() or file.stat().st_size == 0:
                raise self._lost(f"is {'empty' if file.exists() else 'gone'}")
        return expected

    def _lost(self, what: str) -> Corrupt:
        """The error for a database that is not the one that was written to here."""
        return Corrupt(
            f"{self.path} {what}, though changes were committed to it: put the file back, with its -wal file if it has "
            "one, or a backup of the folder. To go on with what is there all the same (an older copy, or nothing), "
            "delete memory.id beside it"
        )

    def _recognise(self, connection: sqlite3.Connection, expected: tuple[bytes, int] | None) -> None:
        """Refuse a database that is another one or an older state of it; else keep the watermark for it."""
        if self._watermark is None:
            return
        found = connection.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()
        try:
            identity = bytes.fromhex(found[0])
        except (TypeError, ValueError) as error:
            raise Corrupt(f"{self.path} has no valid identity: restore it from an export or a backup") from error
        number = connection.execute(NUMBER).fetchone()[0]
        if expected is not None and identity != expected[0] and expected[1] > 0:
            raise self._lost("is not the database that was here")
        if expected is not None and number < expected[1]:
            raise self._lost(f"ends at {number} and was at {expected[1]}: its log lost its end, or it is an older copy")
        try:
            self._watermark.start(identity, number)
        except OSError as error:
            _log.warning("%s can't be written (%s): a loss of memory.db would not be seen", self._watermark.path, error)

    def _check_columns(self, connection: sqlite3.Connection) -> None:
        """Refuse tables whose definitions were damaged: SQLite reads a column by whatever name is left of it."""
        told = connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
        if told is not None and told[0] == _schema_digest(connection):
            return
        with contextlib.closing(Database(":memory:")) as sound:
            missing = sound._columns(sound._live()) - self._columns(connection)
        if missing:
            names = ", ".join(sorted(f"{table}.{column}" for table, column in missing))
            raise Corrupt(f"{self.path} lacks {names}: restore it from an export or a backup")

    @staticmethod
    def _columns(connection: sqlite3.Connection) -> set[tuple[str, str]]:
        tables = "sqlite_schema AS t, pragma_table_info(t.name) AS c WHERE t.type = 'table'"
        return {(row[0], row[1]) for row in connection.execute(f"SELECT t.name, c.name FROM {tables}")}

    def _upgrade(self, connection: sqlite3.Connection) -> None:
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found == FORMAT:
            return
        if found > FORMAT:
            raise Incompatible(
                f"{self.path} has format {found}, this agentmem reads up to {FORMAT}: install a newer agentmem"
            )
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Another process may have made the tables while this one waited for the lock.
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            if 0 < found < FORMAT and self.path != ":memory:":
                self._back_up(found)
            scripts = [SCHEMA] if found == 0 else [UPGRADES[old] for old in range(found, FORMAT)]
            for statement in itertools.chain.from_iterable(map(_statements, scripts)):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {max(found, FORMAT)}")
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('schema', ?)", (_schema_digest(connection),))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _back_up(self, format: int) -> None:
        """Keep the file as it is before an upgrade, whole and durable; the caller has the write lock."""
        kept = Path(self.path).with_name(f"{BACKUP}{format}")
        unfinished = kept.with_name(f"{kept.name}.tmp")
        try:
            unfinished.unlink(missing_ok=True)
            os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            with (
                contextlib.closing(self._opened()) as source,
                contextlib.closing(sqlite3.connect(unfinished)) as target,
            ):
                source.backup(target)
            _sync(unfinished)
            os.replace(unfinished, kept)
            _sync(kept.parent)
        except OSError as error:
            raise StoreError(f"no backup could be made before the upgrade of {self.path}: {error}") from error
        _log.info("%s is upgraded from format %d; the file as it was is kept as %s", self.path, format, kept.name)

    def drop_backups(self) -> list[str]:
        """Delete backups made before upgrades, which may hold what was forgotten since; returns their names."""
        dropped = []
        for file in Path(self.path).parent.glob(f"{BACKUP}*") if self.path != ":memory:" else ():
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise StoreError(f"the backup {file} could not be deleted: {error}") from error
            dropped.append(file.name)
        return dropped

    def _live(self) -> sqlite3.Connection:
        if self._broken:
            raise StoreError(self._broken)
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def before_fork(self) -> None:
        """No SQLite connection may cross a fork (sqlite.org/howtocorrupt.html, 2.6): each side opens its own later."""
        self._lock.acquire()
        if self._connection is not None and self._depth == 0 and self.path != ":memory:":
            self._connection.close()
            self._connection = None

    def after_fork(self, *, child: bool) -> None:
        """Go on; in a child that got a connection all the same (in RAM, or inside a transaction), refuse to."""
        if child and self._connection is not None:
            self._broken = self._broken or f"{self.path} can't be used in a forked process: open it again there"
        self._lock.release()

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows of a SELECT, as of now (committed by any process, or by this transaction)."""
        with self._lock, _mapped(self.path):
            try:
                return self._live().execute(sql, values).fetchall()
            except (UnicodeEncodeError, OverflowError) as error:
                raise InvalidInput(f"nothing stored can be looked up by such a value: {error}") from error

    @contextlib.contextmanager
    def write(self) -> Generator[sqlite3.Connection]:
        """One transaction: committed and on disk when the block ends, gone without a trace if it raises.

        Nested blocks join the outer transaction.
        """
        with self._lock:
            connection = self._live()
            depth = self._depth
            # Ctrl-C may come between any two steps: whatever happens, the depth is what it was and nothing stays open.
            with _mapped(self.path, self):
                try:
                    if depth == 0:
                        if self._failed:
                            raise StoreError(self._failed)
                        connection.execute("BEGIN IMMEDIATE")
                    self._depth = depth + 1
                    yield connection
                    if depth == 0:
                        number = connection.execute(NUMBER).fetchone()[0]
                        connection.execute("COMMIT")
                        self._note(number)
                finally:
                    self._depth = depth
                    if depth == 0 and connection.in_transaction:
                        connection.execute("ROLLBACK")

    def despite_full(self, erase: Callable[[], T]) -> T:
        """``erase()``, once more in the room that is kept for that where the disk is full."""
        try:
            return erase()
        except Full:
            reserve = self._reserve()
            if reserve is None or not reserve.exists():
                raise
            reserve.unlink(missing_ok=True)
            _log.warning("the disk is full: erasing in the room that was set aside for it")
            with self._lock, _mapped(self.path):
                self._empty_log(self._live())
            return erase()

    def _empty_log(self, connection: sqlite3.Connection) -> None:
        """Move the log into the file, where the file has room to grow by what is new in it: that gives the log's back.

        Trying it without enough room would use up what there is for nothing.
        """
        file = Path(self.path)
        if self.path == ":memory:" or not file.with_name(f"{file.name}-wal").stat().st_size:
            return
        grown = _pragma(connection, "page_count") * _pragma(connection, "page_size") - file.stat().st_size
        if grown < shutil.disk_usage(file.parent).free:
            with contextlib.suppress(sqlite3.OperationalError):
                _truncate_log(connection)

    def _reserve(self) -> Path | None:
        return None if self.path == ":memory:" else Path(self.path).with_name("memory.reserve")

    def _keep_reserve(self, over: int = 3 * RESERVE) -> None:
        """Set room aside if ``over`` bytes are left besides: on a disk that is nearly full it is for the records."""
        reserve = self._reserve()
        try:
            if reserve is None or reserve.exists() or shutil.disk_usage(reserve.parent).free < RESERVE + over:
                return
            handle = os.open(reserve, os.O_CREAT | os.O_WRONLY, 0o600)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, RESERVE)
                else:
                    os.write(handle, bytes(RESERVE))
            finally:
                os.close(handle)
        except OSError as error:
            _log.info("no room is set aside for erasing on a full disk: %s", error)

    def _note(self, number: int) -> None:
        """Raise the watermark to what was just committed; a failure of that is none of the commit."""
        if self._watermark is not None:
            try:
                self._watermark.raise_to(number)
            except OSError as error:
                _log.warning("%s could not be written: %s", self._watermark.path, error)

    def scrub(self) -> bool:
        """Drop the bytes of deleted rows from the full-text index and the write-ahead log.

        FTS5 keeps deleted terms until its segments are merged (its own secure-delete needs SQLite 3.42), and the log
        keeps old pages until it is truncated. Returns False if a reader of another process kept the log from being
        truncated.
        """
        with self._lock, _mapped(self.path):
            connection = self._live()
            try:
                _merge_words(connection)
                emptied = _truncate_log(connection)
            finally:
                self._empty_log(connection)
                self._keep_reserve(RESERVE // 4)
            return emptied

    def compact(self) -> bool:
        """Rewrite the file without the room and the bytes of what was deleted, and repair what is derived in it.

        Needs as much free room as the file has bytes (`Full`, before anything is done), and the write lock all the
        while: other processes read on, their writes wait. Ctrl-C leaves the file as it was. Returns False if a reader
        of another process kept the write-ahead log from being truncated.
        """
        with self._lock:
            if self._depth:
                raise StoreError("compact() can't run inside a transaction")
            connection = self._live()
            if self._failed:
                raise StoreError(self._failed)
            with _mapped(self.path, self), _interruptible(connection):
                size = _pragma(connection, "page_count") * _pragma(connection, "page_size")
                if self.path != ":memory:":
                    free = shutil.disk_usage(Path(self.path).parent).free
                    if free < size + (1 << 20):
                        raise Full(f"compacting {self.path} needs {size + (1 << 20)} bytes of room, {free} are free")
                if self.integrity():
                    connection.execute("REINDEX")
                try:
                    connection.execute("INSERT INTO records_fts (records_fts, rank) VALUES ('integrity-check', 1)")
                    _merge_words(connection)
                except sqlite3.DatabaseError as error:
                    if not _corrupt(error):
                        raise
                    connection.execute("INSERT INTO records_fts (records_fts) VALUES ('rebuild')")
                # In RAM while it is small: a file of the system's temporary folder would hold the texts for a while.
                connection.execute(f"PRAGMA temp_store = {'MEMORY' if size < 256 << 20 else 'FILE'}")
                try:
                    connection.execute("VACUUM")
                finally:
                    connection.execute("PRAGMA temp_store = MEMORY")
                return _truncate_log(connection)

    def integrity(self) -> list[str]:
        """What SQLite finds wrong in the file, its tables and indexes, one line each; and tables that were altered."""
        with self._lock, _mapped(self.path):
            connection = self._live()
            lines = [str(row[0]) for row in connection.execute("PRAGMA integrity_check")]
            problems = [f"memory.db: {line}" for line in lines if line != "ok"]
            expected = connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
            if expected is None or expected[0] != _schema_digest(connection):
                problems.append("memory.db: the definitions of its tables are not those it was made with")
            return problems

    def refuse_writes(self, why: str) -> None:
        """After a failed write nothing more is promised: every later one raises until the folder is reopened."""
        self._failed = f"{why}; close this memory and open it again"

    def close(self) -> None:
        """Close the connection; safe to call twice. The last process to close merges the write-ahead log."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            if self._watermark is not None:
                with contextlib.suppress(OSError):
                    self._watermark.sync()
                self._watermark.close()
            self._broken = f"{self.path} is closed: open the memory again"
            _OPEN.discard(self)


_OPEN: weakref.WeakSet[Database] = weakref.WeakSet()


def _before_fork() -> None:
    _FORKING.extend(_OPEN)
    for database in _FORKING:
        database.before_fork()


def _after_fork(*, child: bool) -> None:
    while _FORKING:
        _FORKING.pop().after_fork(child=child)


#: The databases whose locks the forking thread holds.
_FORKING: list[Database] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=lambda: _after_fork(child=False),
        after_in_child=lambda: _after_fork(child=True),
    )


def _schema_digest(connection: sqlite3.Connection) -> str:
    """A digest over the definitions of all tables, indexes and triggers."""
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name").fetchall()
    return hashlib.sha256(repr([tuple(row) for row in rows]).encode()).hexdigest()


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _merge_words(connection: sqlite3.Connection) -> None:
    """Merge the full-text index into one segment: no deleted word is left in it.

    Each merge adds one or two levels to the index's structure, and at 2,000 SQLite takes it for damaged
    (`FTS5_MAX_SEGMENT` in fts5_index.c): the index is made anew in time. The structure is row 10: four bytes, then the
    number of its levels in seven bits a byte.
    """
    levels = 0
    for byte in connection.execute("SELECT block FROM records_fts_data WHERE id = 10").fetchone()[0][4:]:
        levels = levels << 7 | byte & 127
        if byte < 128:
            break
    command = "rebuild" if levels > MOST_LEVELS else "optimize"
    connection.execute("INSERT INTO records_fts (records_fts) VALUES (?)", (command,))


def _truncate_log(connection: sqlite3.Connection) -> bool:
    """Move the log into the file and empty it; False if somebody went on reading from it for a second."""
    connection.execute("PRAGMA busy_timeout = 1000")
    try:
        return not connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    finally:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_S * 1000:.0f}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _interruptible(connection: sqlite3.Connection) -> Generator[None]:
    """Let Ctrl-C end a statement that takes long; it then leaves as `KeyboardInterrupt`, the file as it was."""
    # Python's signal handlers run inside the callback; what they raise there makes SQLite stop (see `_mapped`).
    connection.set_progress_handler(lambda: 0, STEPS)
    try:
        yield
    finally:
        connection.set_progress_handler(None, 0)


def _corrupt(error: sqlite3.Error) -> bool:
    return (getattr(error, "sqlite_errorname", "") or "").startswith("SQLITE_CORRUPT")


def _statements(script: str) -> Iterator[str]:
    """The single statements of a script (``executescript`` would commit the transaction we are in)."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@contextlib.contextmanager
def _mapped(path: str, database: Database | None = None) -> Generator[None]:
    """SQLite's errors as ours, the most specific first."""
    try:
        yield
    except UnicodeDecodeError as error:  # a name or a message of SQLite's that is no text any more
        raise Corrupt(f"{path} is damaged ({error}): restore it from an export or a backup") from error
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        text = str(error)
        where = Path(path).name if path != ":memory:" else path
        if name == "SQLITE_INTERRUPT":
            raise KeyboardInterrupt from error
        if name.startswith("SQLITE_FULL"):
            raise Full(f"no room to write {where}: free some disk space; what was stored before is intact") from error
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise Locked(f"{where} was locked by another process for {BUSY_S:.0f} s: try again") from error
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or "decode to UTF-8" in text:
            raise Corrupt(f"{path} is damaged ({text}): restore it from an export or a backup") from error
        if name.startswith("SQLITE_IOERR"):
            if database is not None:
                database.refuse_writes(f"writing {where} failed ({text})")
            raise StoreError(f"reading or writing {path} failed ({text})") from error
        if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            raise StoreError(f"{path} can't be opened for writing ({text}): check the folder's permissions") from error
        if isinstance(error, sqlite3.ProgrammingError) and "closed" in text.lower():
            raise StoreError(f"{path} is closed: open the memory again") from error
        raise StoreError(f"{path}: {text}") from error
