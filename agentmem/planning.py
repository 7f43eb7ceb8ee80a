"""What a turn is laid out as and what a host is asked to keep of it, by what that costs: chat's side of the planners.

Knows how a prompt is measured in a host's terms (blocks, levels, tokens) and where the planners' state lives (table
``layouts``). What costs least is decided in activation/layouts.py and activation/marks.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import economics, prompt
from .activation import layout_state
from .activation.layout_state import store
from .errors import AgentMemError
from .plaintext.drafts import utc_seconds
from .provider import CachePlan, Generation, Mark, Request
from .tokens import PER_MESSAGE
from .types import Hit, Message, Record, Scope, Segment, TurnFacts, Usage

if TYPE_CHECKING:
    from .activation.cache_model import Block
    from .activation.layouts import Layout
    from .activation.marks import Level
    from .activation.turns import Turn
    from .cache_rules import CacheRules
    from .engine import Engine

__all__ = [
    "Measured",
    "Plan",
    "expected",
    "explained",
    "facts",
    "grown",
    "head_of",
    "head_tokens",
    "in_front",
    "history_of",
    "keep",
    "measured",
    "planned",
    "prewarm_pays",
    "sent_history",
    "sizes",
    "store",
    "stored",
    "warm_every",
    "with_kept",
]

_log = logging.getLogger("agentmem")

#: Of a model's window, what a prompt's verbatim history may take.
WINDOW_SHARE = 0.5
#: The same on an engine of one's own: the rest is for an answer, a core block and what is recalled.
LOCAL_SHARE = 0.75
#: Where a host's window is not known.
WINDOW_TOKENS = 100_000


@dataclass(frozen=True)
class Measured:
    """A request in a host's terms: its content blocks, how many of them end with each message, and the ends of what
    does not change from one request to the next."""

    blocks: tuple[Block, ...]
    ends: tuple[int, ...]
    levels: tuple[Level, ...]
    tools: int  # blocks
    #: Of each prefix that ends with a block, a digest of all its bytes.
    digests: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Of the whole request, by our count."""
        return sum(block.tokens for block in self.blocks)

    def of(self, level: str) -> int:
        """Tokens of this level alone."""
        before = 0
        for held in self.levels:
            if held.name == level:
                return held.tokens - before
            before = held.tokens
        return 0


def measured(
    engine: Engine,
    segments: Sequence[Segment],
    tools: Sequence[Mapping[str, Any]],
    schema: Mapping[str, Any] | None = None,
) -> Measured:
    """The request's blocks and levels; a message is one block, each tool call in it another. Hosts put the ``schema``
    of an answer before all of it."""
    from .activation.cache_model import Block
    from .activation.marks import Level

    chain = hashlib.blake2b(digest_size=16)
    blocks: list[Block] = []
    digests: list[str] = []
    ends: list[int] = []
    levels: dict[str, Level] = {}

    def block(key: str, tokens: int) -> None:
        chain.update(key.encode() + b"\0")
        digests.append(chain.copy().hexdigest())
        blocks.append(Block(key=digests[-1], tokens=tokens))  # no text: the model of the host outlives the request

    if schema is not None:
        chain.update(json.dumps(dict(schema), sort_keys=True).encode() + b"\0")
    for tool in sorted(json.dumps(dict(tool), sort_keys=True) for tool in tools):
        block(tool, engine.count(tool))
    for segment in segments:
        for message in segment.messages:
            block(_key(message), engine.count(message.content) + PER_MESSAGE)
            for call in message.tool_calls:
                text = prompt.call_text(call)
                block(text, engine.count(text) + PER_MESSAGE)
            ends.append(len(blocks))
        if segment.stable:
            name = "history" if segment.name == "turn" else segment.name
            tokens = sum(block.tokens for block in blocks)
            levels[name] = Level(name=name, key=digests[-1], tokens=tokens, blocks=len(blocks))
    return Measured(tuple(blocks), tuple(ends), tuple(levels.values()), len(tools), tuple(digests))


