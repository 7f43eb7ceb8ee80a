"""The one file of truth, ``memory.db``: opening it, its tables, reading and writing it safely.

Knows SQLite and the schema; knows nothing of what the rows mean. A write is one transaction under the write lock of the
file (WAL, ``synchronous=FULL``: an acknowledged write survives ``kill -9`` and a power cut). Every SQLite error leaves
here as a `StoreError`. Usable from many threads (one connection, one lock) and from many processes (WAL).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import os
import sqlite3
import threading
import weakref
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import Corrupt, Full, Incompatible, InvalidInput, Locked, StoreError

__all__ = ["FORMAT", "Database"]

#: Version of the tables below, kept in ``PRAGMA user_version``. A newer file is refused; an older one is upgraded in
#: place.
FORMAT = 5

#: What makes of a file of each format one of the next, in one transaction.
UPGRADES = {
    1: "ALTER TABLE pages ADD COLUMN codec TEXT NOT NULL DEFAULT 'raw';",
    2: "ALTER TABLE uses ADD COLUMN attended TEXT;",
    3: "ALTER TABLE pages ADD COLUMN grid INTEGER NOT NULL DEFAULT 0;",
    4: """
ALTER TABLE records ADD COLUMN at_s REAL;
UPDATE records SET at_s = unix_seconds(at);
CREATE VIRTUAL TABLE records_terms USING fts5vocab (records_fts, instance);
ALTER TABLE vectors RENAME TO old_vectors;
CREATE TABLE vectors (
    seq INTEGER NOT NULL, space INTEGER NOT NULL, part INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    vector BLOB NOT NULL, checksum INTEGER NOT NULL, PRIMARY KEY (space, seq, part)
);
INSERT INTO vectors SELECT seq, space, 0, 0, (SELECT length(text) FROM records WHERE records.seq = old.seq), vector,
    checksum FROM old_vectors AS old WHERE seq IN (SELECT seq FROM records);
