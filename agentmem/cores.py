"""The core block of a scope: which records stand at the head of its prompts, and when they are chosen anew.

Knows the table ``cores``. What makes a record worth it is judged in prompt.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

from . import prompt
from .engine import Engine
from .plaintext.drafts import utc_seconds
from .planner.collapse import Account
from .types import Record, Scope

if TYPE_CHECKING:
    from .activation.layouts import Layout

__all__ = ["core", "within"]

#: The newest records that a core is chosen from.
CORE_CANDIDATES = 2000


def within(engine: Engine, tokens: int, share: float) -> int:
    """A budget of the settings, cut to this share of the model's window where that is known and small."""
    window = engine.chat_provider().capabilities.context_tokens
    return tokens if window is None else min(tokens, int(window * share))


def core(engine: Engine, scope: Scope, layout: Layout | None, present: Set[str], *, new_session: bool) -> list[Record]:
    """The records of the scope's core block; as many tokens of them as the layout wants, where there is one. When it is
    chosen, those that are ``present`` in the conversation already are passed over.

    It stands still while a session runs, so that the prefix does; it is chosen again at the start of a session when the
    scope has grown by half since, or when one of its records was forgotten or changed.
    """
    wanted = engine.settings.core_tokens if layout is None else min(layout.core, engine.settings.core_tokens)
    if wanted == 0:
        return []
    levels = [value or "" for _, value in scope.levels()]
    key = json.dumps(levels)
    stored = engine.database.query(
        "SELECT ids, records FROM cores WHERE tenant = ? AND user = ? AND agent = ? AND session = ?", levels
    )
    if stored:
        ids = json.loads(stored[0]["ids"])
        held = engine.records.named(ids, scope)
        # One that was forgotten by another process this very moment is missing: then the core is chosen again.
        if len(held) == len(ids) and not (new_session and _outdated(engine, scope, held, stored[0]["records"])):
            return held
    # A session's own turns are its history: its core comes from what the levels above share.
    now = engine.clock()
    newest = engine.records.newest(scope, limit=CORE_CANDIDATES, at=now)
    candidates = [r for r in newest if r.id not in present and (scope.session is None or r.scope.session is None)]
    chosen = prompt.choose_core(
        candidates[::-1],
        engine.ledger.times_shown([record.id for record in candidates]),
        least=engine.settings.page_tokens if layout is None else 0,
        budget=within(engine, wanted, 0.1),
        count=engine.count,
    )
    with engine.database.write() as connection:
        connection.execute("DELETE FROM lineage WHERE kind = 'core' AND key = ?", (key,))
        ids = json.dumps([record.id for record in chosen])
        connection.execute(
            "INSERT OR REPLACE INTO cores VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*levels, ids, now, engine.records.count(scope)),
        )
        connection.executemany("INSERT INTO lineage VALUES ('core', ?, ?)", [(key, record.id) for record in chosen])
    return chosen


def _outdated(engine: Engine, scope: Scope, core: Sequence[Record], seen: int) -> bool:
    """True if the scope has grown by half since the core was chosen, or one of its records no longer holds."""
    now = engine.clock()
    ended = any(record.valid_until is not None and utc_seconds(record.valid_until) <= now for record in core)
    return ended or engine.records.count(scope) >= 1.5 * seen + 8


# TEMPORARY until branch A has these (helper C's stand-ins)
def standing(engine: Engine, scope: Scope) -> list[Record] | None:
    """The block as it stands."""
    levels = [value or "" for _, value in scope.levels()]
    rows = engine.database.query(
        "SELECT ids FROM cores WHERE tenant = ? AND user = ? AND agent = ? AND session = ?", levels
    )
    return engine.records.named(json.loads(rows[0]["ids"]), scope) if rows else None


def candidate(engine: Engine, scope: Scope) -> list[Record]:
    """What would be chosen."""
    newest = engine.records.newest(scope, limit=CORE_CANDIDATES, at=engine.clock())
    candidates = [r for r in newest if (scope.session is None or r.scope.session is None)]
    return prompt.choose_core(
        candidates[::-1],
        engine.ledger.times_shown([record.id for record in candidates]),
        least=0,
        budget=within(engine, engine.settings.core_tokens, 0.1),
        count=engine.count,
    )


def account(engine: Engine, scope: Scope) -> Account:
    """What was carried."""
    return Account()


def collapse(engine: Engine, scope: Scope, records: Sequence[str] | None = None) -> list[Record]:
    """Rewrite."""
    chosen = candidate(engine, scope) if records is None else engine.records.named(list(records), scope)
    levels = [value or "" for _, value in scope.levels()]
    key = json.dumps(levels)
    with engine.database.write() as connection:
        connection.execute("DELETE FROM lineage WHERE kind = 'core' AND key = ?", (key,))
        ids = json.dumps([record.id for record in chosen])
        connection.execute(
            "INSERT OR REPLACE INTO cores VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*levels, ids, engine.clock(), engine.records.count(scope)),
        )
        connection.executemany("INSERT INTO lineage VALUES ('core', ?, ?)", [(key, record.id) for record in chosen])
    return chosen