def _key(message: Message) -> str:
    images = [image.url or hashlib.blake2b((image.data or "").encode()).hexdigest() for image in message.images]
    return json.dumps([message.role, message.name, message.content, message.tool_call_id, images])


def planned(engine: Engine, scope: Scope) -> Plan | None:
    """The plan of a conversation at this scope; None where nothing is known of what a prompt costs with its model, or
    the settings lay prompts out."""
    if engine.settings.cache != "auto":
        return None
    rules = engine.cache_rules or economics.local_rules(engine)
    return None if rules is None else Plan(engine, scope, rules)


#: A history may have this many times the tokens it was chosen for, and so many more: counts are estimates.
TOLERANCE, SLACK_TOKENS = 1.25, 300


class Plan:
    """How the prompts of one conversation are laid out and marked. Its state outlives the process."""

    def __init__(self, engine: Engine, scope: Scope, rules: CacheRules) -> None:
        from .activation.layouts import Layouts
        from .activation.marks import MarkPlanner

        self._engine = engine
        self._rules = rules
        self._lock = threading.Lock()
        self._model = engine.chat_provider().name
        self._scope = scope
        state = stored(engine, self._model, scope)
        settings, share = engine.settings, WINDOW_SHARE if rules.priced else LOCAL_SHARE
        limits: dict[str, Any] = {
            "core_tokens": settings.core_tokens,
            "window": int((rules.context_tokens or WINDOW_TOKENS / WINDOW_SHARE) * share),
            "history_tokens": settings.history_tokens,
        }
        try:
            self._layouts = Layouts(rules, **limits, state=state.get("layouts"))
        except (AttributeError, TypeError, ValueError) as error:  # InvalidInput is a ValueError
            _log.warning("how %s's prompts were laid out can't be read, they are laid out anew: %s", self._model, error)
            state = {}
            self._layouts = Layouts(rules, **limits)
        #: An engine of one's own is not told what to keep.
        self._marks = MarkPlanner(rules, state=state.get("marks")) if rules.priced else None
        self._held: int | None = None
        self._history = history_of(state.get("history"))
        self._head = state.get("head")
        self._folded: tuple[Scope, str, int] | None = None
        self._base = 0
        #: Tokens of a prompt that its verbatim history may take.
        self.window: int = limits["window"]

    @property
    def rules(self) -> CacheRules:
        """The cache's prices that it plans with."""
        return self._rules

    @property
    def local(self) -> bool:
        """Whether the model runs on an engine of one's own: nobody is paid, and nothing is asked of a host."""
        return self._marks is None

    @property
    def empty(self) -> bool:
        """Whether nothing is known of any earlier turn."""
        return self._layouts.empty

    def adopt(self, turns: Sequence[Record], said: Sequence[Message]) -> None:
        """Take these turns (and the messages they make) for the history, where none is known: another model had the
        conversation so far."""
        with self._lock:
            if self._layouts.empty:
                self._layouts.recount(None, _told(self._engine, turns, said))

    def stands(self, core: int) -> None:
        """So many tokens of core block stand at the head because they pay by themselves."""
        self._base = core

    def choose(self, session: str, system: int, message: int, recalled: Sequence[tuple[str, int]] | None) -> Layout:
        """How this turn is laid out, of the tokens of its parts; ``recalled`` is None while it is not known: where the
        history begins must be known before anything is recalled, whether it stays in the history only then."""
        from .activation.layouts import Coming

        known = None if recalled is None else tuple(recalled)
        now = self._engine.clock()
        with self._lock:
            self._held = None if self._marks is None else self._marks.held(now)
            return self._layouts.choose(Coming(now, session, system, message, known, held=self._held, core=self._base))

    def outgrown(self, layout: Layout, turns: Sequence[Record], said: Sequence[Message]) -> bool:
        """Whether the history (stored turns, and the messages they make) has far more tokens than its layout was chosen
        for: another handle, process or model went on with the conversation. It is known then; choose again."""
        if layout.start is None:
            return False
        tokens = prompt.cost(said, self._engine.count)
        with self._lock:
            if tokens <= TOLERANCE * self._layouts.tokens(layout.start) + SLACK_TOKENS:
                return False
            self._layouts.recount(layout.start, _told(self._engine, turns, said))
        return True

    def cache_plan(self, prompt_: Measured, layout: Layout | None, previous: str | None) -> CachePlan | None:
        """What the host is asked to keep of this request; None on an engine of one's own."""
        if self._marks is None:
            return None
        with self._lock:
            marks = self._marks.plan(self._levels(prompt_, layout), self._engine.clock())
        found: dict[int, str] = {}
        for blocks, lifetime in marks:
            # A mark stands at the end of a message; the tools stand before them all.
            messages = sum(end <= blocks for end in prompt_.ends)
            if messages or blocks >= prompt_.tools > 0:
                found[messages] = self._rules.lifetimes[lifetime].name
        placed = tuple(Mark(messages=messages, lifetime=name) for messages, name in sorted(found.items()))
        # Asked for from the first request on: Anthropic compares only with answers to requests that asked, too.
        return CachePlan(marks=placed, previous=previous, diagnose=self._rules.diagnoses)

    def done(self, connection: sqlite3.Connection, prompt_: Measured, turn: Turn | None, layout: Layout | None) -> None:
        """This request was answered: learn from it, and keep what was learnt, in the caller's transaction."""
        now = self._engine.clock()
        prices = economics.local_rules(self._engine) if self.local else None
        with self._lock:
            if prices is not None:
                self._rules = prices
                self._layouts.price(prices)
            levels = self._levels(prompt_, layout)
            if self._marks is not None:
                self._marks.done(levels, now)
            self._history = sent_history(prompt_, levels) or self._history
            self._head = head_of(prompt_)
            if turn is not None and layout is not None:
                self._layouts.done(turn, layout, held=self._held, base=self._base)
            marks = None if self._marks is None else self._marks.state()
            state = {"layouts": self._layouts.state(), "marks": marks, "history": self._history, "head": self._head}
        store(connection, self._model, self._scope, now, state)

    def folded(self, session: Scope, start: str) -> int:
        """How many turns of the session lie before this one. Counted when the history begins elsewhere, not with each
        turn: there may be any number of them."""
        with self._lock:
            if self._folded is None or self._folded[:2] != (session, start):
                self._folded = session, start, self._engine.records.count_turns(session, before=start)
            return self._folded[2]

    def returns(self, prompt_: Measured) -> int:
        """Tokens of this request that begin with all that the last one kept of it, as far as bytes tell."""
        _, blocks, digest = self._history
        same = 0 < blocks <= len(prompt_.digests) and prompt_.digests[blocks - 1] == digest
        return sum(block.tokens for block in prompt_.blocks[:blocks]) if same else 0

    def _levels(self, prompt_: Measured, layout: Layout | None) -> list[Level]:
        return grown(prompt_, self._history, None if layout is None else layout.longest)