DROP TABLE old_vectors;
CREATE TABLE tokens (
    seq INTEGER NOT NULL, space INTEGER NOT NULL, part INTEGER NOT NULL, codes BLOB NOT NULL, checksum INTEGER NOT NULL,
    PRIMARY KEY (space, seq, part)
);
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, record TEXT NOT NULL, state TEXT NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0, note TEXT, at REAL NOT NULL, UNIQUE (kind, record)
);
""",
}

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- Records: the verbatim memory. An unset scope level is '' (which no scope value can be).
CREATE TABLE records (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,      -- order of arrival; also the row id in FTS and FAISS
    id TEXT NOT NULL UNIQUE,
    text TEXT NOT NULL,
    role TEXT NOT NULL, name TEXT,
    at TEXT, valid_from TEXT, valid_until TEXT, -- ISO 8601, as given
    at_s REAL, from_s REAL, until_s REAL,       -- the same as UTC seconds, for comparisons
    tenant TEXT NOT NULL, user TEXT NOT NULL, agent TEXT NOT NULL, session TEXT NOT NULL,
    metadata TEXT NOT NULL, source TEXT, trust TEXT NOT NULL,
    created REAL NOT NULL, version INTEGER NOT NULL,
    checksum INTEGER NOT NULL                   -- CRC-32 over the row's content (records.py)
);
-- What a search needs of every record it may find, without reading the records: whose it is and when it holds. The
-- second is for handles that set a user but no tenant.
CREATE INDEX records_scope ON records (tenant, user, agent, session, seq, from_s, until_s);
CREATE INDEX records_user ON records (user, tenant, agent, session, seq, from_s, until_s);
-- The turns of chats, so that the end of a long conversation is found without reading its beginning.
CREATE INDEX records_turns ON records (tenant, user, agent, session, seq) WHERE source = 'chat';
CREATE TABLE versions (
    id TEXT NOT NULL, version INTEGER NOT NULL, text TEXT NOT NULL, metadata TEXT NOT NULL,
    created REAL NOT NULL, checksum INTEGER NOT NULL, PRIMARY KEY (id, version)
);
CREATE VIRTUAL TABLE records_fts USING fts5 (
    text, name, content='records', content_rowid='seq', tokenize='porter unicode61'
);
-- Every occurrence of a stemmed word: the postings that words are scored by (words.py).
CREATE VIRTUAL TABLE records_terms USING fts5vocab (records_fts, instance);
-- Vectors are truth too: the index is rebuilt from them without a call of the embedder. A row is a passage of a record,
-- characters start to stop of its text; a short record has one, part 0.
CREATE TABLE spaces (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, digest TEXT NOT NULL UNIQUE, dimension INTEGER NOT NULL
);
CREATE TABLE vectors (
    seq INTEGER NOT NULL, space INTEGER NOT NULL, part INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    vector BLOB NOT NULL, checksum INTEGER NOT NULL, PRIMARY KEY (space, seq, part)
);
-- The vectors of a passage's tokens, compressed (late.py).
CREATE TABLE tokens (
    seq INTEGER NOT NULL, space INTEGER NOT NULL, part INTEGER NOT NULL, codes BLOB NOT NULL, checksum INTEGER NOT NULL,
    PRIMARY KEY (space, seq, part)
);
-- What happened to the records and their vectors, in order: what has applied change N needs only what follows. added is
-- 1 for new or changed, 0 for gone; the nonce tells this history from another one with the same numbers (a restored
-- backup).
CREATE TABLE changes (
    change INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, seq INTEGER NOT NULL, added INTEGER NOT NULL,
    nonce INTEGER NOT NULL DEFAULT (random())
);

-- Lineage: which records a derived thing was made from. kind is page, slot, core, lora, reply, record (one written from
-- others) or supersedes (one that took another's place).
CREATE TABLE lineage (
    kind TEXT NOT NULL, key TEXT NOT NULL, record TEXT NOT NULL, PRIMARY KEY (kind, key, record)
) WITHOUT ROWID;
CREATE INDEX lineage_record ON lineage (record, kind);
-- A forgotten record's id outlives it, so that an old export or backup can't bring it back.
CREATE TABLE tombstones (record TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
-- Work to be done later for a record, each kind once: queued, done, failed or refused.
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, record TEXT NOT NULL, state TEXT NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0, note TEXT, at REAL NOT NULL, UNIQUE (kind, record)
);
-- Erasures whose files are not all gone yet: finished at the next open.
CREATE TABLE erasures (id INTEGER PRIMARY KEY, at REAL NOT NULL, work TEXT NOT NULL);

CREATE TABLE cores (
    tenant TEXT NOT NULL, user TEXT NOT NULL, agent TEXT NOT NULL, session TEXT NOT NULL,
    ids TEXT NOT NULL, built REAL NOT NULL, records INTEGER NOT NULL, -- records visible to the scope when it was built
    PRIMARY KEY (tenant, user, agent, session)
) WITHOUT ROWID;
CREATE TABLE pages (
    key BLOB PRIMARY KEY, identity BLOB NOT NULL, parent BLOB NOT NULL, number INTEGER NOT NULL,
    bytes INTEGER NOT NULL, created REAL NOT NULL, used REAL NOT NULL, uses INTEGER NOT NULL, pinned INTEGER NOT NULL,
    codec TEXT NOT NULL, grid INTEGER NOT NULL DEFAULT 0 -- tokens, where they are not the store's
) WITHOUT ROWID;
CREATE TABLE loras (
    digest TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL,
    tenant TEXT NOT NULL, user TEXT NOT NULL, agent TEXT NOT NULL, session TEXT NOT NULL, manifest TEXT NOT NULL
) WITHOUT ROWID;
-- One row per activation, newest last: the newest row of a scope is what is active (digest '' is none); rollback drops
-- it.
CREATE TABLE activations (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, digest TEXT NOT NULL,
    tenant TEXT NOT NULL, user TEXT NOT NULL, agent TEXT NOT NULL, session TEXT NOT NULL
);

-- The ledger: one row per use.
CREATE TABLE uses (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, verb TEXT NOT NULL, model TEXT NOT NULL,
    tenant TEXT NOT NULL, user TEXT NOT NULL, agent TEXT NOT NULL, session TEXT NOT NULL,
    input INTEGER NOT NULL, cached INTEGER NOT NULL, written INTEGER NOT NULL, output INTEGER NOT NULL,
    first_s REAL, total_s REAL NOT NULL, bytes INTEGER NOT NULL,
    expected INTEGER NOT NULL, reason TEXT, money REAL, uncached_money REAL,
    attended TEXT                               -- JSON of `types.Attended`: what attention read in place
);
-- When a record was last put into a prompt, how often, and for which model: salience, and what a host may still hold.
CREATE TABLE shown (
    record TEXT NOT NULL, model TEXT NOT NULL, at REAL NOT NULL, times INTEGER NOT NULL, holds_s REAL,
    PRIMARY KEY (record, model)
) WITHOUT ROWID;
"""

