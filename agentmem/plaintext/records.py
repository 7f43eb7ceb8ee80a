"""Records: the verbatim memory in ``memory.db``, its versions, its full-text rows and its vectors' bytes.

Knows how a row is written whole, checked when it is read, changed and erased. Knows nothing of embedders, of the vector
index or of ranking: vectors come in as numbers. The scope rule is in conditions.py.
"""

from __future__ import annotations

import builtins
import datetime as dt
import json
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentmem.database import Database
from agentmem.errors import Corrupt, InvalidInput, NotFound, ScopeError
from agentmem.types import Record, Scope

from .conditions import beneath, joined, matching, valid_at, visible
from .drafts import (
    Draft,
    check_k,
    check_metadata,
    check_scope,
    check_text,
    draft_of,
    drafts,
    dump_metadata,
    narrow,
    shown,
    utc_seconds,
)
from .rows import (
    Passages,
    build,
    checksum,
    drop_words,
    insert_row,
    levels,
    new_row,
    note_changes,
    past_rows,
    record_of,
    scope_of,
    version_checksum,
    write_passages,
    write_version,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]

__all__ = [
    "Deletion",
    "Draft",
    "TURN",
    "TURNS",
    "Records",
    "check_k",
    "check_scope",
    "draft_of",
    "drafts",
    "narrow",
    "new_id",
]

ID = re.compile(r"[0-9a-f]{32}")
#: By the whole primary key: by the row alone it would walk through all vectors.
DROP_VECTORS = "DELETE FROM vectors WHERE space IN (SELECT id FROM spaces) AND seq = ?"
DROP_TOKENS = "DELETE FROM tokens WHERE space IN (SELECT id FROM spaces) AND seq = ?"
#: The sum of all checksums anew (schema.py); how many rows there should be stays as it was counted.
RECOUNT = (
    "UPDATE totals SET digest = (SELECT coalesce(row_digest(checksum, seq), 0) FROM records) WHERE name = 'records'"
)
#: The source of a chat's own turns. Written out in SQL, so that the partial index ``records_turns`` answers.
TURN = "chat"
TURNS = f"tenant = ? AND user = ? AND agent = ? AND session = ? AND source = '{TURN}'"


def new_id(now: float | None = None) -> str:
    """A fresh record id: 32 hex digits that sort by time of creation (ms) and can't be guessed (RFC 9562, v7)."""
    milliseconds = int((time.time() if now is None else now) * 1000) & (2**48 - 1)
    random = secrets.randbits(74)
    return f"{milliseconds << 80 | 7 << 76 | (random >> 62) << 64 | 2 << 62 | random & (2**62 - 1):032x}"


@dataclass(frozen=True, kw_only=True)
class Deletion:
    """How many rows of each kind `Records.delete` removed."""

    records: int
    versions: int
    vectors: int