def stored(engine: Engine, name: str, scope: Scope) -> dict[str, Any]:
    """What was kept of the prompts that go by this name in this scope; empty where nothing is, or it can't be read."""
    return layout_state.stored(engine.database, name, scope)


#: The last history that was sent: the name that it goes by, its blocks, the digest of all its bytes.
History = tuple[str, int, str]


def grown(sent: Measured, last: History, longest: int | None = None) -> list[Level]:
    """The levels of a request, with a history that only grew since the ``last`` one under the name that it had;
    ``longest`` as in `Level`."""
    name, blocks, digest = last
    same = 0 < blocks <= len(sent.digests) and sent.digests[blocks - 1] == digest
    return [
        replace(level, key=name if same else level.key, longest=longest) if level.name == "history" else level
        for level in sent.levels
    ]


def sent_history(sent: Measured, levels: Sequence[Level]) -> History | None:
    """The history of a request with these levels; None where it has none."""
    if not levels or levels[-1].name != "history":
        return None
    return str(levels[-1].key), levels[-1].blocks, sent.digests[levels[-1].blocks - 1]


def history_of(kept: Any) -> History:
    """What was kept of the last history, nothing where that is not what it should be."""
    if isinstance(kept, list) and [type(part) for part in kept] == [str, int, str]:
        return kept[0], kept[1], kept[2]
    return "", 0, ""


