"""``chat`` as one flow: recall, lay out, generate, observe, remember.

Branches on the provider's capabilities, never on its name. What a turn remembers is stored in one transaction after the
answer came: a turn that fails or is cancelled leaves nothing half-done.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import cores, heads, planning, prompt
from .acting import vouched
from .asking import asked as asked_of
from .asking import checked_tools, json_schema, options_of, parsed, reply_drafts
from .engine import Engine
from .errors import ConfigError, InvalidInput, StoreError
from .flow import Flow, Generate
from .flows import embedded_if_up, note_embeddings
from .plaintext.drafts import Draft, shown
from .plaintext.records import check_k, new_id
from .planning import Measured, Plan, measured
from .provider import CachePlan, Generation, LoraRef, Options, Provider, RecalledLine, Request
from .recalling import Core, core_of, standing
from .recalling import recalled as recalled_for
from .tokens import Calibration, request_tokens
from .types import CacheUse, Hit, Message, Record, Reply, Scope, Segment, Usage
from .verbatim import begun

if TYPE_CHECKING:
    from .activation.layouts import Layout

__all__ = ["Conversation", "chat", "options_of", "prime", "warm_every"]

_log = logging.getLogger("agentmem")

#: Longer than any host keeps anything: a century.
LONGEST_S = 3.2e9
#: Tokens of a running session that were said a moment ago.
NEAR_TOKENS = 1000
#: Where a host's rules are not known: it keeps no prefix shorter than this, so none is expected back.
HOSTED_MINIMUM = 1024


class Conversation:
    """A handle's running conversation: its scope, its session, and the prefix its last request left cacheable."""

    def __init__(self, scope: Scope, session: Scope | None = None) -> None:
        self.scope = scope
        self.lock = threading.Lock()
        self.prefix: tuple[Message, ...] = ()
        self.loras: tuple[LoraRef, ...] | None = None
        #: The learnt records that its last turn concerned.
        self.concerned: tuple[str, ...] = ()
        #: The host's name of its last answer.
        self.answer: str | None = None
        self._plan: tuple[Plan | None] | None = None
        #: Since when (in turns) the core that would be chosen is known, and what it is.
        self.reviewed: tuple[int, cores.Review] | None = None
        self._session = scope if scope.session is not None else session

    @property
    def session(self) -> Scope:
        """The scope that this conversation's turns are remembered under; opened at first use."""
        with self.lock:
            if self._session is None:
                self._session = self.scope.model_copy(update={"session": new_id()})
            return self._session

    def plan(self, engine: Engine) -> Plan | None:
        """How its prompts are laid out by what they cost; None where nothing is known of that."""
        with self.lock:
            if self._plan is None:
                self._plan = (planning.planned(engine, self.scope),)
            return self._plan[0]


@dataclass(frozen=True)
class _Prepared:
    """A turn on its way: what was asked and recalled, and the request that was made of it."""

    request: Request
    sent: Measured
    layout: Layout | None
    asked: list[tuple[Draft, Message]]
    hits: list[Hit]
    #: Those of them that stand in the turn, not in the core.
    recalled: list[Hit]
    #: Of these, those that the prompt shows elsewhere too.
    repeated: set[str]
    core: Core
    #: The records that the answer may come from through LoRA versions.
    learnt: set[str]

    @property
    def turn(self) -> list[Message]:
        return [said for _, said in self.asked]

    @property
    def spared(self) -> tuple[str, ...]:
        """The records that the search named and that the turn needs no text of."""
        here = {hit.record.id for hit in self.recalled} - self.repeated
        return tuple(hit.record.id for hit in self.hits if hit.record.id not in here)


