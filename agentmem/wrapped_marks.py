"""Which prefixes of a wrapped client's requests its host is asked to keep, planned as those of a chat are.

Puts a request that an adapter read in the terms of planning.py, which measures it and keeps what was learnt of a
scope's gaps between processes. What costs least is decided in activation/marks.py.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import planning
from .cache_rules import CacheRules, overridden, rules_for
from .types import Message, Scope, Segment

if TYPE_CHECKING:
    from .activation.marks import Level, MarkPlanner
    from .engine import Engine

__all__ = ["Marked", "learn", "plan"]


@dataclass(frozen=True)
class Marked:
    """What a request is asked to be kept of. ``marks``: (messages in the prefix, 0 for the system part alone; the
    lifetime's name, None for the host's shortest). ``levels``, ``history`` and ``at`` are what it was planned with."""

    marks: tuple[tuple[int, str | None], ...]
    rules: CacheRules
    levels: tuple[Level, ...]
    history: planning.History | None
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
    segments = [Segment(name="system", messages=(Message(role="system", content=head),), stable=True)]
    if turn:
        segments.append(Segment(name="history", messages=tuple(messages[:turn]), stable=True))
    sent = planning.measured(engine, segments, ())
    state = planning.stored(engine, _name(model), scope)
    levels = tuple(planning.grown(sent, planning.history_of(state.get("history"))))
    now = engine.clock()
    found: dict[int, str | None] = {}
    if engine.settings.cache == "fixed":
        found = dict.fromkeys((0, *prefixes))
    else:
        for blocks, lifetime in _planner(rules, state).plan(levels, now):
            found[sum(end <= blocks for end in sent.ends) - 1] = rules.lifetimes[lifetime].name
        found |= dict.fromkeys(count for count in prefixes if count > turn)
    marks = tuple(sorted(found.items())[-rules.marks :])
    return Marked(marks, rules, levels, planning.sent_history(sent, levels), now)


def learn(engine: Engine, connection: sqlite3.Connection, scope: Scope, model: str, marked: Marked) -> None:
    """The request was answered: keep what it tells of the gaps, in the caller's transaction."""
    planner = _planner(marked.rules, planning.stored(engine, _name(model), scope))
    planner.done(marked.levels, marked.at)
    state = {"marks": planner.state(), "history": marked.history}
    planning.store(connection, _name(model), scope, engine.clock(), state)


def _planner(rules: CacheRules, state: Mapping[str, Any]) -> MarkPlanner:
    from .activation.marks import MarkPlanner

    return MarkPlanner(rules, state=state.get("marks"))


def _name(model: str) -> str:
    """A row of its own beside that of a chat with the same model: the two write different prompts."""
    return f"wrapped {model}"