def head_of(sent: Measured) -> str | None:
    """A digest of all bytes of a request up to the end of its system part, tools and schema with it; None where it has
    none."""
    return next((sent.digests[level.blocks - 1] for level in sent.levels if level.name == "system"), None)


def expected(engine: Engine, rules: CacheRules, request: Request, sent: Measured) -> int:
    """Tokens that the host should have read from its cache for this request, by its rules and by what it was sent
    before; the request itself is noted as sent."""
    names = [lifetime.name for lifetime in rules.lifetimes]
    if request.cache is not None:
        marks = [
            (sent.ends[mark.messages - 1] if mark.messages else sent.tools, names.index(mark.lifetime or names[0]))
            for mark in request.cache.marks
        ]
    else:
        marks = [(level.blocks, 0) for level in sent.levels[-rules.marks :]]
    blocks = list(sent.blocks)
    if rules.per_minute is not None and blocks:  # requests of another routing key go to another machine
        blocks[0] = replace(blocks[0], key=(request.cache_key, blocks[0].key))
    now = engine.clock()
    with engine.lock:
        expected = engine.host.readable(blocks, now)
        engine.host.request(blocks, marks, now)
    return expected


def head_tokens(engine: Engine, system: str | None, tools: Sequence[Mapping[str, Any]], *, memories: bool) -> int:
    """Tokens of what stands at the head of a prompt, as `measured` will count them: the tools and the system part."""
    texts = [text for text in (system, prompt.MEMORY_NOTE if memories else None) if text]
    said = engine.count("\n\n".join(texts)) + PER_MESSAGE if texts else 0
    return said + sum(engine.count(json.dumps(dict(tool), sort_keys=True)) for tool in tools)


def prewarm_pays(engine: Engine, sent: Measured, parallel: int) -> bool:
    """Whether filling the host's cache ahead costs less than so many requests, sent at once, that each write it; True
    where nobody is paid for it."""
    from .activation.marks import prewarm_pays as pays

    rules = engine.cache_rules
    return rules is None or pays(rules, sent.levels[-1].tokens if sent.levels else 0, 1.0, parallel)


def warm_every(engine: Engine, tokens: int, idle_s: float) -> float | None:
    """Seconds between primes that keep a prefix of so many tokens for less than writing it anew; None if none does."""
    from .activation.marks import keep_warm

    rules = engine.cache_rules
    return None if rules is None else keep_warm(rules, idle_s, tokens)


def sizes(engine: Engine, hits: Sequence[Hit]) -> tuple[tuple[str, int], ...]:
    """(record id, tokens of its line) of recalled records."""
    return tuple((hit.record.id, engine.count(prompt.record_line(prompt.shown(hit))) + 1) for hit in hits)


def facts(
    engine: Engine,
    session: Scope,
    sent: Measured,
    request: Request,
    turn: Sequence[Message],
    *,
    recalled: Sequence[Hit],
    used: Sequence[str],
    reply: Generation,
) -> Turn:
    """What this request was made of, in tokens: what other layouts and other hosts would have cost is told from it."""
    from .activation.turns import Turn

    answer = Message(role="assistant", content=reply.text, tool_calls=reply.tool_calls)
    history = (message for segment in request.segments if segment.name == "history" for message in segment.messages)
    return Turn(
        id=turn[0].records[0],
        at=engine.clock(),
        session=session.session or "",
        system=sent.of("system"),
        core=sent.of("core"),
        message=prompt.cost(turn, engine.count),
        reply=prompt.cost([answer], engine.count),
        recalled=sizes(engine, recalled),
        used=tuple(used),
        start=next((message.records[0] for message in history if message.records), None),
    )


