"""``chat`` as one flow: recall, lay out, generate, observe, remember.

Branches on the provider's capabilities, never on its name. What a turn remembers is stored in one transaction after the
answer came: a turn that fails or is cancelled leaves nothing half-done.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from . import prompt
from .engine import Engine
from .errors import ConfigError, InvalidInput, ProviderError, StoreError
from .flow import Flow, Generate
from .flows import embedded, note_embeddings, search
from .ledger import price
from .plaintext.drafts import Draft, check_text, drafts, shown, utc_seconds
from .plaintext.records import TURN, new_id
from .provider import Generation, LoraRef, Options, Provider, RecalledLine, Request
from .types import CacheUse, Hit, Message, Record, Reply, Scope, Segment, Usage

__all__ = ["Conversation", "chat", "options_of", "prime"]

_log = logging.getLogger("agentmem")

#: The newest records that a core is chosen from.
CORE_CANDIDATES = 2000
#: Tokens of the running conversation in a prompt, where nothing is known of what they cost.
HISTORY_TOKENS = 3000
#: Turns read at once, from the newest back, until the history's budget is full.
TURNS_READ = 64
#: A query longer than this is cut before the search: an embedder reads no more, and FTS5 slows down.
QUERY_CHARACTERS = 2000
#: Providers outside this machine keep no prefix shorter than this, so none is expected back.
HOSTED_MINIMUM = 1024


class Conversation:
    """A handle's running conversation: its scope, its session, and the prefix its last request left cacheable."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.lock = threading.Lock()
        self.prefix: tuple[Message, ...] = ()
        self.loras: tuple[LoraRef, ...] | None = None
        self._session = scope if scope.session is not None else None

    @property
    def session(self) -> Scope:
        """The scope that this conversation's turns are remembered under; opened at first use."""
        with self.lock:
            if self._session is None:
                self._session = self.scope.model_copy(update={"session": new_id()})
            return self._session


def options_of(values: Mapping[str, Any]) -> Options:
    """Keyword options as `Options`; names it does not know go to the vendor's request as ``extra``."""
    known = {field.name for field in dataclasses.fields(Options)} - {"extra"}
    mine = {name: value for name, value in values.items() if name in known}
    extra = values.get("extra", {})
    if not isinstance(extra, Mapping):
        raise InvalidInput(f"extra is a {type(extra).__name__}: give a mapping of the vendor's own options")
    extra = {**extra, **{name: value for name, value in values.items() if name not in known and name != "extra"}}
    stop = () if mine.get("stop") is None else mine["stop"]
    mine["stop"] = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, (list, tuple)) else (stop,)
    if not all(isinstance(text, str) and text for text in mine["stop"]):
        raise InvalidInput(f"stop is {shown(stop)}: give a str or a list of them")
    for name, least in (("max_tokens", 0), ("seed", -(2**63))):
        value = mine.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63):
            raise InvalidInput(f"{name} is {shown(value)}: give a whole number" + " of 0 or more" * (least == 0))
    for name in ("temperature", "top_p"):
        value = mine.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2):
            raise InvalidInput(f"{name} is {shown(value)}: give a number from 0 to 2")
    return Options(**mine, extra=extra)


def _checked_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    if tools is None:
        return ()
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidInput(f"tools is {shown(tools)}: give a list of tool definitions (mappings)")
    try:
        json.dumps([dict(tool) for tool in tools]).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"a tool can't be written as JSON: {error}") from error
    return tuple(tools)


def _system(engine: Engine, system: Any) -> str | None:
    text = engine.settings.system if system is None else system
    return None if text is None or (isinstance(text, str) and not text) else check_text(text, "the system text")


