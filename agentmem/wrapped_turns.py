"""What memory does around a request that somebody else's client sends: recall before it, remember after it.

Flows over what a vendor's adapter read (adapters/clients/). Knows no wire format and sends nothing. What fails here is
logged and the caller's request goes out as it is; only a spent budget stops it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from . import prompt
from .acting import QUERY_CHARACTERS
from .activity import Turn
from .asking import reply_drafts
from .engine import Engine
from .errors import AgentMemError, BudgetExceeded, InvalidInput, StoreError
from .flow import Flow
from .flows import embedded_if_up, note_embeddings, search
from .plaintext.drafts import Draft, drafts, redacted
from .plaintext.records import TURN, new_id
from .provider import Generation
from .recalling import TOLD_K, TOLD_TOKENS
from .types import CacheUse, Hit, Message, Scope, Usage
from .wrapped_marks import Marked, learn, plan

__all__ = ["Asked", "Ready", "Recollection"]

V = TypeVar("V")
_log = logging.getLogger("agentmem")

#: The session's newest turns that are looked at for what the caller's messages hold.
TURNS_READ = 128
#: Conversations of one client whose recalled block, or whose records at the host, are kept in mind.
KEPT_IN_MIND = 2048


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request of a wrapped client, as its adapter read it.

    ``model`` is ``"scheme:model"``. ``messages`` is the conversation in the request, in order, without the system part;
    ``head`` is the text of the tools and the system part. ``kv`` and ``holds_s`` as in `Capabilities`. ``previous`` is
    the host's name of what it holds already of this conversation (an answer, a conversation): then ``messages`` are
    only what is new. ``marked``: the caller marks prefixes for the host's cache itself.
    """

    model: str
    messages: tuple[Message, ...]
    head: str = ""
    kv: Literal["none", "auto", "breakpoints"] = "auto"
    holds_s: float | None = None
    previous: str | None = None
    marked: bool = False

    @property
    def turn(self) -> int:
        """Where the user's last message stands; 0 if there is none."""
        return max((at for at, said in enumerate(self.messages) if said.role == "user"), default=0)

    @property
    def in_tools(self) -> bool:
        """Whether the new input is the results of tools: what is sent now begins the next request too."""
        return any(said.role == "tool" for said in self.new)

    @property
    def prefixes(self) -> list[int]:
        """How many messages begin the next request too, as they stand: up to the last two turns of the user, which the
        last request and this one have in common, and in a run of tools up to its last two answers."""
        users = [at for at, said in enumerate(self.messages) if said.role == "user"]
        found = users[-2:]
        if self.in_tools:
            calls = self.begins
            while calls > 0 and self.messages[calls - 1].role == "assistant":
                calls -= 1
            found += [calls] if calls > self.turn + 1 else []
            found.append(len(self.messages))
        return [count for count in dict.fromkeys(found) if count]

    @property
    def begins(self) -> int:
        """Where the new input begins in ``messages``: behind the model's last answer."""
        end = self.ends
        while end > 0 and self.messages[end - 1].role != "assistant":
            end -= 1
        return end

    @property
    def ends(self) -> int:
        """Where the new input ends: before an answer that the caller has begun and the model is to go on with."""
        end = len(self.messages)
        while end > 0 and self.messages[end - 1].role == "assistant":
            end -= 1
        return end

    @property
    def new(self) -> tuple[Message, ...]:
        """The new input: what the user says, or the results of tools."""
        return self.messages[self.begins : self.ends]