def chat(
    engine: Engine,
    conversation: Conversation,
    message: Any,
    *,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    recall: bool = True,
    remember: bool = True,
    schema: Any = None,
    options: Options | None = None,
) -> Flow[Reply]:
    """One turn. The request is laid out so that everything before this turn is byte-equal to what the last one left."""
    provider = engine.chat_provider()
    known_tools = checked_tools(tools)
    if known_tools and not provider.capabilities.tools:
        raise ConfigError(f"{provider.name} takes no tools: leave tools out, or choose a model that takes them")
    options = replace(options or Options(), schema=json_schema(schema))
    if options.schema is not None and not provider.capabilities.schemas:
        raise ConfigError(f"{provider.name} can't answer by a schema: leave schema out, or choose a model that can")
    asked = asked_of(engine, message, conversation.session)
    if any(said.images for _, said in asked) and not provider.capabilities.images:
        raise ConfigError(
            f"{provider.name} reads no images: leave them out, choose a model that reads them, "
            "or set images = true for its provider if it does"
        )
    engine.ledger.check(conversation.session, provider.name)
    noted: list[Usage] = []
    text = heads.given(engine, system)
    with engine.activity.chatting() as under_way:
        made = yield from _prepared(
            engine,
            conversation,
            asked,
            system=text,
            tools=known_tools,
            recall=recall,
            remember=remember,
            options=options,
            noted=noted,
        )
        heads.note(engine, made.sent, text)
        shown_here = _shown(engine, provider, made.request.segments)
        generation: Generation = yield Generate(provider, made.request, under_way.heard)
        cache = _observe(engine, conversation, made.request, made.sent, generation)
        kept = yield from _stored(
            engine, conversation, made, generation, cache, in_prompt=shown_here, noted=noted, remember=remember
        )
    return Reply(
        text=generation.text,
        usage=generation.usage,
        recalled=made.hits,
        cache=cache,
        tool_calls=generation.tool_calls,
        finish_reason=generation.finish_reason,
        model=provider.name,
        records=kept,
        loras=tuple(ref.name for ref in made.request.loras),
        parsed=None if schema is None or generation.tool_calls else parsed(schema, generation.text),
        facts=planning.explained(
            engine,
            conversation.session,
            made.sent,
            made.layout,
            generation.usage,
            plan=conversation.plan(engine),
            turn=made.turn,
            recalled=made.recalled,
            core=[record.id for record in made.core.records],
            used=made.spared,
            decided=made.core.decided,
        ),
    )


def _prepared(
    engine: Engine,
    conversation: Conversation,
    asked: list[tuple[Draft, Message]],
    *,
    system: str | None,
    tools: tuple[Mapping[str, Any], ...],
    recall: bool,
    remember: bool,
    options: Options,
    noted: list[Usage],
) -> Flow[_Prepared]:
    """Recall and lay out."""
    turn = [said for _, said in asked]
    session = conversation.session
    plan = conversation.plan(engine)
    head = planning.head_tokens(engine, system, tools, memories=recall)
    told = prompt.cost(turn, engine.count)
    stands = standing(engine, conversation, plan) if recall else None
    layout, history = begun(engine, conversation, head, told, carried=recall, answers=turn)
    hits: list[Hit] = []
    block = Core()
    present = {record for said in history for record in said.records}
    again: set[str] = set()
    repeated: set[str] = set()
    concerned = conversation.concerned  # a tool's result belongs to the question before it
    asks = turn[0].role == "user"
    if asks:
        here = {record.id for record in stands or ()} if plan is not None else set()
        if plan is not None and plan.local:
            # Nobody has to be told again what was said a moment ago, or stands in the core: there a small model's
            # answers were as likely, and what is repeated is not spared.
            again = present - here - (_near(engine, history) if engine.records.has_turns(session) else set())
        hits, concerned, repeated = yield from recalled_for(
            engine, conversation, turn[0].content, present, noted, recall=recall, core=here, again=again
        )
    if recall:
        named = hits if asks else None
        block = core_of(engine, conversation, plan, layout, stands=stands, present=present, hits=named)
    core, in_core = block.records, block.ids
    loras = engine.active_loras(conversation.scope, concerned)
    known = in_core | vouched(engine, conversation.scope, loras)
    in_turn = [hit for hit in hits if hit.record.id not in known]
    repeated -= known
    recalled = [prompt.shown(hit) for hit in in_turn]
    if plan is not None:  # whether what was recalled stays is known only now
        fresh = [hit for hit in in_turn if hit.record.id not in repeated]
        layout = plan.choose(session.session or "", head, told, planning.sizes(engine, fresh))
        layout = replace(layout, keep=layout.keep and not repeated)  # once in a history is enough
    images = any(said.images for said in turn)  # they are not remembered, so the next request has none
    segments = prompt.lay_out(
        system=system,
        core=prompt.quote(core) if core else None,
        core_records=[record.id for record in core],
        history=history,
        recalled=recalled,
        turn=turn,
        memories=recall,
        behind=layout is not None,
        before=layout is not None and planning.in_front(engine),
        settled=layout is not None and remember and not images,
        keep=layout is not None and layout.keep,
    )
    sent = measured(engine, segments, tools, options.schema)
    request = _request(
        engine,
        conversation,
        segments,
        tools=tools,
        options=options,
        recalled=recalled,
        cache=_asked_of_host(engine, conversation, plan, layout, sent),
        loras=loras,
        answer=new_id() if remember and engine.redact is None else "",
    )
    learnt = {record for ref in request.loras for record in ref.records}
    if engine.settings.lora_when == "recalled":
        learnt &= set(concerned)
    return _Prepared(request, sent, layout, asked, hits, in_turn, repeated, block, learnt)