def chat(
    engine: Engine,
    conversation: Conversation,
    message: Any,
    *,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    recall: bool = True,
    remember: bool = True,
    options: Options | None = None,
) -> Flow[Reply]:
    """One turn. The request is laid out so that everything before this turn is byte-equal to what the last one left."""
    provider = engine.chat_provider()
    known_tools = _checked_tools(tools)
    if known_tools and not provider.capabilities.tools:
        raise ConfigError(f"{provider.name} takes no tools: leave tools out, or choose a model that takes them")
    session = conversation.session
    asked = _asked(engine, message, session)
    turn = [said for _, said in asked]
    history = _history(engine, session, answers=turn)
    noted: list[Usage] = []
    hits: list[Hit] = []
    core: list[Record] = []
    if recall:
        core = _core(engine, conversation.scope, new_session=not history)
        if turn[0].role == "user":
            present = {record for said in history for record in said.records}
            hits = yield from _recall(engine, conversation.scope, turn[0].content, present, noted)
    in_core = {record.id for record in core}
    recalled = [prompt.shown(hit) for hit in hits if hit.record.id not in in_core]
    segments = prompt.lay_out(
        system=_system(engine, system),
        core=prompt.quote(core) if core else None,
        core_records=[record.id for record in core],
        history=history,
        recalled=recalled,
        turn=turn,
        memories=recall,
    )
    request = _request(
        engine, conversation.scope, segments, tools=known_tools, options=options or Options(), recalled=recalled
    )
    shown_here = _shown(engine, provider, segments)
    generation: Generation = yield Generate(provider, request)
    cache = _observe(engine, conversation, request, generation)
    money = price(provider.name, generation.usage)
    # What the answer was made from, beside the conversation so far.
    before_it = {said.records[0] for said in turn} | {hit.record.id for hit in hits} | in_core
    new: list[Draft] = []
    kept: tuple[str, ...] = ()
    vectors: Any = None
    if remember:
        new = [*(draft for draft, _ in asked), *_reply_drafts(engine, generation, session)]
        kept = (*(said.records[0] for said in turn), new_id())[: len(new)]
        try:
            vectors = yield from embedded(engine, [(draft.text, draft.name) for draft in new], noted)
        except ProviderError as error:
            # The turn itself is what must not be lost; its vectors are made at the next search.
            _log.warning("the turn is stored without vectors, its embedder failed: %s", error)
    try:
        with engine.database.write() as connection:
            if new:
                engine.records.insert(new, vectors, engine.space if vectors is not None else None, ids=list(kept))
                if len(new) > len(asked):
                    connection.executemany(
                        # One that was forgotten while the model spoke leaves no trace here.
                        "INSERT OR IGNORE INTO lineage SELECT 'reply', ?, id FROM records WHERE id = ?",
                        [(reply, record) for reply in kept[-1:] for record in before_it],
                    )
            note_embeddings(engine, session, noted)
            engine.ledger.note(
                "chat",
                provider.name,
                session,
                generation.usage,
                cache=cache,
                shown=shown_here,
                money=money,
            )
    except StoreError as error:
        if new:
            raise
        _log.warning("a use of %s could not be noted: %s", provider.name, error)
    return Reply(
        text=generation.text,
        usage=generation.usage,
        recalled=hits,
        cache=cache,
        tool_calls=generation.tool_calls,
        finish_reason=generation.finish_reason,
        model=provider.name,
        records=kept,
    )


def prime(engine: Engine, conversation: Conversation, *, system: str | None = None) -> Flow[Usage]:
    """Prefill what the next turn of this conversation will begin with, so that its prefix is cached when it comes."""
    provider = engine.chat_provider()
    if provider.capabilities.kv == "none":
        raise ConfigError(f"{provider.name} keeps no prefix: there is nothing to prime")
    history = _history(engine, conversation.session)
    core = _core(engine, conversation.scope, new_session=not history)
    segments = prompt.lay_out(
        system=_system(engine, system),
        core=prompt.quote(core) if core else None,
        core_records=[record.id for record in core],
        history=history,
        turn=Message(role="user", content="."),  # every template and API wants a last message; it is never kept
    )
    request = _request(engine, conversation.scope, segments, options=Options(max_tokens=0))
    shown_here = _shown(engine, provider, segments)
    generation: Generation = yield Generate(provider, request)
    _observe(engine, conversation, request, generation)
    engine.ledger.note(
        "prime",
        provider.name,
        conversation.session,
        generation.usage,
        shown=shown_here,
    )
    return generation.usage