BUSY_S = 30.0


class Database:
    """``memory.db`` of one folder, open for this process.

    ``path`` is the file, or ``":memory:"``. Raises `Incompatible` for a newer format, `Corrupt` for a file that is not
    a database, `Locked` where another process holds the write lock for longer than 30 seconds.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self._lock = threading.RLock()
        self._broken: str | None = None
        self._depth = 0
        self._connection: sqlite3.Connection | None = self._connect()
        _OPEN.add(self)

    def _connect(self) -> sqlite3.Connection:
        if self.path != ":memory:":
            # Born private: the umask of the user's shell decides nothing about memories.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with _mapped(self.path):
            connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                connection.row_factory = sqlite3.Row
                connection.create_function("unix_seconds", 1, _unix_seconds, deterministic=True)
                connection.execute(f"PRAGMA busy_timeout = {BUSY_S * 1000:.0f}")
                connection.execute("PRAGMA secure_delete = ON")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA temp_store = MEMORY")
                self._upgrade(connection)
            except BaseException:
                connection.close()
                raise
        return connection

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
            scripts = [SCHEMA] if found == 0 else [UPGRADES[old] for old in range(found, FORMAT)]
            for statement in itertools.chain.from_iterable(map(_statements, scripts)):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {max(found, FORMAT)}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise

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
                        connection.execute("BEGIN IMMEDIATE")
                    self._depth = depth + 1
                    yield connection
                    if depth == 0:
                        connection.execute("COMMIT")
                finally:
                    self._depth = depth
                    if depth == 0 and connection.in_transaction:
                        connection.execute("ROLLBACK")

    def scrub(self) -> bool:
        """Drop the bytes of deleted rows from the full-text index and the write-ahead log.

        FTS5 keeps deleted terms until its segments are merged (its own secure-delete needs SQLite 3.42), and the log
        keeps old pages until it is truncated. Returns False if a reader of another process kept the log from being
        truncated.
        """
        with self._lock, _mapped(self.path):
            connection = self._live()
            connection.execute("INSERT INTO records_fts (records_fts) VALUES ('optimize')")
            busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            return not busy

    def refuse_writes(self, why: str) -> None:
        """After a failed write nothing more is promised: every later call raises until the folder is reopened."""
        self._broken = f"{why}; close this memory and open it again"

    def close(self) -> None:
        """Close the connection; safe to call twice. The last process to close merges the write-ahead log."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
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


def _unix_seconds(moment: str | None) -> float | None:
    """An ISO time as seconds since 1970, by exact arithmetic: for upgrades of tables that hold only the text."""
    if moment is None:
        return None
    when = dt.datetime.fromisoformat(moment)
    when = when if when.tzinfo else when.replace(tzinfo=dt.UTC)
    return (when - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) / dt.timedelta(seconds=1)


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
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        text = str(error)
        where = Path(path).name if path != ":memory:" else path
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
