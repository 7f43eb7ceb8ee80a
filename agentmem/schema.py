"""The tables of ``memory.db``, and what makes of each older format the next.

SQL and the functions that it calls: what the rows mean is known where they are written and read, how the file is kept
safe in database.py.
"""

from __future__ import annotations

import datetime as dt

__all__ = ["FORMAT", "GUARDS", "LEARNT", "PLANS", "SCHEMA", "TABLES", "UPGRADES", "RowDigest", "unix_seconds"]

#: Version of the tables below, kept in ``PRAGMA user_version``. A newer file is refused; an older one is upgraded in
#: place.
FORMAT = 6

#: How damage is seen that SQLite itself keeps silent on. ``totals`` is kept by triggers, so that no write can forget
#: it: how many rows a table has and the sum of their checksums, weighted by place (a row that is missing, or an old
#: state of one, changes it). The indexes hold whole rows a second time: ``PRAGMA integrity_check`` compares both, so
#: that a changed byte in either is found.
GUARDS = """
CREATE TABLE totals (name TEXT PRIMARY KEY, held INTEGER NOT NULL, digest INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO totals SELECT 'records', count(*), coalesce(row_digest(checksum, seq), 0) FROM records;
INSERT INTO totals SELECT 'versions', count(*), coalesce(row_digest(checksum, version), 0) FROM versions;
CREATE TRIGGER records_added AFTER INSERT ON records BEGIN UPDATE totals SET held = held + 1,
    digest = (digest + NEW.checksum * (NEW.seq % 1048573 + 1)) & 4611686018427387903 WHERE name = 'records'; END;
CREATE TRIGGER records_changed AFTER UPDATE ON records BEGIN UPDATE totals SET
    digest = (digest - OLD.checksum * (OLD.seq % 1048573 + 1) + NEW.checksum * (NEW.seq % 1048573 + 1))
    & 4611686018427387903 WHERE name = 'records'; END;
CREATE TRIGGER records_gone AFTER DELETE ON records BEGIN UPDATE totals SET held = held - 1,
    digest = (digest - OLD.checksum * (OLD.seq % 1048573 + 1)) & 4611686018427387903 WHERE name = 'records'; END;
CREATE TRIGGER versions_added AFTER INSERT ON versions BEGIN UPDATE totals SET held = held + 1,
    digest = (digest + NEW.checksum * (NEW.version % 1048573 + 1)) & 4611686018427387903 WHERE name = 'versions'; END;
CREATE TRIGGER versions_gone AFTER DELETE ON versions BEGIN UPDATE totals SET held = held - 1,
    digest = (digest - OLD.checksum * (OLD.version % 1048573 + 1)) & 4611686018427387903 WHERE name = 'versions'; END;
CREATE INDEX meta_whole ON meta (key, value);
CREATE INDEX spaces_whole ON spaces (id, name, digest, dimension);
CREATE INDEX tombstones_whole ON tombstones (record, at);
CREATE INDEX cores_whole ON cores (tenant, user, agent, session, ids, built, records);
CREATE INDEX activations_whole ON activations (id, at, digest, tenant, user, agent, session);
-- With the money, so that a budget's sum reads no rows; the second is for handles that set a user but no tenant.
CREATE INDEX uses_scope ON uses (tenant, user, agent, session, at, money);
CREATE INDEX uses_user ON uses (user, tenant, agent, session, at, money);
CREATE INDEX layouts_whole ON layouts (model, tenant, user, agent, session, at, state);
CREATE INDEX kept_whole ON kept (turn, place, record, start, stop);
CREATE INDEX budgets_whole ON budgets (tenant, user, agent, session, per, dollars, action, at);
CREATE INDEX counts_whole ON counts (model, uses, estimated, counted, squares);
CREATE INDEX shown_whole ON shown (record, model, at, times, holds_s);
INSERT OR IGNORE INTO meta VALUES ('identity', lower(hex(randomblob(8))));
"""