class Records:
    """The records of one folder. ``clock`` gives seconds since 1970; order never depends on it."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._settled: dict[int, tuple[int, int]] = {}

    def insert(
        self,
        drafts: Sequence[Draft],
        vectors: Passages | Vectors | None = None,
        space: int | None = None,
        *,
        ids: Sequence[str] | None = None,
        older: Sequence[Sequence[Record]] | None = None,
    ) -> builtins.list[Record]:
        """Store all drafts or none, in one transaction; when this returns they survive a crash.

        ``vectors`` in the embedding space ``space`` are those of the texts' passages, or float32 [len(drafts),
        dimension] of the whole texts. ``ids`` were made by `new_id`; an id that is in use or was forgotten is refused.
        ``older`` holds each record's earlier versions (an import).
        """
        ids = sorted(new_id(self._clock()) for _ in drafts) if ids is None else [*ids]
        if len(ids) != len(drafts) or len(set(ids)) != len(ids) or not all(map(_well_formed, ids)):
            raise InvalidInput(f"{len(drafts)} records need {len(drafts)} different ids made by new_id()")
        space = _space_of(vectors, space)
        passages = self._passages(vectors, space, [draft.text for draft in drafts])
        if not drafts:
            return []
        for draft in drafts:
            check_scope(draft.scope)
        created = self._clock()
        rows = [new_row(draft, id_, created) for draft, id_ in zip(drafts, ids, strict=True)]
        versions = []
        for row, past in zip(rows, older or (), strict=older is not None):
            versions += past_rows(row, past)
        with self._database.write() as connection:
            listed = json.dumps(ids)
            for table, column, why in (("tombstones", "record", "was forgotten"), ("records", "id", "is in use")):
                taken = connection.execute(
                    f"SELECT {column} FROM {table} WHERE {column} IN (SELECT value FROM json_each(?))",
                    (listed,),
                ).fetchone()
                if taken:
                    raise InvalidInput(f"the id {taken[0]} {why}: leave the choice of ids to agentmem")
            seqs = [insert_row(connection, row) for row in rows]
            connection.executemany(
                "INSERT INTO records_fts (rowid, text, name) VALUES (?, ?, ?)",
                [(seq, row["text"], row["name"]) for seq, row in zip(seqs, rows, strict=True)],
            )
            for version in versions:
                write_version(connection, version)
            if passages is not None:
                write_passages(connection, space, seqs, passages)
            note_changes(connection, [(row["tenant"], seq, 1) for row, seq in zip(rows, seqs, strict=True)])
        return [record_of(row) for row in rows]

    def get(self, id: str, scope: Scope) -> Record:
        """The record with this id. `NotFound` for an unknown id and for one that this scope can't see, alike."""
        return record_of(self._row(id, scope))

    def list(
        self, scope: Scope, where: Mapping[str, Any] | None = None, limit: int = 100, after: str | None = None
    ) -> builtins.list[Record]:
        """Up to ``limit`` visible records in order of arrival, those behind the record ``after`` if it is given."""
        limit = check_k(limit, "limit")
        conditions = [visible(scope), matching(where)]
        if after is not None:
            try:
                conditions.append(("records.seq > ?", [self._row(after, scope)["seq"]]))
            except NotFound:
                # The page's last record may have been forgotten meanwhile: ids sort by time, so the listing goes on.
                conditions.append(("records.id > ?", [after]))
        sql, values = joined(conditions)
        rows = self._database.query(f"SELECT * FROM records WHERE {sql} ORDER BY seq LIMIT ?", [*values, limit])
        return [record_of(row) for row in rows]

    def named(self, ids: Sequence[str], scope: Scope) -> builtins.list[Record]:
        """The visible records among these, in the order of ``ids``."""
        sql, values = visible(scope)
        # CROSS JOIN keeps the order: a few look-ups by id, not a walk through the scope.
        wanted = "json_each(?) AS wanted CROSS JOIN records ON records.id = wanted.value"
        rows = self._database.query(f"SELECT records.* FROM {wanted} WHERE {sql}", [json.dumps(list(ids)), *values])
        found = {row["id"]: record_of(row) for row in rows}
        return [found[id_] for id_ in ids if id_ in found]

    def newest(self, scope: Scope, limit: int = 100, *, at: float | None = None) -> builtins.list[Record]:
        """Up to ``limit`` visible records, the newest arrival first; with ``at`` those that hold then (UTC seconds)."""
        sql, values = joined([visible(scope), *([] if at is None else [valid_at(at)])])
        # Which they are is told from an index that has all the conditions; only those few are read as rows.
        newest = f"SELECT seq FROM records WHERE {sql} ORDER BY seq DESC LIMIT ?"
        rows = self._database.query(
            f"SELECT * FROM records WHERE seq IN ({newest}) ORDER BY seq DESC", [*values, check_k(limit, "limit")]
        )
        return [record_of(row) for row in rows]

    def ids(self, scope: Scope) -> set[str]:
        """The ids of all records at this scope and beneath it."""
        sql, values = beneath(scope)
        return {row["id"] for row in self._database.query(f"SELECT id FROM records WHERE {sql}", values)}

    def known(self, id: str) -> bool:
        """True if a record in any scope has this id, or had it and was forgotten."""
        found = "SELECT 1 FROM records WHERE id = ? UNION ALL SELECT 1 FROM tombstones WHERE record = ?"
        return _well_formed(id) and bool(self._database.query(found, (id, id)))

    def turns(self, scope: Scope, *, limit: int, before: str | None = None) -> builtins.list[Record]:
        """Up to ``limit`` turns of chats exactly at ``scope``, the newest first; those older than the record ``before``
        if it is given."""
        older, values = _older(before)
        rows = self._database.query(
            f"SELECT * FROM records WHERE {TURNS}{older} ORDER BY seq DESC LIMIT ?", [*levels(scope), *values, limit]
        )
        return [record_of(row) for row in rows]

    def count_turns(self, scope: Scope, *, before: str | None = None) -> int:
        """How many turns of chats lie exactly at ``scope``; those older than the record ``before`` if it is given."""
        older, values = _older(before)
        return int(
            self._database.query(f"SELECT count(*) FROM records WHERE {TURNS}{older}", [*levels(scope), *values])[0][0]
        )

    def has_turns(self, scope: Scope) -> bool:
        """Whether any turn of a chat lies exactly at ``scope``; reads one row, however long the chat is."""
        return bool(self._database.query(f"SELECT 1 FROM records WHERE {TURNS} LIMIT 1", levels(scope)))

    def turns_from(self, session: Scope, start: str, *, carried: bool) -> builtins.list[Record]:
        """The turns of a session's chat from the record ``start`` on, in order. With ``carried`` those of the sessions
        beside it that lie between come first, as long as they are older than the session itself."""
        first = self._database.query(
            "SELECT seq FROM records WHERE id = ? UNION ALL SELECT MIN(seq) FROM records WHERE id > ? LIMIT 1",
            (start, start),
        )
        # Where it was forgotten and nothing came after it, nothing is left of a history that began with it.
        since = first[0][0] if first and first[0][0] is not None else 2**63 - 1
        own = [*levels(session), since]
        mine = self._database.query(f"SELECT * FROM records WHERE {TURNS} AND seq >= ? ORDER BY seq", own)
        earlier: builtins.list[Any] = []
        begun = None
        if carried:
            begun = self._database.query(f"SELECT MIN(seq) FROM records WHERE {TURNS}", levels(session))[0][0]
        if carried and (begun is None or since < begun):  # else nothing lies between, and no session has to be asked
            earlier = self._database.query(
                "SELECT * FROM records WHERE tenant = ? AND user = ? AND agent = ? AND session != ?"
                f" AND source = '{TURN}' AND seq >= ? AND seq < ? ORDER BY seq",
                [*own, 2**63 - 1 if begun is None else begun],
            )
        return [record_of(row) for row in [*earlier, *mine]]

    def around(self, id: str, scope: Scope, *, before: int, after: int) -> builtins.list[Record]:
        """A record amid up to ``before`` and ``after`` others of its session, in order; alone if it has no session."""
        before, after = check_k(before, "before", least=0), check_k(after, "after", least=0)
        row = self._row(id, scope)
        own = record_of(row)
        if own.scope.session is None:
            return [own]
        beside = "SELECT * FROM records WHERE tenant = ? AND user = ? AND agent = ? AND session = ? AND seq"
        values = [*levels(own.scope), row["seq"]]
        earlier = self._database.query(f"{beside} < ? ORDER BY seq DESC LIMIT ?", [*values, before])
        later = self._database.query(f"{beside} > ? ORDER BY seq LIMIT ?", [*values, after])
        return [*map(record_of, earlier[::-1]), own, *map(record_of, later)]

    def count(self, scope: Scope) -> int:
        """How many records this scope can see."""
        sql, values = visible(scope)
        return int(self._database.query(f"SELECT count(*) FROM records WHERE {sql}", values)[0][0])

    def at_rows(self, seqs: Iterable[int], scope: Scope) -> dict[int, Record]:
        """The visible records in these rows, by row; what is gone or not visible is left out."""
        sql, values = visible(scope)
        rows = self._database.query(
            f"SELECT records.* FROM json_each(?) AS wanted CROSS JOIN records ON seq = wanted.value WHERE {sql}",
            [json.dumps([int(seq) for seq in seqs]), *values],
        )
        return {int(row["seq"]): record_of(row) for row in rows}

    def history(self, id: str, scope: Scope) -> builtins.list[Record]:
        """Every version of a record, the oldest first, the current one last."""
        row = dict(self._row(id, scope))
        past = self._database.query("SELECT * FROM versions WHERE id = ? ORDER BY version", (id,))
        versions = []
        for old in past:
            if old["checksum"] != version_checksum(old):
                raise Corrupt(
                    f"version {old['version']} of record {id} fails its checksum: forget it or restore a backup"
                )
            content = {key: old[key] for key in ("text", "metadata", "created", "version")}
            versions.append(build({**row, **content}))
        return [*versions, record_of(row)]

    def update(
        self,
        id: str,
        scope: Scope,
        *,
        text: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        vectors: Passages | Vectors | None = None,
        space: int | None = None,
    ) -> Record:
        """Replace text, metadata or both; the old version is kept in the history. ``vectors`` are the new text's.

        Without them a changed text has no vector until it is embedded (`pending`). `ScopeError` for a record that
        a level above shares with this scope: it can be read here and changed only there.
        """
        if text is None and metadata is None:
            raise InvalidInput("update needs a text, a metadata mapping, or both")
        if text is not None:
            text = check_text(text)
        new_metadata = None if metadata is None else dump_metadata(check_metadata(metadata))
        space = _space_of(vectors, space)
        passages = self._passages(vectors, space, ["" if text is None else text])
        with self._database.write() as connection:
            row = dict(self._changeable(id, scope))
            record_of(row)  # a damaged row must not be copied into the history under a fresh checksum
            write_version(connection, row)
            new = {**row, "version": row["version"] + 1, "created": self._clock()}
            new["text"] = row["text"] if text is None else text
            new["metadata"] = row["metadata"] if new_metadata is None else new_metadata
            new["checksum"] = checksum(new)
            connection.execute(
                "UPDATE records SET text = ?, metadata = ?, created = ?, version = ?, checksum = ? WHERE seq = ?",
                [new[key] for key in ("text", "metadata", "created", "version", "checksum", "seq")],
            )
            if new["text"] != row["text"]:
                drop_words(connection, row)
                connection.execute(
                    "INSERT INTO records_fts (rowid, text, name) VALUES (?, ?, ?)",
                    (row["seq"], new["text"], row["name"]),
                )
                connection.execute(DROP_VECTORS, (row["seq"],))
                connection.execute(DROP_TOKENS, (row["seq"],))
                if passages is not None:
                    write_passages(connection, space, [row["seq"]], passages)
            note_changes(connection, [(row["tenant"], row["seq"], 1)])
        return record_of(new)

    def end(self, ids: Sequence[str], scope: Scope, when: dt.datetime, *, begun: bool = False) -> None:
        """Let these records hold until ``when`` and no longer; one that ended before stays as it is.

        Raises `NotFound` and `ScopeError` as `update`, and `InvalidInput` for a record that begins at ``when`` or
        later; with ``begun`` such a one is passed over.
        """
        seconds = utc_seconds(when)
        with self._database.write() as connection:
            for id_ in ids:
                row = dict(self._changeable(id_, scope))
                record_of(row)
                if row["from_s"] is not None and row["from_s"] >= seconds:
                    if begun:
                        continue
                    raise InvalidInput(
                        f"record {id_} holds from {row['valid_from']} on, so it can't end at {when.isoformat()}: "
                        "give the new one a later valid_from or at"
                    )
                if row["until_s"] is not None and row["until_s"] <= seconds:
                    continue
                new = {**row, "valid_until": when.isoformat(), "until_s": seconds}
                connection.execute(
                    "UPDATE records SET valid_until = ?, until_s = ?, checksum = ? WHERE seq = ?",
                    (new["valid_until"], seconds, checksum(new), row["seq"]),
                )
                note_changes(connection, [(row["tenant"], row["seq"], 1)])

    def select(
        self, scope: Scope, *, ids: Sequence[str] | None = None, where: Mapping[str, Any] | None = None
    ) -> builtins.list[str]:
        """The ids of records that this scope may forget: the named (`ScopeError` for shared ones) or all matching."""
        if (ids is None) == (where is None):
            raise InvalidInput("say which records: either ids or where, not both")
        if ids is not None:
            ids = [ids] if isinstance(ids, str) else ids
            return list(dict.fromkeys(self._changeable(id_, scope)["id"] for id_ in ids))
        sql, values = joined([beneath(scope), matching(where)])
        return [row["id"] for row in self._database.query(f"SELECT id FROM records WHERE {sql} ORDER BY seq", values)]

    def rows_of(self, ids: Sequence[str]) -> Deletion:
        """How many rows of each kind `delete` would remove."""
        named = "(SELECT value FROM json_each(?))"
        counts = self._database.query(
            f"SELECT (SELECT count(*) FROM records WHERE id IN {named}),"
            f" (SELECT count(*) FROM versions WHERE id IN {named}),"
            " (SELECT count(*) FROM vectors WHERE space IN (SELECT id FROM spaces) AND seq IN"
            f" (SELECT seq FROM records WHERE id IN {named}))",
            [json.dumps(list(ids))] * 3,
        )[0]
        return Deletion(records=counts[0], versions=counts[1], vectors=counts[2])

    def delete(self, ids: Sequence[str]) -> Deletion:
        """Remove these records with their versions, words and vectors, and leave a tombstone for each id.

        Joins the caller's transaction. Call `VectorIndex.rewrite` and `Database.scrub` once it is committed: until then
        deleted bytes lie in the write-ahead log, in the full-text segments and in the index file.
        """
        versions = vectors = records = 0
        damaged = False
        with self._database.write() as connection:
            for id_ in ids:
                row = connection.execute("SELECT * FROM records WHERE id = ?", (id_,)).fetchone()
                if row is None:
                    continue
                damaged = damaged or row["checksum"] != checksum(row)
                drop_words(connection, row)
                connection.execute("DELETE FROM records WHERE seq = ?", (row["seq"],))
                versions += connection.execute("DELETE FROM versions WHERE id = ?", (id_,)).rowcount
                vectors += connection.execute(DROP_VECTORS, (row["seq"],)).rowcount
                connection.execute(DROP_TOKENS, (row["seq"],))
                note_changes(connection, [(row["tenant"], row["seq"], 0)])
                connection.execute("INSERT OR REPLACE INTO tombstones (record, at) VALUES (?, ?)", (id_, self._clock()))
                records += 1
            if damaged:
                # The words of a damaged text are not the words that were indexed: start over from the other rows. Nor
                # is its checksum surely the one that was counted.
                connection.execute("INSERT INTO records_fts (records_fts) VALUES ('rebuild')")
                connection.execute(RECOUNT)
        return Deletion(records=records, versions=versions, vectors=vectors)

    def pending(self, space: int, limit: int = 256) -> builtins.list[tuple[int, str, str | None]]:
        """(row, text, name) of up to ``limit`` records that have no vector in ``space`` yet, the oldest first."""
        # Only what came or changed since nothing was missing is looked at: this is asked before every search.
        last, change = self._settled.get(space, (0, 0))
        mark = self._database.query(
            "SELECT (SELECT coalesce(max(seq), 0) FROM records), (SELECT coalesce(max(change), 0) FROM changes)"
        )[0]
        if tuple(mark) == (last, change):
            return []
        kept = "SELECT 1 FROM changes WHERE change = ?"
        if change and not self._database.query(kept, (change,)):
            last = change = 0
        # As one set: of an OR SQLite makes a walk through all records.
        both = "seq IN (SELECT seq FROM records WHERE seq > ? UNION SELECT seq FROM changes WHERE change > ?)"
        new = both if change else "seq > ? + 0 * ?"
        rows = self._database.query(
            f"SELECT seq, text, name FROM records WHERE {new} AND NOT EXISTS "
            "(SELECT 1 FROM vectors WHERE vectors.space = ? AND vectors.seq = records.seq) ORDER BY seq LIMIT ?",
            (last, change, space, limit),
        )
        if not rows:
            self._settled[space] = (mark[0], mark[1])
        return [(row["seq"], row["text"], row["name"]) for row in rows]

    def embed_rows(self, rows: Sequence[tuple[int, str, str | None]], vectors: Passages | Vectors, space: int) -> int:
        """Give rows of `pending` their vectors, unless a text changed or went meanwhile; returns how many got one."""
        passages = self._passages(vectors, space, [text for _, text, _ in rows])
        assert passages is not None
        with self._database.write() as connection:
            ready, changes = [], []
            for at, (seq, text, _) in enumerate(rows):
                row = connection.execute("SELECT tenant, text FROM records WHERE seq = ?", (seq,)).fetchone()
                if row is not None and row["text"] == text:
                    ready.append(at)
                    changes.append((row["tenant"], seq, 1))
            write_passages(connection, space, [seq for _, seq, _ in changes], passages.pick(ready))
            note_changes(connection, changes)
        return len(ready)

    def verify(self) -> builtins.list[str]:
        """What is wrong with the records, versions, words and vectors, one line each; empty if all is well."""
        from .checks import damages

        return damages(self._database)

    def _row(self, id_: object, scope: Scope) -> sqlite3.Row:
        sql, values = visible(scope)
        if not isinstance(id_, str):
            raise InvalidInput(f"a record id is a str, not {shown(id_)}")
        rows = []
        if _well_formed(id_):
            rows = self._database.query(f"SELECT * FROM records WHERE id = ? AND {sql}", [id_, *values])
        if not rows:
            raise NotFound(f"no record {shown(id_)} in this scope")
        return rows[0]

    def _changeable(self, id_: object, scope: Scope) -> sqlite3.Row:
        row = self._row(id_, scope)
        owner = scope_of(row)
        if not owner.within(scope):
            raise ScopeError(f"record {id_} belongs to {owner}: it can be read in {scope}, but only changed there")
        return row

    def _passages(self, vectors: Passages | Vectors | None, space: int | None, texts: Sequence[str]) -> Passages | None:
        """``vectors`` if they are fit to be stored as those of these texts."""
        if vectors is None:
            return None
        import numpy as np

        known = self._database.query("SELECT dimension FROM spaces WHERE id = ?", (space,))
        if not known:
            raise InvalidInput(f"there is no embedding space {space!r}: open one with index.open_space()")
        passages = vectors if isinstance(vectors, Passages) else Passages([[(0, len(text))] for text in texts], vectors)
        count = sum(map(len, passages.spans))
        matrix = np.asarray(passages.vectors)
        if len(passages.spans) != len(texts) or not all(passages.spans):
            raise InvalidInput(f"there are passages of {len(passages.spans)} texts for {len(texts)}")
        if matrix.shape != (count, known[0][0]):
            raise InvalidInput(f"the vectors have the shape {matrix.shape}, {(count, known[0][0])} was expected")
        if not np.isfinite(matrix).all() or not np.asarray(matrix, np.float64).any(axis=1).all():
            raise InvalidInput("a vector is all zeros or holds NaN or infinity: the embedder failed")
        return passages


def _space_of(vectors: Passages | Vectors | None, space: int | None) -> int | None:
    """The space that these vectors are of: their own word counts, the folder may have turned to another meanwhile."""
    return space if not isinstance(vectors, Passages) or vectors.space is None else vectors.space


def _older(than: str | None) -> tuple[str, builtins.list[str]]:
    return ("", []) if than is None else (" AND seq < (SELECT seq FROM records WHERE id = ?)", [than])


def _well_formed(id_: object) -> bool:
    return isinstance(id_, str) and ID.fullmatch(id_) is not None
