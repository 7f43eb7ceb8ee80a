"""What a turn gets from memory: the records that it needs, and the core block, rewritten when carrying costs more.

Knows a conversation, its plan and the rule of collapse; how records are found is search's, what makes a core pay
plaintext/salience.py's. Stores a collapse at once and no turn.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import cores, economics, prompt
from .acting import QUERY_CHARACTERS, turned_to
from .cores import within
from .engine import Engine
from .flow import Flow
from .flows import search
from .planner.collapse import Account, Collapse
from .planner.values import amount
from .types import Hit, Record, Usage

if TYPE_CHECKING:
    from .activation.layouts import Layout
    from .chat import Conversation
    from .planning import Plan

__all__ = ["AGAIN", "TOLD_K", "TOLD_TOKENS", "Core", "core_of", "recalled", "standing"]

#: Recalled at most, records and tokens, for a turn that surely asks for nothing.
TOLD_K = 3
TOLD_TOKENS = 150
#: Of the records that a question is answered from, so many stand right before it even if the prompt shows them already,
#: far back: on an engine of one's own, where models are small and tokens cost time only.
AGAIN = 3
#: The same for a turn that does not surely ask.
UNSURE_K = 6
UNSURE_TOKENS = 500
#: Turns after which the core that would be chosen is looked at again while nothing else asks for it.
REVIEWED = 16


@dataclass
class Core:
    """The core block of a turn, and how it came to stand: ``account`` is what will be carried after this turn, in the
    unit of the costs; None where no prices are known, or nothing was decided."""

    records: list[Record] = field(default_factory=list)
    account: Account | None = None
    decided: str = ""

    @property
    def ids(self) -> set[str]:
        """Of its records."""
        return {record.id for record in self.records}


def recalled(
    engine: Engine,
    conversation: Conversation,
    query: str,
    present: Set[str],
    noted: list[Usage],
    *,
    recall: bool,
    core: Set[str] = frozenset(),
    again: Set[str] = frozenset(),
) -> Flow[tuple[list[Hit], tuple[str, ...], set[str]]]:
    """The records that this turn needs and that are not in the conversation already, within the budget; the ids of
    those that it concerns among what LoRA versions learnt; and the ids of those recalled that the prompt shows already:
    where the turn surely asks, the `AGAIN` best may be of those ``again``. Those that stand in the ``core`` are named
    too and cost nothing.

    What is recalled is most of what a turn costs: there are none where nothing is likely to be evidence, and few where
    the turn asks for nothing.
    """
    from .plaintext.asking import asks, tells
    from .plaintext.concerning import WEIGHED
    from .plaintext.fusion import TOGETHER, taken

    settings, scope = engine.settings, conversation.scope
    recall = recall and settings.recall_k > 0 and settings.recall_tokens > 0
    learnt = engine.learnt(scope)
    telling = tells(query)
    if not recall and (telling or not learnt):
        return [], (), set()
    asking = asks(query)
    again = again if asking else frozenset()
    together = max(settings.recall_k, TOGETHER) + (AGAIN if again else 0)
    found = yield from search(
        engine,
        scope,
        query.strip()[:QUERY_CHARACTERS],
        k=max(together, WEIGHED) if learnt else together,
        noted=noted,
        words_if_down=True,
        # What the model reads anyway must not make anything else look less likely.
        without=present - learnt - again if recall else (),
    )
    concerned = turned_to(query, found, learnt, conversation.concerned)
    if not telling:
        conversation.concerned = concerned
    if not recall:
        return [], concerned, set()
    most, tokens = settings.recall_k, settings.recall_tokens
    if telling:
        most, tokens = min(most, TOLD_K), min(tokens, TOLD_TOKENS)
    elif not asking:
        most, tokens = min(most, UNSURE_K), min(tokens, UNSURE_TOKENS)
    best = {hit.record.id for hit in found[:AGAIN]} & again
    found = [hit for hit in found if hit.record.id not in present - best][:together]
    worth = taken([hit.score for hit in found], asking=asking)
    # A question that memory can answer at all gets all that may: leaving out what is less likely than the best costs
    # more answers than tokens (measured: tests/benchmarks/efficiency.py).
    likely = found[: most if asking and worth else min(worth, most)]
    # Room of those in the core goes to no others: what the core shows would not be spared, only added to.
    shown = map(prompt.shown, likely)
    fitting = {record.id for record in prompt.fit(shown, within(engine, tokens, 0.1), engine.count)}
    return [hit for hit in likely if hit.record.id in fitting or hit.record.id in core], concerned, best & fitting


# ---- the core --------------------------------------------------------------------------------------------------------


def standing(engine: Engine, conversation: Conversation, plan: Plan | None) -> list[Record] | None:
    """The core block as it stands, before a turn is laid out; None where it has to be chosen anew."""
    found = cores.standing(engine, conversation.scope)
    if plan is not None and engine.settings.core_tokens:
        plan.stands(cores.tokens(engine, found or []))
    return found


def core_of(
    engine: Engine,
    conversation: Conversation,
    plan: Plan | None,
    layout: Layout | None,
    *,
    stands: list[Record] | None,
    present: Set[str],
    hits: Sequence[Hit] | None,
) -> Core:
    """The core block of this request, rewritten before it where that is due.

    ``stands`` is the block as it stands, ``hits`` what the search named for this turn; None for a request that is no
    question (a tool's result, a prime): then nothing is rewritten that is still cached.
    The rule is ski rental (planner/collapse.py): what this request carries is the bill with the block as it stands
    above the bill with the one that would be chosen, and a rebuild is that block and all that is cached behind it,
    written instead of read.
    """
    if not engine.settings.core_tokens:
        return Core()
    if plan is None or layout is None:
        fresh = not engine.records.has_turns(conversation.session)
        return Core(cores.core(engine, conversation.scope, None, present, new_session=fresh))
    cold = layout.cold or stands is None  # a record of it is gone or ended: what stood behind it is not read again
    if hits is None and not cold:
        return Core(stands or [])
    scope, rules = conversation.scope, plan.rules
    seen = conversation.reviewed
    stale = seen is None or (seen[0] >= REVIEWED and hits) or seen[1].standing.records != tuple(stands or ())
    if seen is None or cold or stale:
        review = cores.review(
            engine, scope, rules, present, stands, fill=layout.core, cached=layout.kept, ahead=layout.ahead
        )
        conversation.reviewed = (1, review)
    else:
        conversation.reviewed = (seen[0] + 1, seen[1])
        review = seen[1]
    old, new = review.standing, review.chosen
    token = economics.costs(engine).prefill
    before = cores.account(engine, scope)
    carry = _carried(hits or (), review, rules.read)
    rebuild = rules.anew(new.tokens + (0 if cold else layout.behind))
    if review.same:
        due, rebuild = stands is None, rules.anew(layout.behind)
    elif stands is None:
        due = True
    elif cold:
        # Nothing behind it is cached: what is left to pay is the block itself, which is part of its gain.
        due = new.gain > old.gain or 0 < layout.core > old.tokens
    else:
        due = Collapse.due(before, carry * token, rebuild * token)
    if not due:
        # Compared with the present rebuild alone: what the history behind it has grown by was paid for by any schedule,
        # and is written anew for nothing when the history next begins elsewhere.
        now = Collapse.note(before, carry * token, collapsed=False, at=engine.clock(), rebuild=rebuild * token)
        unit = economics.costs(engine).unit
        told = f"the core stands: {amount(now.carried, unit)} carried, a rebuild costs {amount(rebuild * token, unit)}"
        return Core(stands or [], now, told)
    if seen is not None and review is seen[1]:  # it was chosen some turns ago
        new = cores.review(
            engine, scope, rules, present, stands, fill=layout.core, cached=layout.kept, ahead=layout.ahead
        ).chosen
    chosen = cores.collapse(engine, scope, [record.id for record in new.records])
    conversation.reviewed = None
    why = f"{amount(before.carried, economics.costs(engine).unit)} carried"
    if cold:
        why = "one of its records holds no longer" if stands is None else "nothing behind it was cached"
    return Core(chosen, Account(since=engine.clock()), f"the core was rewritten: {why}")


def _carried(hits: Sequence[Hit], review: cores.Review, read: float) -> float:
    """What this request costs more with the block as it stands than with the one that would be chosen, in tokens."""
    old = {record.id for record in review.standing.records}
    new = {record.id for record in review.chosen.records}
    spared = sum(review.lines.get(hit.record.id, 0) for hit in hits if hit.record.id in new - old)
    missed = sum(review.lines.get(hit.record.id, 0) for hit in hits if hit.record.id in old - new)
    return spared - missed - (review.chosen.tokens - review.standing.tokens) * read
