"""Which LoRA versions answer in which scope: the rows of the table ``activations``.

The newest row of a scope says what acts there and beneath it: several digests as their sum, none as the base model, and
behind `FOLLOWS` also what the level above answers with, whatever that is at the time. Older rows are what `rollback`
goes back to. Knows digests and scopes; knows nothing of what a version is.
"""

from __future__ import annotations

import sqlite3

from agentmem.database import Database
from agentmem.types import LEVELS, Scope

from .versions import columns, upwards

__all__ = ["FOLLOWS", "active_digests", "answering", "deactivate", "last_used", "named", "own_digests", "places"]

#: The first word of a row beneath which the level above answers too.
FOLLOWS = "+"


def named(row: sqlite3.Row) -> list[str]:
    """The digests of a row, without what it follows."""
    return [digest for digest in str(row["digest"]).split() if digest != FOLLOWS]


def own_digests(database: Database, scope: Scope) -> tuple[list[str], bool]:
    """What this scope's own newest activation names, and whether the level above answers here as well."""
    rows = database.query(
        "SELECT digest FROM activations WHERE tenant = ? AND user = ? AND agent = ? AND session = ? "
        "ORDER BY id DESC LIMIT 1",
        columns(scope),
    )
    return (named(rows[0]), rows[0]["digest"].startswith(FOLLOWS)) if rows else ([], True)


def active_digests(database: Database, scope: Scope) -> list[str]:
    """What this scope answers with: its own newest activation and, where that follows or there is none, what the level
    above answers with, before it."""
    found: list[str] = []
    for level in upwards(scope):
        own, follows = own_digests(database, level)
        found = [*own, *found]
        if not follows:
            break
    return list(dict.fromkeys(found))


def answering(connection: sqlite3.Connection) -> set[str]:
    """The digests that act in any scope now."""
    return {digest for row in _newest(connection) for digest in named(row)}


def last_used(connection: sqlite3.Connection) -> dict[str, float]:
    """When each digest was last activated."""
    used: dict[str, float] = {}
    for row in connection.execute("SELECT at, digest FROM activations ORDER BY at"):
        used.update(dict.fromkeys(named(row), float(row["at"])))
    return used


def places(connection: sqlite3.Connection, digest: str) -> list[list[str]]:
    """The scopes, as columns, that answer with this version now."""
    return [[row[level] for level in LEVELS] for row in _newest(connection) if digest in named(row)]


def deactivate(connection: sqlite3.Connection, digest: str) -> None:
    """Take a version out of every activation; what acted beside it acts on.

    Where it was alone in the newest of several activations, the base follows it: an older version never returns by
    itself.
    """
    newest = {row["id"]: row["total"] for row in _newest(connection)}
    for row in connection.execute("SELECT id, digest FROM activations").fetchall():
        words = row["digest"].split()
        if digest not in words:
            continue
        words.remove(digest)
        if words or newest.get(row["id"], 0) > 1:
            connection.execute("UPDATE activations SET digest = ? WHERE id = ?", (" ".join(words), row["id"]))
        else:
            connection.execute("DELETE FROM activations WHERE id = ?", (row["id"],))


def _newest(connection: sqlite3.Connection) -> list[sqlite3.Row]:
    """The newest activation of each scope; ``total`` is how many it has."""
    # With MAX(id), SQLite takes the bare columns from that row.
    sql = "SELECT MAX(id) AS id, COUNT(*) AS total, at, digest, tenant, user, agent, session FROM activations"
    return connection.execute(f"{sql} GROUP BY tenant, user, agent, session").fetchall()
