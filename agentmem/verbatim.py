"""The verbatim end of a conversation as it enters a prompt: from where it begins, and never without what it needs.

Reads stored turns; where the history begins is decided by the layout (planning.py), or by a budget where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import planning, prompt
from .cores import within
from .engine import Engine
from .types import Message, Record, Scope

if TYPE_CHECKING:
    from .activation.layouts import Layout
    from .chat import Conversation
    from .planning import Plan

__all__ = ["begun"]

#: Tokens of the running conversation in a prompt, where nothing is known of what they cost.
HISTORY_TOKENS = 3000
#: What stands for a question that is no longer remembered.
LEFT_OUT = "(The question is left out.)"
#: Turns read at once, from the newest back, until the history's budget is full.
TURNS_READ = 64


def begun(
    engine: Engine,
    conversation: Conversation,
    head: int,
    told: int,
    *,
    carried: bool = True,
    answers: Sequence[Message] = (),
) -> tuple[Layout | None, list[Message]]:
    """The layout of a turn of ``told`` tokens after a system part of ``head``, and the verbatim end of the
    conversation: from where the layout lets it begin, which may be in an earlier session; without a layout the
    session's own turns within the budget. Records added by hand are no part of it."""
    session, plan = conversation.session, conversation.plan(engine)
    if plan is None:
        return None, _opened(engine, session, _newest(engine, session, answers))
    beside = carried and conversation.scope.session is None
    if plan.empty:
        _adopt(engine, session, plan)
    for known in (False, True):
        layout = plan.choose(session.session or "", head, told, None)
        if layout.start is None:
            return layout, _opened(engine, session, _calls(engine, session, answers))
        turns = engine.records.turns_from(session, layout.start, carried=beside)
        said = planning.with_kept(engine, conversation.scope, prompt.conversation(turns))
        if known or not plan.outgrown(layout, turns, said):
            break
    begins = session if not turns else turns[0].scope
    return layout, _opened(engine, begins, prompt.paired(said, answers))


def _adopt(engine: Engine, session: Scope, plan: Plan) -> None:
    """A model that is new to a running session gets the session's own turns, as many as its window takes."""
    turns: list[Record] = []
    said: list[Message] = []
    while prompt.cost(said, engine.count) <= plan.window:
        older = engine.records.turns(session, limit=TURNS_READ, before=turns[0].id if turns else None)
        turns[:0] = older[::-1]
        said = planning.with_kept(engine, session, prompt.conversation(turns))
        if len(older) < TURNS_READ:
            break
    if turns:
        plan.adopt(turns, said)


def _opened(engine: Engine, session: Scope, said: Sequence[Message]) -> list[Message]:
    """The history from its first question or call on. One that begins amid a run of tools begins with the question that
    the run is about: the model has to know it, and vendors take no conversation that the user doesn't begin."""
    first = next((at for at, message in enumerate(said) if message.role == "user" or message.tool_calls), len(said))
    said = said[first:]
    if not said or said[0].role == "user":
        return list(said)
    before: str | None = said[0].records[0]
    while before is not None:
        older = engine.records.turns(session, limit=TURNS_READ, before=before)
        question = next((turn for turn in older if turn.role == "user"), None)
        if question is not None:
            return [*prompt.conversation([question]), *said]
        before = older[-1].id if older else None
    return [Message(role="user", content=LEFT_OUT), *said]


def _calls(engine: Engine, session: Scope, answers: Sequence[Message]) -> list[Message]:
    """The answer whose calls these results of tools are for: without it no vendor takes them, whatever the budget."""
    if not answers or answers[0].role != "tool":
        return []
    turns = engine.records.turns(session, limit=TURNS_READ)
    newest = next((at for at, turn in enumerate(turns) if turn.role == "assistant"), -1)
    return prompt.paired(prompt.conversation(turns[newest::-1]), answers) if newest >= 0 else []


def _newest(engine: Engine, session: Scope, answers: Sequence[Message]) -> list[Message]:
    """The end of the session's own turns, within the budget. The cost is that of what is kept, however long the
    session is."""
    tokens = engine.settings.history_tokens
    budget = within(engine, HISTORY_TOKENS if tokens is None else tokens, 0.4)
    turns: list[Record] = []
    messages: list[Message] = []
    while prompt.cost(messages, engine.count) <= budget:
        older = engine.records.turns(session, limit=TURNS_READ, before=turns[0].id if turns else None)
        turns[:0] = older[::-1]
        messages = prompt.conversation(turns)
        if len(older) < TURNS_READ:
            break
    before = engine.records.count_turns(session, before=turns[0].id) if turns else 0
    return prompt.paired(prompt.recent(messages, budget, engine.count, before=before), answers)
