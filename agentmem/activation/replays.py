"""The same turns under other ways to lay prompts out: what each would have cost by the host's cache rules.

Full history, layers, memories before the history, no cache, no memory, and the planner itself, request by request in
`PromptCache`. Knows sizes only; what a turn would have recalled comes from its `Turn` or from the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..cache_rules import CacheRules
from .cache_model import Bill, Block, PromptCache
from .layouts import Coming, Layout, Layouts, Turn
from .marks import Level, MarkPlanner

__all__ = ["Policy", "Recall", "Sent", "fixed", "planned", "replay"]

#: What turn ``number`` recalls beside a history that begins with turn ``first`` and holds these records.
Recall = Callable[[int, int, set[str]], Sequence[tuple[str, int]]]


@dataclass(frozen=True, slots=True)
class Sent:
    """One request as it was billed: the turn at which its history began, and what stood in it of recalled records."""

    bill: Bill
    first: int
    recalled: tuple[tuple[str, int], ...]
    kept: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A way to lay prompts out that never changes.

    ``start``: the verbatim history is the session's, or the scope's. ``recalled``: where records stand, before the
    history or after it; with "none" no record is recalled. ``marks``: index of the lifetime with which the end of the
    system part (and core) and that of the history are marked; None marks nothing there. ``core``: tokens of a core
    block, chosen anew at each session's start from what was said before it, so that it can't hold more than that.
    """

    start: Literal["session", "scope"] = "session"
    recalled: Literal["none", "before", "after"] = "after"
    marks: tuple[int | None, int | None] = (0, 0)
    core: int = 0


@dataclass
class _History:
    """The turns of a scope so far as blocks, and which turn each begins with."""

    blocks: list[Block] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=lambda: [0])  # of all blocks before
    sessions: dict[str, int] = field(default_factory=dict)

    def add(self, turn: Turn, kept: Sequence[tuple[str, int]] = ()) -> None:
        self.sessions.setdefault(turn.session, len(self.begins))
        self.begins.append(len(self.blocks))
        for block in (*_said(turn), *_memories(turn, kept, "kept"), Block(("reply", turn.id), turn.reply)):
            self.blocks.append(block)
            self.tokens.append(self.tokens[-1] + block.tokens)

    def from_turn(self, first: int) -> list[Block]:
        return self.blocks[self.begins[first] :] if first < len(self.begins) else []


def _said(turn: Turn) -> list[Block]:
    return [Block(("message", turn.id), turn.message)]


def _memories(turn: Turn, recalled: Sequence[tuple[str, int]], how: str) -> list[Block]:
    tokens = sum(count for _, count in recalled)
    return [Block((how, turn.id), tokens)] if tokens else []


def _as_sent(turns: Sequence[Turn], home: Mapping[str, str]) -> Recall:
    """What the turns themselves recalled, less what the history holds."""
    numbers = {turn.id: number for number, turn in enumerate(turns)}
    held = numbers | {record: numbers[turn] for record, turn in home.items() if turn in numbers}

    def recall(number: int, first: int, kept: set[str]) -> Sequence[tuple[str, int]]:
        found = turns[number].recalled
        return [(id_, tokens) for id_, tokens in found if id_ not in kept and not first <= held.get(id_, -1) < number]

    return recall


def fixed(rules: CacheRules, turns: Sequence[Turn], policy: Policy, recall: Recall) -> Iterator[Sent]:
    """The turns under a policy that never changes, in order."""
    cache, history = PromptCache(rules), _History()
    cores: dict[str, int] = {}
    for number, turn in enumerate(turns):
        first = 0 if policy.start == "scope" else history.sessions.get(turn.session, number)
        found = [] if policy.recalled == "none" else list(recall(number, first, set()))
        head = [Block(("system", turn.system), turn.system)]
        core = cores.setdefault(turn.session, min(policy.core, history.tokens[-1]))
        if core:
            head.append(Block(("core", turn.session), core))
        memories = _memories(turn, found, "recalled")
        past = history.from_turn(first)
        before, after = (memories, []) if policy.recalled == "before" else ([], memories)
        blocks = [*head, *before, *past, *after, *_said(turn)]
        end = len(blocks) if not after else len(head) + len(past)
        ends = dict(zip((len(head), end), policy.marks, strict=True))
        marks = [(at, life) for at, life in ends.items() if life is not None] if rules.marked else []
        yield Sent(cache.request(blocks, marks, turn.at), first, tuple(found))
        history.add(turn)