def _shown(engine: Engine, provider: Provider, segments: Sequence[Segment]) -> list[str]:
    """The records that stand in a prompt, to be noted with its use.

    A host's are noted here, before it reads them: a turn that fails, is given up or is killed was read all the same,
    and the receipt of a `forget` in the meantime has to say so.
    """
    records = [record for segment in segments for message in segment.messages for record in message.records]
    holds_s = provider.capabilities.holds_prefix_s
    if holds_s is None or not records:
        return records
    try:
        engine.ledger.note_shown(provider.name, records, holds_s)
    except StoreError as error:  # reading must go on where nothing can be written
        _log.warning("what %s is shown could not be noted: %s", provider.name, error)
    return []


def _asked(engine: Engine, message: Any, session: Scope) -> list[tuple[Draft, Message]]:
    """The new message (or the results of several tools), as what will be remembered and as what enters the prompt.

    A tool's result names its call in ``tool_call_id``, which is kept in the metadata.
    """
    asked = [_said(engine, part, session) for part in (message if isinstance(message, (list, tuple)) else [message])]
    roles = [said.role for _, said in asked]
    if roles != ["user"] and (not roles or set(roles) != {"tool"}):
        raise InvalidInput("chat takes one message of the user, or the results of tools; store others with add")
    return asked


def _said(engine: Engine, message: Any, session: Scope) -> tuple[Draft, Message]:
    call_id = None
    if isinstance(message, Message):
        call_id = message.tool_call_id
    elif isinstance(message, Mapping) and "tool_call_id" in message:
        message = dict(message)
        call_id = message.pop("tool_call_id")
    if call_id is not None:
        check_text(call_id, "tool_call_id")
    metadata = {"tool_call_id": call_id} if call_id is not None else None
    # The model reads what will be remembered: the next turn's prompt then begins with the very same text.
    [draft] = _drafts(engine, [message], session, metadata)
    records = (new_id(),)
    return draft, Message(role=draft.role, content=draft.text, name=draft.name, tool_call_id=call_id, records=records)


def _history(engine: Engine, session: Scope, *, answers: Sequence[Message] = ()) -> list[Message]:
    """The end of the session's own turns, within the budget. The cost is that of what is kept, however long the
    session is; records added by hand are no part of it."""
    tokens = engine.settings.history_tokens
    budget = _within(engine, HISTORY_TOKENS if tokens is None else tokens, 0.4)
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


def _within(engine: Engine, tokens: int, share: float) -> int:
    """A budget of the settings, cut to this share of the model's window where that is known and small."""
    window = engine.chat_provider().capabilities.context_tokens
    return tokens if window is None else min(tokens, int(window * share))


def _recall(engine: Engine, scope: Scope, query: str, present: set[str], noted: list[Usage]) -> Flow[list[Hit]]:
    """The records that this turn needs and that are not in the conversation already, within the budget.

    None where nothing is likely to be evidence: what is recalled is most of what a turn costs.
    """
    from .plaintext.fusion import TOGETHER, taken

    settings = engine.settings
    if settings.recall_k == 0 or settings.recall_tokens == 0:
        return []
    budget = _within(engine, settings.recall_tokens, 0.1)
    found = yield from search(
        engine,
        scope,
        query.strip()[:QUERY_CHARACTERS],
        k=max(settings.recall_k, TOGETHER),
        noted=noted,
        words_if_down=True,
        without=present,  # what the model reads anyway must not make anything else look less likely
    )
    likely = found[: min(taken([hit.score for hit in found]), settings.recall_k)]
    fitting = {record.id for record in prompt.fit(map(prompt.shown, likely), budget, engine.count)}
    return [hit for hit in likely if hit.record.id in fitting]