def _near(engine: Engine, history: Sequence[Message]) -> set[str]:
    """The records of the newest messages."""
    found: set[str] = set()
    left = NEAR_TOKENS
    for said in reversed(history):
        left -= engine.count(said.content)
        if left < 0:
            break
        found.update(said.records)
    return found


def _stored(
    engine: Engine,
    conversation: Conversation,
    made: _Prepared,
    generation: Generation,
    cache: CacheUse,
    *,
    in_prompt: Sequence[str],
    noted: list[Usage],
    remember: bool,
) -> Flow[tuple[str, ...]]:
    """Remember the turn and note its use, in one transaction; returns the ids of what is remembered."""
    model, session, plan = engine.chat_provider().name, conversation.session, conversation.plan(engine)
    here = engine.chat_provider().capabilities.holds_prefix_s is None
    money = engine.ledger.money(model, generation.usage, here=here)
    new: list[Draft] = []
    kept: tuple[str, ...] = ()
    vectors: Any = None
    if remember:
        new = [*(draft for draft, _ in made.asked), *reply_drafts(engine, generation, session, model)]
        kept = (*(said.records[0] for said in made.turn), made.request.answer or new_id())[: len(new)]
        vectors = yield from embedded_if_up(engine, new, noted, "the turn")
    # What the answer was made from, beside the conversation so far.
    before_it = (
        {said.records[0] for said in made.turn} | {hit.record.id for hit in made.hits} | made.core.ids | made.learnt
    )
    fresh = [hit for hit in made.recalled if hit.record.id not in made.repeated]
    facts = planning.facts(
        engine, session, made.sent, made.request, made.turn, recalled=fresh, used=made.spared, reply=generation
    )
    try:
        with engine.database.write() as connection:
            if new:
                engine.records.insert(new, vectors, engine.space if vectors is not None else None, ids=list(kept))
                if len(new) > len(made.asked):
                    connection.executemany(
                        # One that was forgotten while the model spoke leaves no trace here.
                        "INSERT OR IGNORE INTO lineage SELECT 'reply', ?, id FROM records WHERE id = ?",
                        [(reply, record) for reply in kept[-1:] for record in before_it],
                    )
                if kept and made.layout is not None and made.layout.keep:
                    planning.keep(connection, kept[0], made.recalled)
            if plan is not None:
                plan.done(connection, made.sent, facts if new else None, made.layout)
                if made.core.account is not None:
                    cores.keep_account(engine, connection, conversation.scope, made.core.account)
            note_embeddings(engine, session, noted)
            Calibration(engine.database).note(
                model, request_tokens(made.request, engine.count), generation.usage.input_tokens
            )
            engine.ledger.note(
                "chat",
                model,
                session,
                generation.usage,
                cache=cache,
                shown=in_prompt,
                money=money,
                turn=facts,
                here=here,
                loras=[ref.name for ref in made.request.loras],
            )
    except StoreError as error:
        if new:
            raise
        _log.warning("a use of %s could not be noted: %s", model, error)
    return kept


