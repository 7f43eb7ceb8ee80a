"""Which system text the chats of a scope send, so that what is computed ahead of them is what they will begin with.

Knows digests of heads (they outlive the process, with the layouts) and, in memory only, the texts that made them; a
text that was given to a chat is never written anywhere.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from . import planning, prompt
from .ledger.uses import HAS_TURN, beneath
from .plaintext.drafts import check_text

if TYPE_CHECKING:
    from .engine import Engine
    from .planning import Measured
    from .types import Scope

__all__ = ["given", "note", "system_of"]

#: So many texts are kept at most, the newest: an application has few, unless it writes one for each turn.
MOST = 64


def given(engine: Engine, system: Any) -> str | None:
    """The system text of a request: what was given with it, else that of the settings; None for none, as "" says.
    `InvalidInput` for what is no text."""
    text = engine.settings.system if system is None else system
    return None if text is None or (isinstance(text, str) and not text) else check_text(text, "the system text")


def note(engine: Engine, sent: Measured, system: str | None) -> None:
    """Remember the system text (None: none was given) of a request that was laid out."""
    if (digest := planning.head_of(sent)) is not None:
        with engine.lock:
            engine.heads.pop(digest, None)
            engine.heads[digest] = system or ""
            if len(engine.heads) > MOST:
                del engine.heads[next(iter(engine.heads))]


def system_of(engine: Engine, scope: Scope) -> str | None:
    """The system text that the last chat of this scope was sent with ("" for none), where a prompt that is laid out
    with it begins with the same bytes; None where no such text is known.

    It is not known where the chat was given a text of its own and this process did not see it, and where the head held
    what is not laid out ahead: tools, or no word of memory. Where no digest was kept (no prompt is laid out by what it
    costs there) the setting ``system`` is taken if it has as many tokens.
    """
    usual = engine.settings.system or ""
    kept = planning.stored(engine, engine.chat_provider().name, scope).get("head")
    if not isinstance(kept, str):
        tokens = _tokens(engine, scope)
        return usual if tokens in (None, planning.head_tokens(engine, usual, (), memories=True)) else None
    for text in (usual, engine.heads.get(kept)):
        if text is not None and _digest(engine, text) == kept:
            return text
    return None


def _digest(engine: Engine, system: str) -> str | None:
    return planning.head_of(planning.measured(engine, prompt.lay_out(system=system or None), ()))


def _tokens(engine: Engine, scope: Scope) -> int | None:
    """Tokens of the head of the last chat; None where there was none."""
    sql, values = beneath(scope)
    rows = engine.database.query(f"SELECT turn FROM uses WHERE {sql} AND {HAS_TURN} ORDER BY id DESC LIMIT 1", values)
    try:
        turn = json.loads(rows[0]["turn"]) if rows else None
    except ValueError:
        return None
    return int(turn.get("system") or 0) if isinstance(turn, dict) else None
