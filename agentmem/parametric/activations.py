"""Which LoRA versions answer in which scope: the rows of the table ``activations``.

The newest row of a scope says what acts there and beneath it, several digests as their sum, none as the base model; the
older rows are what `rollback` goes back to. Knows digests and scopes; knows nothing of what a version is.
"""

from __future__ import annotations

import sqlite3

from agentmem.database import Database
from agentmem.types import LEVELS, Scope

from .versions import columns, upwards

__all__ = ["active_digests", "answering", "deactivate", "last_used", "places"]


def active_digests(database: Database, scope: Scope) -> list[str]:
    """What this scope answers with: its own newest activation, else that of the nearest level above it."""
    for level in upwards(scope):
        rows = database.query(
            "SELECT digest FROM activations WHERE tenant = ? AND user = ? AND agent = ? AND session = ? "
            "ORDER BY id DESC LIMIT 1",
            columns(level),
        )
        if rows:
            return str(rows[0]["digest"]).split()
    return []


def answering(connection: sqlite3.Connection) -> set[str]:
    """The digests that act in any scope now."""
    return {digest for row in _newest(connection) for digest in row["digest"].split()}


def last_used(connection: sqlite3.Connection) -> dict[str, float]:
    """When each digest was last activated."""
    used: dict[str, float] = {}
    for row in connection.execute("SELECT at, digest FROM activations ORDER BY at"):
        used.update(dict.fromkeys(row["digest"].split(), row["at"]))
    return used


def places(connection: sqlite3.Connection, digest: str) -> list[list[str]]:
    """The scopes, as columns, that answer with this version now."""
    return [[row[level] for level in LEVELS] for row in _newest(connection) if digest in row["digest"].split()]


def deactivate(connection: sqlite3.Connection, digest: str) -> None:
    """Take a version out of every activation; what acted beside it acts on.

    Where it was alone in the newest of several activations, the base follows it: an older version never returns by
    itself.
    """
    newest = {row["id"]: row["total"] for row in _newest(connection)}
    for row in connection.execute("SELECT id, digest FROM activations").fetchall():
        named = row["digest"].split()
        if digest not in named:
            continue
        named.remove(digest)
        if named or newest.get(row["id"], 0) > 1:
            connection.execute("UPDATE activations SET digest = ? WHERE id = ?", (" ".join(named), row["id"]))
        else:
            connection.execute("DELETE FROM activations WHERE id = ?", (row["id"],))


def _newest(connection: sqlite3.Connection) -> list[sqlite3.Row]:
    """The newest activation of each scope; ``total`` is how many it has."""
    # With MAX(id), SQLite takes the bare columns from that row.
    sql = "SELECT MAX(id) AS id, COUNT(*) AS total, at, digest, tenant, user, agent, session FROM activations"
    return connection.execute(f"{sql} GROUP BY tenant, user, agent, session").fetchall()
