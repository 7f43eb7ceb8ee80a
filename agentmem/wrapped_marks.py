"""Which prefixes of a wrapped client's requests its host is asked to keep, planned as those of a chat are.

Measures a request that an adapter read in the planner's terms and keeps what was learnt of a scope's gaps between
processes (table ``layouts``). What costs least is decided in activation/marks.py.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cache_rules import CacheRules, overridden, rules_for
from .types import Message, Scope

if TYPE_CHECKING:
    from .activation.marks import Level, MarkPlanner
    from .engine import Engine

__all__ = ["Marked", "learn", "plan"]

#: What a chat format adds to each message, in tokens: OpenAI's published count, near enough for the others.
MESSAGE_TOKENS = 4
WHERE = "model = ? AND tenant = ? AND user = ? AND agent = ? AND session = ?"


@dataclass(frozen=True)
class Marked:
    """What a request is asked to be kept of. ``marks``: (messages in the prefix, 0 for the system part alone; the
    lifetime's name, None for the host's shortest). ``levels`` and ``at`` are what it was planned with."""

    marks: tuple[tuple[int, str | None], ...]
    rules: CacheRules
    levels: tuple[Level, ...]
    history: tuple[str, int, str]
    at: float


def plan(
    engine: Engine,
    scope: Scope,
    *,
    model: str,
    head: str,
    messages: Sequence[Message],
    prefixes: Sequence[int],
    turn: int,
) -> Marked | None:
    """The marks of a request of ``head`` (tools and system part) and ``messages``; None where the host takes none.

    The history ends before the message ``turn``, the user's last one. ``prefixes`` are where requests end
    (`Asked.prefixes`): with the setting ``cache="fixed"`` all of them are marked, else those behind the turn, in a run
    of tools, whose next request comes at once.
    """
    rules = overridden(rules_for(model), model, engine.settings.rules)
    if rules is None or not rules.marked or engine.settings.cache == "off":
        return None
    levels, history = _levels(engine, head, messages[:turn], _stored(engine, model, scope).get("history"))
    now = engine.clock()
    found: dict[int, str | None] = {}
    if engine.settings.cache == "fixed":
        found = dict.fromkeys((0, *prefixes))
    else:
        planner = _planner(engine, rules, model, scope)
        for blocks, lifetime in planner.plan(levels, now):
            found[blocks - 1] = rules.lifetimes[lifetime].name
        found |= dict.fromkeys(count for count in prefixes if count > turn)
    marks = tuple(sorted(found.items())[-rules.marks :])
    return Marked(marks, rules, levels, history, now)


def learn(engine: Engine, connection: sqlite3.Connection, scope: Scope, model: str, marked: Marked) -> None:
    """The request was answered: keep what it tells of the gaps, in the caller's transaction."""
    planner = _planner(engine, marked.rules, model, scope)
    planner.done(marked.levels, marked.at)
    state = json.dumps({"marks": planner.state(), "history": marked.history})
    connection.execute(
        "INSERT OR REPLACE INTO layouts VALUES (?, ?, ?, ?, ?, ?, ?)", (*_key(model, scope), engine.clock(), state)
    )


def _levels(
    engine: Engine, head: str, past: Sequence[Message], last: Any
) -> tuple[tuple[Level, ...], tuple[str, int, str]]:
    """The system's and the history's ends, and by which name the history goes: it keeps it while it only grows."""
    from .activation.marks import Level

    chain = hashlib.blake2b(head.encode(), digest_size=16)
    tokens = engine.count(head)
    levels = [Level(name="system", key=chain.hexdigest(), tokens=tokens, blocks=1)]
    digests = [chain.hexdigest()]
    for message in past:
        text = json.dumps([message.role, message.content, [call.model_dump() for call in message.tool_calls]])
        chain.update(text.encode())
        digests.append(chain.hexdigest())
        tokens += engine.count(message.content) + MESSAGE_TOKENS
        tokens += sum(engine.count(json.dumps(call.arguments)) + MESSAGE_TOKENS for call in message.tool_calls)
    name, count, digest = last or ("", 0, "")
    if not (0 < count < len(digests) and digests[count] == digest):
        name = digests[-1]
    if past:
        levels.append(Level(name="history", key=name, tokens=tokens, blocks=len(digests)))
    return tuple(levels), (name, len(past), digests[-1])


def _planner(engine: Engine, rules: CacheRules, model: str, scope: Scope) -> MarkPlanner:
    from .activation.marks import MarkPlanner

    return MarkPlanner(rules, state=_stored(engine, model, scope).get("marks"))


def _stored(engine: Engine, model: str, scope: Scope) -> dict[str, Any]:
    rows = engine.database.query(f"SELECT state FROM layouts WHERE {WHERE}", _key(model, scope))
    stored: dict[str, Any] = json.loads(rows[0]["state"]) if rows else {}
    return stored


def _key(model: str, scope: Scope) -> list[str]:
    """A row of its own beside that of a chat with the same model: the two write different prompts."""
    return [f"wrapped {model}", *(value or "" for _, value in scope.levels())]
