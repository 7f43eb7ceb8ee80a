"""The same users under each memory policy: what every request reads from a cache, writes and pays in full.

Runs the real `Layouts` and `MarkPlanner` through activation/replays.py, and the ways that others lay prompts out.
Knows rules and sizes; no price.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ..activation.cache_model import Bill, Block, PromptCache
from ..activation.layouts import Layouts
from ..activation.replays import Recall, planned
from ..cache_rules import CacheRules
from .traces import Person

__all__ = ["CORE_TOKENS", "NAMES", "WINDOW_TOKENS", "Way", "bills", "ways", "window_of"]

#: Where a model's window is not known.
WINDOW_TOKENS = 128_000
#: The most tokens of a core block (the setting core_tokens).
CORE_TOKENS = 512
#: Of a model's window, what our own verbatim history may take (planning.WINDOW_SHARE).
OUR_SHARE = 0.5

FULL, FULL_CACHED = "full history, no cache", "full history, cached"
FIRST, FIRST_CACHED = "top-k first, no cache", "top-k first, cached"
LAYERS, OURS, LEARNT = "layers, fixed", "agentmem", "agentmem + LoRA"
#: All policies, in the order in which they are told.
NAMES = (FULL, FULL_CACHED, FIRST, FIRST_CACHED, LAYERS, OURS, LEARNT)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a policy. ``marks`` are the lifetimes with which the ends of the system part and of the history
    are marked (None: not marked). ``core`` are tokens and records of a block behind the system part, and ``learnt`` the
    records that a LoRA knows: neither are recalled."""

    policy: str
    marks: tuple[int | None, int | None] = (0, 0)
    core_tokens: int = 0
    core: frozenset[str] = frozenset()
    learnt: frozenset[str] = frozenset()


def ways(policy: str, rules: CacheRules) -> list[Way]:
    """The settings of a policy among which a developer chooses once: which ends are marked, and for how long.

    Hosts without marks have one. A longer lifetime never follows a shorter one in a prompt.
    """
    if policy not in (FULL_CACHED, FIRST_CACHED, LAYERS) or not rules.marked:
        return [Way(policy=policy)]
    lives = range(len(rules.lifetimes))
    both = [(one, other) for one, other in product(lives, lives) if one >= other]
    alone = [(one, None) for one in lives] if policy == FIRST_CACHED else []
    return [Way(policy=policy, marks=marks) for marks in [*both, *alone]]


def window_of(rules: CacheRules) -> int:
    """The most tokens that a prompt may have."""
    return rules.context_tokens or WINDOW_TOKENS


def bills(person: Person, rules: CacheRules, way: Way) -> list[Bill]:
    """The billed requests of this person, in order."""
    turns = person.turns
    if way.policy in (FULL, FULL_CACHED):
        sent = list(_fixed(person, rules, way))
    elif way.policy in (FIRST, FIRST_CACHED):
        sent = list(_fixed(person, rules, way, person.top_k()))
    elif way.policy == LAYERS:
        sent = list(_fixed(person, rules, way, person.recall()))
    else:
        more, fill = way.core_tokens, max(CORE_TOKENS - way.core_tokens, 0)
        heavier = [turn.model_copy(update={"system": turn.system + more}) for turn in turns] if more else turns
        recall = person.recall(without=way.core | way.learnt)
        window = int(window_of(rules) * OUR_SHARE)
        # What was said before these turns is out of sight, but not forgotten: it is known how much it was.
        state = {**Layouts(rules).state(), "gone": person.gone}
        sent = [one.bill for one in planned(rules, heavier, recall, window=window, core_tokens=fill, state=state)]
    billed = sent[person.warm :]
    return [_unread(bill, rules) for bill in billed] if way.policy in (FULL, FIRST) else billed


def _unread(bill: Bill, rules: CacheRules) -> Bill:
    return Bill(0, (0,) * len(rules.lifetimes), bill.tokens)


def _fixed(person: Person, rules: CacheRules, way: Way, recall: Recall | None = None) -> Iterator[Bill]:
    """A way that never changes, as `replays.fixed` has it, but within the window: where the history has no room the
    older half of it goes, so that the prefix stays for a while.

    Without ``recall`` all that was ever said is history, else the session; top-k stands before it, the rest after.
    """
    cache, window = PromptCache(rules), window_of(rules)
    past: list[Block] = []
    size, session, begins = 0, "", 0
    if recall is None and person.gone:
        # Of a life longer than the window there is somewhere between half and all of it.
        half = window // 2
        size = person.gone if person.gone <= half else half + person.gone % max(half, 1)
        past = [Block("before", size)]
    for number, turn in enumerate(person.turns):
        if recall is not None and turn.session != session:
            past, size, session, begins = [], 0, turn.session, number
        found = [] if recall is None else recall(number, begins, set())
        memories = [Block(("recalled", turn.id), sum(tokens for _, tokens in found))] if found else []
        room = window - turn.system - turn.message - sum(block.tokens for block in memories)
        if size > room:
            past, size = _cut(past, size, max(room // 2, 0))
        before = memories if way.policy in (FIRST, FIRST_CACHED) else []
        after = [] if before else memories
        stands = [Block("system", turn.system), *before, *past]
        blocks = [*stands, *after, Block(("message", turn.id), turn.message)]
        ends = dict(zip((1, len(stands) if after else len(blocks)), way.marks, strict=True))
        marks = [(at, life) for at, life in ends.items() if life is not None] if rules.marked else []
        yield cache.request(blocks, marks, turn.at)
        past += [Block(("message", turn.id), turn.message), Block(("reply", turn.id), turn.reply)]
        size += turn.message + turn.reply


def _cut(past: Sequence[Block], size: int, room: int) -> tuple[list[Block], int]:
    """The newest blocks that fit ``room``; of a block that does not fit the end of it is kept."""
    kept = list(past)
    while kept and size - kept[0].tokens >= room:
        size -= kept.pop(0).tokens
    if kept and size > room:
        over = size - room
        kept[0] = Block((kept[0].key, over), kept[0].tokens - over)
        size = room
    return kept, size