@dataclass(kw_only=True)
class Ready:
    """What memory found for a request. ``block`` is to stand in the message ``place`` of `Asked.messages`, before its
    text, or ``behind`` it; "" where nothing is recalled. The system part is to end with ``note``, "" where not.
    ``marked`` says which prefixes to mark; None where that is left to the caller or the host. ``under_way`` is the turn
    as work in the background sees it."""

    asked: Asked
    under_way: Turn
    block: str = ""
    place: int | None = None
    behind: bool = False
    note: str = ""
    marked: Marked | None = None
    hits: tuple[Hit, ...] = ()
    held: frozenset[str] = frozenset()
    uses: list[Usage] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    first_s: float | None = None

    def came(self) -> None:
        """A piece of the answer is there."""
        self.under_way.heard()
        if self.first_s is None:
            self.first_s = time.perf_counter() - self.started

    @contextlib.contextmanager
    def sent(self, *, streams: bool) -> Generator[None]:
        """Around the sending: the turn is over with it, a streamed one only where it fails; else with its stream."""
        over = True
        try:
            yield
            over = not streams
        finally:
            if over:
                self.under_way.end()


class _Latest(Generic[V]):
    """The values of the keys used last, at most `KEPT_IN_MIND` of them."""

    def __init__(self) -> None:
        self._values: OrderedDict[str, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> V | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: str, value: V) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > KEPT_IN_MIND:
                self._values.popitem(last=False)


