"""Where what planners of prompts must remember lies: rows of the table ``layouts``, by a name and a scope.

Knows the table and that a state is JSON; what a state means is known where it is made (layouts.py, marks.py, cores).
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping
from typing import Any

from ..database import Database
from ..types import Scope

__all__ = ["store", "stored"]

_log = logging.getLogger("agentmem")


def stored(database: Database, name: str, scope: Scope) -> dict[str, Any]:
    """What was kept of the prompts that go by this name in this scope; empty where nothing is, or it can't be read."""
    rows = database.query(
        "SELECT state FROM layouts WHERE model = ? AND tenant = ? AND user = ? AND agent = ? AND session = ?",
        _row(name, scope),
    )
    try:
        state = json.loads(rows[0]["state"]) if rows else {}
    except ValueError:
        state = None
    if not isinstance(state, dict):
        _log.warning("how %s's prompts were laid out can't be read, they are laid out anew", name)
        return {}
    return state


def store(connection: sqlite3.Connection, name: str, scope: Scope, at: float, state: Mapping[str, Any]) -> None:
    """Keep it, in the caller's transaction."""
    connection.execute(
        "INSERT OR REPLACE INTO layouts VALUES (?, ?, ?, ?, ?, ?, ?)", (*_row(name, scope), at, json.dumps(state))
    )


def _row(name: str, scope: Scope) -> list[str]:
    return [name, *(value or "" for _, value in scope.levels())]