def _core(engine: Engine, scope: Scope, *, new_session: bool) -> list[Record]:
    """The records of the scope's core block.

    It stands still while a session runs, so that the prefix does; it is chosen again at the start of a session when the
    scope has grown by half since, or when one of its records was forgotten or changed.
    """
    if engine.settings.core_tokens == 0:
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
    candidates = [r for r in newest if scope.session is None or r.scope.session is None]
    chosen = prompt.choose_core(
        candidates[::-1],
        engine.ledger.times_shown([record.id for record in candidates]),
        least=engine.settings.page_tokens,
        budget=_within(engine, engine.settings.core_tokens, 0.1),
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


def _request(
    engine: Engine,
    scope: Scope,
    segments: tuple[Segment, ...],
    *,
    options: Options,
    tools: tuple[Mapping[str, Any], ...] = (),
    recalled: Sequence[Record] = (),
) -> Request:
    record_pages = engine.record_view(scope) if recalled else None
    lines: tuple[RecalledLine, ...] = ()
    if record_pages is not None:
        before = engine.ledger.times_shown([record.id for record in recalled])
        lines = tuple(
            RecalledLine(record=record.id, line=prompt.record_line(record) + "\n", shown=before.get(record.id, 0))
            for record in recalled
        )
    return Request(
        segments=segments,
        options=options,
        tools=tools,
        cache_key=engine.cache_key(scope),
        tenant=engine.tenant_key(scope),
        pages=engine.page_view(scope),
        slots=engine.slot_view(scope),
        recalled=lines,
        record_pages=record_pages,
        loras=engine.active_loras(scope),
    )


def _observe(engine: Engine, conversation: Conversation, request: Request, generation: Generation) -> CacheUse:
    """Compare what came from the cache with what the last request of this conversation left cacheable."""
    capabilities = engine.chat_provider().capabilities
    stable = tuple(message for segment in request.segments if segment.stable for message in segment.messages)
    common = 0
    for before, now in zip(conversation.prefix, stable, strict=False):
        if before != now:
            break
        common += 1
    broken = common < len(conversation.prefix)
    expected = sum(engine.count(message.content) for message in conversation.prefix)
    step = engine.settings.page_tokens if capabilities.kv == "tensors" else HOSTED_MINIMUM
    expected = expected // step * step if capabilities.kv == "tensors" else expected * (expected >= step)
    if capabilities.kv == "none" or (capabilities.kv == "tensors" and engine.settings.page_budget == 0):
        expected = 0
    switched = conversation.loras is not None and conversation.loras != request.loras
    conversation.prefix, conversation.loras = stable, request.loras
    cached, estimate = generation.usage.cached_tokens, generation.usage.estimated_cached_tokens
    reason = None
    # An expectation is counted message by message, so it can be off by the template's own tokens: a tenth is no miss.
    if max(cached, estimate or 0) < 0.9 * expected:
        ours = "the cache did not hold the prefix"
        if switched:
            ours = "another LoRA version answers now, and it has pages of its own"
        elif broken:
            ours = "the prompt's prefix changed"
        reason = generation.miss or ours
    elif capabilities.kv == "slots":  # a restore without effect is told also where nothing was expected yet
        reason = generation.miss
    return CacheUse(
        kind=capabilities.kv,
        expected_tokens=expected,
        cached_tokens=cached,
        estimated=estimate is not None,
        estimated_tokens=estimate or 0,
        reason=reason,
        attended=generation.attended,
    )


def _reply_drafts(engine: Engine, generation: Generation, session: Scope) -> list[Draft]:
    """What the model said, as a draft; none if it said nothing that can be stored."""
    calls: Any = _storable([call.model_dump() for call in generation.tool_calls])
    text = _storable(generation.text) if generation.text.strip() else prompt.calls_text(generation.tool_calls)
    if not text.strip():
        return []
    said = {"role": "assistant", "content": text}
    try:
        metadata = {"tool_calls": calls} if calls else None
        return _drafts(engine, said, session, metadata)
    except InvalidInput as error:  # a model may write anything: the answer has come and must not be lost for it
        _log.warning("the answer's tool calls are not remembered: %s", error)
        return _drafts(engine, said, session)


def _drafts(engine: Engine, said: Any, session: Scope, metadata: Mapping[str, Any] | None = None) -> list[Draft]:
    """What is said in this moment, unless the message itself says when: a later turn must know how old it is."""
    now = dt.datetime.fromtimestamp(engine.clock(), dt.UTC)
    return drafts(said, scope=session, metadata=metadata, at=now, source=TURN, redact=engine.redact)


def _storable(value: Any) -> Any:
    """What a model wrote, without the characters and numbers that can't be stored."""
    if isinstance(value, str):
        return value.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    return [_storable(item) for item in value] if isinstance(value, (list, tuple)) else value