class Recollection:
    """The memory of one wrapped client: a scope, its session, and whether it recalls and remembers.

    ``handle`` is a `ScopedMemory` or `AsyncScopedMemory`; a chat on it goes on with what the client was told.
    """

    def __init__(self, handle: Any, *, recall: bool = True, remember: bool = True, cache: bool = True) -> None:
        self.handle = handle
        self.recall = recall
        self.remember = remember
        #: Whether the adapter may mark prefixes for the host's cache where the caller marks none.
        self.cache = cache
        self.engine: Engine = handle._engine
        self._blocks: _Latest[tuple[str, bool, tuple[Hit, ...]]] = _Latest()
        self._held: _Latest[frozenset[str]] = _Latest()

    def narrowed(self, handle: Any) -> Recollection:
        """The same for another scope. What is kept in mind is shared, under each scope's name: a server makes a copy of
        its client for every request."""
        narrow = Recollection(handle, recall=self.recall, remember=self.remember, cache=self.cache)
        narrow._blocks, narrow._held = self._blocks, self._held
        return narrow

    @property
    def scope(self) -> Scope:
        """Whose memory it is."""
        scope: Scope = self.handle._scope
        return scope

    @property
    def session(self) -> Scope:
        """What the client's turns are remembered under."""
        session: Scope = self.handle._conversation.session
        return session

    @property
    def cache_key(self) -> str:
        """An opaque routing key of this scope for hosts that take one."""
        return self.engine.cache_key(self.scope)

    def _name(self, key: str | None) -> str:
        return json.dumps([key, *(value for _, value in self.scope.levels())])

    # ---- before the request ---------------------------------------------------------------------------------------

    def before(self, asked: Asked) -> Flow[Ready]:
        """What is to be put into this request. Raises `BudgetExceeded`, and nothing else."""
        ready = Ready(asked=asked, under_way=self.engine.activity.begin())
        try:
            self.engine.ledger.check(self.session, asked.model)
            if self.recall:
                yield from self._recall(ready)
                ready.note = prompt.MEMORY_NOTE
                self._note_shown(ready)
            if self.cache and asked.kv == "breakpoints" and not asked.marked and asked.previous is None:
                ready.marked = plan(
                    self.engine,
                    self.scope,
                    model=asked.model,
                    head=asked.head,
                    messages=asked.messages,
                    prefixes=asked.prefixes,
                    turn=asked.turn,
                )
        except BudgetExceeded:
            ready.under_way.end()
            raise
        except Exception as error:  # noqa: BLE001 - whatever fails in memory, the caller's request goes out
            _log.warning("the request to %s goes out without memories: %s", asked.model, _told(error))
            return Ready(asked=asked, under_way=ready.under_way, started=ready.started)
        return ready

    def _recall(self, ready: Ready) -> Flow[None]:
        asked = ready.asked
        ready.held = self._held.get(self._name(asked.previous)) or frozenset()
        users = [place for place, said in enumerate(asked.messages) if said.role == "user" and said.content.strip()]
        if not users:
            return
        place = users[-1]
        key = self._name(_digest(asked.messages[: place + 1]))
        texts = self._texts(asked.messages)
        turns = self.engine.records.turns(self.session, limit=max(TURNS_READ, 2 * len(asked.messages)))
        ready.held |= {turn.id for turn in turns if turn.text in texts}
        # With the results of tools the question stands as it stood when the tools were called.
        known = self._blocks.get(key) if place < asked.begins else None
        if known is not None and not self._holds(known[2]):
            known = None
        if known is None:
            hits = yield from self._likely(asked.messages[place].content, texts, ready)
            # Before a mark of the caller's, the block would be kept in the place of what the next request begins with.
            known = prompt.quote(map(prompt.shown, hits)) if hits else "", asked.marked, tuple(hits)
            self._blocks.put(key, known)
        ready.block, ready.behind, ready.hits = known
        ready.place = place if ready.block else None

    def _holds(self, hits: Sequence[Hit]) -> bool:
        """Whether these records are what they were: what is forgotten or corrected meanwhile is not shown again."""
        held = self.engine.records.named([hit.record.id for hit in hits], self.scope)
        return [(record.id, record.version) for record in held] == [(hit.record.id, hit.record.version) for hit in hits]

    def _likely(self, query: str, texts: set[str], ready: Ready) -> Flow[list[Hit]]:
        """The records that this turn needs and that the model does not read anyway, within the budget."""
        from .plaintext.asking import asks, tells
        from .plaintext.fusion import TOGETHER, taken

        engine, settings = self.engine, self.engine.settings
        if settings.recall_k == 0 or settings.recall_tokens == 0:
            return []
        most, tokens = settings.recall_k, settings.recall_tokens
        if tells(query):
            most, tokens = min(most, TOLD_K), min(tokens, TOLD_TOKENS)
        k = max(settings.recall_k, TOGETHER)
        query = query.strip()[:QUERY_CHARACTERS]
        without = set(ready.held)
        found: list[Hit] = []
        for _ in range(2):
            found = yield from search(
                engine, self.scope, query, k=k, noted=ready.uses, words_if_down=True, without=without
            )
            # What stands in the messages makes nothing else look less likely: it is searched again without it.
            known = {hit.record.id for hit in found if _stands(hit.record.text, texts)}
            if not known:
                break
            without |= known
            ready.held |= known
        found = [hit for hit in found if hit.record.id not in without]
        likely = found[: min(taken([hit.score for hit in found], asking=asks(query)), most)]
        fitting = {record.id for record in prompt.fit(map(prompt.shown, likely), tokens, engine.count)}
        return [hit for hit in likely if hit.record.id in fitting]

    def _texts(self, messages: Sequence[Message]) -> set[str]:
        """What the caller's messages say, also as it would be stored."""
        texts = {said.content for said in messages}
        if (redact := self.engine.redact) is not None:
            texts |= {redacted(redact, text) for text in texts}
        return texts

    def _note_shown(self, ready: Ready) -> None:
        """A host's are noted before it reads them: a request that fails or is given up was read all the same."""
        asked = ready.asked
        shown = self._shown(ready)
        if asked.holds_s is None or not shown:
            return
        try:
            self.engine.ledger.note_shown(asked.model, shown, asked.holds_s)
        except StoreError as error:  # reading must go on where nothing can be written
            _log.warning("what %s is shown could not be noted: %s", asked.model, error)

    def _shown(self, ready: Ready) -> list[str]:
        return [*(hit.record.id for hit in ready.hits), *sorted(ready.held)]

    # ---- after the answer -----------------------------------------------------------------------------------------

    def after(self, ready: Ready, generation: Generation) -> Flow[None]:
        """Remember the turn and note the use. Never raises: the answer has come."""
        try:
            yield from self._remember(ready, generation)
        except Exception as error:  # noqa: BLE001 - the caller has an answer, and must get it
            _log.warning("a turn with %s is not remembered: %s", ready.asked.model, _told(error))

    def _remember(self, ready: Ready, generation: Generation) -> Flow[None]:
        engine, asked, session = self.engine, ready.asked, self.session
        usage = generation.usage.model_copy(
            update={
                "first_token_s": generation.usage.first_token_s or ready.first_s,
                "total_s": time.perf_counter() - ready.started,
            }
        )
        said: list[Draft] = []
        answer: list[Draft] = []
        vectors: Any = None
        if self.remember:
            said = self._unheard(asked)
            answer = reply_drafts(engine, generation, session, asked.model)
            vectors = yield from embedded_if_up(engine, [*said, *answer], ready.uses, "the turn")
        new = [*said, *answer]
        ids = [new_id(engine.clock()) for _ in new]
        ids.sort()
        with engine.database.write() as connection:
            if new:
                engine.records.insert(new, vectors, engine.space if vectors is not None else None, ids=ids)
            if answer:
                made_from = {*ids[: len(said)], *(hit.record.id for hit in ready.hits)}
                connection.executemany(
                    # One that was forgotten while the model spoke leaves no trace here.
                    "INSERT OR IGNORE INTO lineage SELECT 'reply', ?, id FROM records WHERE id = ?",
                    [(ids[-1], record) for record in made_from],
                )
            note_embeddings(engine, session, ready.uses)
            if ready.marked is not None:
                learn(engine, connection, self.scope, asked.model, ready.marked)
            engine.ledger.note(
                "chat",
                asked.model,
                session,
                usage,
                cache=CacheUse(kind=asked.kv, cached_tokens=usage.cached_tokens, reason=generation.miss),
                shown=[] if asked.holds_s is not None else self._shown(ready),
            )
        if generation.id is not None:
            held = frozenset([*ready.held, *(hit.record.id for hit in ready.hits), *ids])
            for name in {generation.id, *([asked.previous] if asked.previous else ())}:
                self._held.put(self._name(name), held)

    def _unheard(self, asked: Asked) -> list[Draft]:
        """The new input as it is remembered; nothing where it was remembered already and is only asked again."""
        found: list[Draft] = []
        for message in asked.new:
            if message.role not in ("user", "tool") or not message.content.strip():
                continue
            call = {"tool_call_id": message.tool_call_id} if message.tool_call_id else None
            said = {"role": message.role, "content": message.content, "name": message.name}
            try:
                found += drafts(
                    [said],
                    scope=self.session,
                    metadata=call,
                    at=dt.datetime.fromtimestamp(self.engine.clock(), dt.UTC),
                    source=TURN,
                    redact=self.engine.redact,
                )
            except InvalidInput as error:
                _log.warning("a message is not remembered: %s", error)
        return [] if self._again(asked, found) else found

    def _again(self, asked: Asked, said: Sequence[Draft]) -> bool:
        """True if the session's last turn had this very input, and the caller's messages hold no such turn before it:
        the answer is asked for once more."""
        if not said:
            return False
        before = list(asked.messages[: asked.begins])
        while before and before[-1].role == "assistant":
            before.pop()
        new = [(message.role, message.content) for message in asked.new]
        if [(message.role, message.content) for message in before[-len(new) :]] == new:
            return False
        newest = self.engine.records.turns(self.session, limit=len(said) + TURNS_READ)
        answers = 0
        while answers < len(newest) and newest[answers].role == "assistant":
            answers += 1
        last = newest[answers : answers + len(said)][::-1]
        return [(turn.role, turn.text) for turn in last] == [(draft.role, draft.text) for draft in said]


def _stands(text: str, texts: set[str]) -> bool:
    """Whether the model reads this text anyway."""
    return any(text in said for said in texts)


def _digest(messages: Sequence[Message]) -> str:
    """Equal for equal conversations up to here."""
    told = [[said.role, said.content, [call.model_dump() for call in said.tool_calls]] for said in messages]
    return hashlib.sha256(json.dumps(told, ensure_ascii=True, default=str).encode()).hexdigest()


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, AgentMemError) else f"{type(error).__name__}: {error}"