def planned(
    rules: CacheRules,
    turns: Sequence[Turn],
    recall: Recall,
    *,
    window: int | None = None,
    core_tokens: int = 0,
    state: Mapping[str, Any] | None = None,
) -> Iterator[Sent]:
    """The turns as `Layouts` and `MarkPlanner` would have sent them, knowing at each only what came before.

    ``state`` is what the layouts know before the first of them (`Layouts.state`), where they begin in the middle."""
    layouts = Layouts(rules, core_tokens=core_tokens, window=window, state=state)
    planner = MarkPlanner(rules)
    cache, history = PromptCache(rules), _History()
    numbers: dict[str, int] = {}
    kept: dict[str, int] = {}  # of a record, the turn behind whose message it stands
    for number, turn in enumerate(turns):
        coming = Coming(turn.at, turn.session, turn.system, turn.message, held=planner.held(turn.at))
        first = _first(layouts.choose(coming), numbers, number)
        here = {id_ for id_, place in kept.items() if place >= first}
        found = tuple(recall(number, first, here))
        layout = layouts.choose(replace(coming, recalled=found))
        blocks, levels = _request(turn, layout, history, first, found)
        cache_marks = planner.plan(levels, turn.at)
        yield Sent(cache.request(blocks, cache_marks, turn.at), first, found, frozenset(here))
        planner.done(levels, turn.at)
        layouts.done(turn.model_copy(update={"recalled": found, "core": layout.core}), layout, held=coming.held)
        history.add(turn, found if layout.keep else ())
        numbers[turn.id] = number
        if layout.keep:
            kept |= dict.fromkeys((id_ for id_, _ in found), number)


def _first(layout: Layout, numbers: dict[str, int], coming: int) -> int:
    return coming if layout.start is None else numbers[layout.start]


def _request(
    turn: Turn, layout: Layout, history: _History, first: int, found: Sequence[tuple[str, int]]
) -> tuple[list[Block], list[Level]]:
    """The blocks of a request and the ends of what doesn't change in it."""
    blocks = [Block(("system", turn.system), turn.system)]
    levels = [Level("system", turn.system, turn.system, 1)]
    if layout.core:
        blocks.append(Block(("core", turn.session), layout.core))
        levels.append(Level("core", turn.session, turn.system + layout.core, 2))
    past = history.from_turn(first)
    begin = history.begins[first] if first < len(history.begins) else len(history.blocks)
    size = sum(block.tokens for block in blocks) + history.tokens[-1] - history.tokens[begin]
    memories = _memories(turn, found, "kept" if layout.keep else "recalled")
    blocks += [*past, *_said(turn), *memories]
    size += turn.message + (sum(block.tokens for block in memories) if layout.keep else 0)
    end = len(blocks) - (len(memories) if not layout.keep else 0)
    levels.append(Level("history", first, size, end, layout.longest))
    return blocks, levels


def _total(rules: CacheRules, sent: Iterable[Sent]) -> Bill:
    nothing = Bill(0, (0,) * len(rules.lifetimes), 0)
    return sum((one.bill for one in sent), nothing)


def replay(
    rules: CacheRules, turns: Iterable[Turn], *, window: int | None = None, home: Mapping[str, str] | None = None
) -> dict[str, Bill]:
    """What these turns, in order, would have cost under each policy by name, all requests together.

    "planned" is this SDK's own way and "layered" its fixed part (session, recalled records at the tail); "full history"
    and "no memory" (nothing recalled, the session alone) have the best of the host's lifetimes in hindsight; "no cache"
    is "layered" paid in full, "memories first" has the recalled records before the history.

    A record is recalled where its turn said so and the history doesn't hold it. ``home`` names the turn in whose
    message or reply a record was said; one with a turn's own id is that turn's message.
    """
    known = list(turns)
    recall = _as_sent(known, home or {})
    lives = [(life, life) for life in range(len(rules.lifetimes))] if rules.marked else [(0, 0)]

    def best(**how: str) -> Bill:
        bills = [_total(rules, fixed(rules, known, Policy(marks=marks, **how), recall)) for marks in lives]  # type: ignore[arg-type]
        return min(bills, key=lambda bill: bill.cost(rules))

    def unread(bill: Bill) -> Bill:
        return Bill(0, (0,) * len(rules.lifetimes), bill.tokens)

    full, layered = best(start="scope", recalled="none"), best()
    return {
        "planned": _total(rules, planned(rules, known, recall, window=window)),
        "layered": layered,
        "full history": full,
        "full history uncached": unread(full),
        "memories first": best(recalled="before"),
        "no memory": best(recalled="none"),
        "no cache": unread(layered),
    }