def explained(
    engine: Engine,
    session: Scope,
    sent: Measured,
    layout: Layout | None,
    usage: Usage,
    *,
    plan: Plan | None,
    turn: Sequence[Message],
    recalled: Sequence[Hit],
    core: Sequence[str],
    used: Sequence[str],
    decided: str,
) -> TurnFacts | None:
    """What `Reply.explain` tells of this request; None where that fails, such as in a memory that was closed meanwhile:
    the turn is stored by then, and its reply must not be lost."""
    cached, start = usage.cached_tokens, None if layout is None else layout.start
    try:
        costs = economics.costs(engine)
        paid = costs.computing(cached, usage.input_tokens) + costs.loading(cached)
        return TurnFacts(
            system_tokens=sent.of("system"),
            core_tokens=sent.of("core"),
            history_tokens=0 if layout is None else layout.behind,
            recalled_tokens=sum(tokens for _, tokens in sizes(engine, recalled)),
            message_tokens=prompt.cost(turn, engine.count),
            core=tuple(core),
            used=tuple(used),
            start=start,
            folded=0 if plan is None or start is None else plan.folded(session, start),
            kept=layout is not None and layout.keep,
            decided=decided,
            unit=costs.unit,
            cost=paid + usage.written_tokens * costs.write,
            bare=costs.computing(0, usage.input_tokens),
        )
    except AgentMemError as error:
        _log.warning("what a request was made of could not be told: %s", error)
        return None


def _told(engine: Engine, turns: Sequence[Record], said: Sequence[Message]) -> list[tuple[str, str, int, float]]:
    """A history as the planner takes it, an answer with what it answers: (id, session, tokens, Unix seconds)."""
    records = {record.id: record for record in turns}
    found: list[tuple[str, str, int, float]] = []
    answered = True
    for message in said:
        record = records.get(message.records[0]) if message.records else None
        tokens = prompt.cost([message], engine.count)
        if record is not None and (answered or record.role == "user") and record.role != "assistant":
            said_at = record.at or record.created
            at = utc_seconds(said_at) if said_at else engine.clock()
            found.append((record.id, record.scope.session or "", tokens, at))
        elif found:  # an answer, or what was recalled
            id_, session, before, at = found[-1]
            found[-1] = id_, session, before + tokens, at
        answered = message.role == "assistant"
    return found


def keep(connection: sqlite3.Connection, turn: str, hits: Sequence[Hit]) -> None:
    """Note that these recalled records stay in the history, behind the turn that they were recalled for."""
    connection.executemany(
        "INSERT OR REPLACE INTO kept SELECT ?, ?, id, ?, ? FROM records WHERE id = ?",
        [(turn, place, hit.start, hit.stop, hit.record.id) for place, hit in enumerate(hits)],
    )


def with_kept(engine: Engine, scope: Scope, messages: Sequence[Message]) -> list[Message]:
    """The messages of a history with the recalled records that stay in it, the very bytes that the model was sent."""
    turns = [message.records[0] for message in messages if message.records]
    rows = engine.database.query(
        "SELECT turn, record, start, stop FROM kept WHERE turn IN (SELECT value FROM json_each(?))"
        " ORDER BY turn, place",
        [json.dumps(turns)],
    )
    if not rows:
        return list(messages)
    held = {record.id: record for record in engine.records.named([row["record"] for row in rows], scope)}
    lines: dict[str, list[Record]] = {}
    for row in rows:
        if (record := held.get(row["record"])) is not None:
            hit = Hit(record=record, score=0.0, start=row["start"], stop=row["stop"])
            lines.setdefault(row["turn"], []).append(prompt.shown(hit))
    found: list[Message] = []
    before = in_front(engine)
    for message in messages:
        kept = lines.get(message.records[0]) if message.records else None
        quoted = [prompt.quoted(kept)] if kept else []
        found += [*quoted, message] if before else [message, *quoted]
    return found


def in_front(engine: Engine) -> bool:
    """Whether recalled records stand in front of the turn that they were recalled for: on an engine of one's own, where
    nothing is marked and what stays is cached wherever it stands."""
    return engine.cache_rules is None