#: What plans and counts need to outlive a process.
PLANS = """
-- How a scope's prompts are laid out for a model (JSON of activation/layouts.py): it must outlive the process, or a
-- cached prefix would be rebuilt.
CREATE TABLE layouts (
    model TEXT NOT NULL, tenant TEXT NOT NULL, user TEXT NOT NULL, agent TEXT NOT NULL, session TEXT NOT NULL,
    at REAL NOT NULL, state TEXT NOT NULL, PRIMARY KEY (model, tenant, user, agent, session)
) WITHOUT ROWID;
-- Recalled records that stay in the history of a conversation, before the turn that they were recalled for.
CREATE TABLE kept (
    turn TEXT NOT NULL, place INTEGER NOT NULL, record TEXT NOT NULL, start INTEGER NOT NULL, stop INTEGER,
    PRIMARY KEY (turn, place)
) WITHOUT ROWID;
CREATE INDEX kept_record ON kept (record);
-- What may be spent in a scope and beneath it: dollars per day, month or ever; action is stop or warn.
CREATE TABLE budgets (
    tenant TEXT NOT NULL, user TEXT NOT NULL, agent TEXT NOT NULL, session TEXT NOT NULL, per TEXT NOT NULL,
    dollars REAL NOT NULL, action TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (tenant, user, agent, session, per)
) WITHOUT ROWID;
-- How far estimates of a prompt's tokens were from what the host then counted, by model.
CREATE TABLE counts (
    model TEXT PRIMARY KEY, uses INTEGER NOT NULL, estimated REAL NOT NULL, counted REAL NOT NULL,
    squares REAL NOT NULL                       -- of the relative errors that the estimates had
) WITHOUT ROWID;
"""

#: What LoRA versions leave behind, since format 6, and the guards of that.
LEARNT = """
-- What became of a LoRA version that learnt a record which was forgotten or changed (JSON of `types.Retraining`):
-- numbers and ids, no text. They outlive the version as the proof that the record is not in what took its place.
CREATE TABLE receipts (retired TEXT PRIMARY KEY, at REAL NOT NULL, report TEXT NOT NULL) WITHOUT ROWID;
-- LoRA versions that were handed to a server, and under which name. A row outlives its version until it is withdrawn.
CREATE TABLE published (
    digest TEXT NOT NULL, target TEXT NOT NULL, served TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (digest, target, served)
) WITHOUT ROWID;
CREATE INDEX receipts_whole ON receipts (retired, at, report);
CREATE INDEX published_whole ON published (digest, target, served, at);
CREATE INDEX uses_whole ON uses (
    id, at, verb, model, tenant, user, agent, session, input, cached, written, output, first_s, total_s, bytes,
    expected, reason, money, uncached_money, attended, long_written, turn, loras
);
"""

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
CREATE INDEX jobs_record ON jobs (record, kind);
ALTER TABLE uses ADD COLUMN long_written INTEGER NOT NULL DEFAULT 0;
ALTER TABLE uses ADD COLUMN turn TEXT;
"""
    + PLANS
    + GUARDS,
    5: "ALTER TABLE uses ADD COLUMN loras TEXT;\nDROP INDEX IF EXISTS uses_whole;" + LEARNT,
}

TABLES = """
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
-- Work to be done later for a record (of kind retrain: for a retired LoRA version), each kind once: queued, done,
-- failed or refused.
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, record TEXT NOT NULL, state TEXT NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0, note TEXT, at REAL NOT NULL, UNIQUE (kind, record)
);
CREATE INDEX jobs_record ON jobs (record, kind);
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
-- One row per activation, newest last: the newest row of a scope is what is active, several digests with a space
-- between them (digest '' is none); rollback drops it.
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
    attended TEXT,                              -- JSON of `types.Attended`: what attention read in place
    long_written INTEGER NOT NULL DEFAULT 0,    -- of written, those kept for the longer time
    turn TEXT,                                  -- JSON of `layouts.Turn`: what the request was made of, in tokens
    loras TEXT                                  -- JSON list of the LoRA versions that acted, by name
);
-- When a record was last put into a prompt, how often, and for which model: salience, and what a host may still hold.
CREATE TABLE shown (
    record TEXT NOT NULL, model TEXT NOT NULL, at REAL NOT NULL, times INTEGER NOT NULL, holds_s REAL,
    PRIMARY KEY (record, model)
) WITHOUT ROWID;
"""
#: All that a new file has.
SCHEMA = TABLES + PLANS + GUARDS + LEARNT


def unix_seconds(moment: str | None) -> float | None:
    """An ISO time as seconds since 1970, by exact arithmetic: for upgrades of tables that hold only the text."""
    if moment is None:
        return None
    when = dt.datetime.fromisoformat(moment)
    when = when if when.tzinfo else when.replace(tzinfo=dt.UTC)
    return (when - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) / dt.timedelta(seconds=1)


class RowDigest:
    """The sum that the triggers of ``totals`` keep, over rows of (checksum, place)."""

    def __init__(self) -> None:
        self._sum = 0

    def step(self, *row: int) -> None:
        """Add a row."""
        checksum, place = row
        self._sum += checksum * (place % 1048573 + 1)

    def finalize(self) -> int:
        """The sum, modulo 2^62."""
        return self._sum & 4611686018427387903