def prime(
    engine: Engine, conversation: Conversation, *, system: str | None = None, parallel: int | None = None
) -> Flow[Usage]:
    """Prefill what the next turn of this conversation will begin with, so that its prefix is cached when it comes."""
    if parallel is not None:
        parallel = check_k(parallel, "parallel")
    provider = engine.chat_provider()
    if provider.capabilities.kv == "none":
        raise ConfigError(f"{provider.name} keeps no prefix: there is nothing to prime")
    engine.ledger.check(conversation.session, provider.name)
    head = heads.given(engine, system)
    plan = conversation.plan(engine)
    stands = standing(engine, conversation, plan)
    layout, history = begun(engine, conversation, planning.head_tokens(engine, head, (), memories=True), 0)
    present = {record for said in history for record in said.records}
    block = core_of(engine, conversation, plan, layout, stands=stands, present=present, hits=None)
    core = block.records
    segments = prompt.lay_out(
        system=head,
        core=prompt.quote(core) if core else None,
        core_records=[record.id for record in core],
        history=history,
        turn=Message(role="user", content="."),  # every template and API wants a last message; it is never kept
    )
    sent = measured(engine, segments, ())
    if parallel is not None and not planning.prewarm_pays(engine, sent, parallel):
        return Usage()
    cache = _asked_of_host(engine, conversation, plan, layout, sent)
    options = Options(max_tokens=0)
    loras = engine.active_loras(conversation.scope, conversation.concerned)
    request = _request(engine, conversation, segments, options=options, cache=cache, loras=loras)
    shown_here = _shown(engine, provider, segments)
    generation: Generation = yield Generate(provider, request)
    _observe(engine, conversation, request, sent, generation)
    engine.ledger.note(
        "prime",
        provider.name,
        conversation.session,
        generation.usage,
        shown=shown_here,
        here=provider.capabilities.holds_prefix_s is None,
    )
    return generation.usage


def warm_every(engine: Engine, conversation: Conversation, idle_s: float) -> float | None:
    """Seconds between primes that keep this conversation's prefix at its host through ``idle_s`` seconds."""
    given: Any = idle_s
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= LONGEST_S:
        raise InvalidInput(f"idle_s is {shown(given)}: give seconds, 0 or more")
    return planning.warm_every(engine, prompt.cost(conversation.prefix, engine.count), float(given))


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


def _asked_of_host(
    engine: Engine, conversation: Conversation, plan: Plan | None, layout: Layout | None, sent: Measured
) -> CachePlan | None:
    """What the host's cache is asked for; None leaves it to the adapter."""
    if plan is not None:
        return plan.cache_plan(sent, layout, conversation.answer)
    return CachePlan() if engine.settings.cache == "off" else None


def _request(
    engine: Engine,
    conversation: Conversation,
    segments: tuple[Segment, ...],
    *,
    options: Options,
    cache: CachePlan | None = None,
    tools: tuple[Mapping[str, Any], ...] = (),
    recalled: Sequence[Record] = (),
    loras: tuple[LoraRef, ...] = (),
    answer: str = "",
) -> Request:
    scope = conversation.scope
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
        cache=cache,
        cache_key=engine.cache_key(scope),
        tenant=engine.tenant_key(scope),
        pages=engine.page_view(scope),
        slots=engine.slot_view(scope),
        recalled=lines,
        record_pages=record_pages,
        prefixes=engine.prefix_view(scope),
        loras=loras,
        answer=answer,
    )


def _observe(
    engine: Engine, conversation: Conversation, request: Request, sent: Measured, generation: Generation
) -> CacheUse:
    """Compare what came from the cache with what it should have held."""
    capabilities = engine.chat_provider().capabilities
    stable = tuple(message for segment in request.segments if segment.stable for message in segment.messages)
    common = 0
    for before, now in zip(conversation.prefix, stable, strict=False):
        if before != now:
            break
        common += 1
    broken = common < len(conversation.prefix)
    rules = engine.cache_rules
    if rules is not None:
        expected = planning.expected(engine, rules, request, sent)
    else:
        plan = conversation.plan(engine)
        expected = 0 if plan is None else plan.returns(sent)
        expected = expected or sum(engine.count(message.content) for message in conversation.prefix)
        step = engine.settings.page_tokens if capabilities.kv == "tensors" else HOSTED_MINIMUM
        expected = expected // step * step if capabilities.kv == "tensors" else expected * (expected >= step)
    if capabilities.kv == "none" or (capabilities.kv == "tensors" and engine.settings.page_budget == 0):
        expected = 0
    shaping = tuple(ref for ref in request.loras if not ref.activated)  # the others leave the prefix as it is
    switched = conversation.loras is not None and conversation.loras != shaping
    conversation.prefix, conversation.loras = stable, shaping
    conversation.answer = generation.id
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
