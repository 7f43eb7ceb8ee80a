"""The door: `Memory`, and the handles bound to a scope. Each verb runs a flow (flows.py, chat.py) in this thread.

Knows the public signatures and what they promise; the logic is in the flows, which `AsyncMemory` (async_memory.py) runs
too.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from . import chat as chats
from . import consolidate as consolidating
from . import counting, explaining, flows, forgetting, histories, reporting, transfer
from .asking import Schema
from .background import Background
from .chat import Conversation
from .engine import Engine
from .explaining import Explanation
from .flow import local, run
from .flows import When
from .handles import Activation, Parametric, Plaintext
from .jobs import Jobs
from .ledger.budgets import Budget, Spent
from .ledger.report import Report
from .opening import NOT_GIVEN, narrowed, opened
from .planner.values import ConsolidationPlan
from .provider import Provider
from .reply_stream import ReplyStream
from .types import (
    Change,
    Compaction,
    Context,
    Erasure,
    Hit,
    Message,
    Record,
    Reply,
    Scope,
    TokenCount,
    Verification,
)

if TYPE_CHECKING:
    from .plaintext.embed import Embedder

__all__ = ["Activation", "Memory", "Parametric", "Plaintext", "ScopedMemory"]

T = TypeVar("T")
Content = str | Message | Mapping[str, Any] | Sequence[str | Message | Mapping[str, Any]]


class ScopedMemory:
    """Memory bound to a scope: it sees its own scope, everything beneath it, and what the levels above share.

    Made by `Memory.scope`. Any number of handles, threads and processes may use one folder.
    """

    def __init__(self, engine: Engine, scope: Scope) -> None:
        self._engine = engine
        self._scope = scope
        self._conversation = Conversation(scope)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._engine.settings.path!r}, {self._scope})"

    def scope(
        self, *, tenant: str = NOT_GIVEN, user: str = NOT_GIVEN, agent: str = NOT_GIVEN, session: str = NOT_GIVEN
    ) -> ScopedMemory:
        """A handle bound to a scope beneath this one. Values are compared byte for byte.

        Raises `ScopeError` for None, an empty or malformed value, and for a level that this handle has set otherwise.
        """
        return ScopedMemory(self._engine, narrowed(self._scope, tenant=tenant, user=user, agent=agent, session=session))

    def add(
        self,
        content: Content,
        *,
        metadata: Mapping[str, Any] | None = None,
        at: When = None,
        valid_from: When = None,
        valid_until: When = None,
        source: str | None = None,
        trust: Literal["trusted", "untrusted"] | None = None,
        supersedes: str | Sequence[str] | None = None,
    ) -> builtins.list[Record]:
        """Remember text exactly as it is. One embedder call and one transaction for the batch, no language model.

        ``content`` is a str, a message (``{"role", "content", "name"?, "at"?, "metadata"?}`` or `Message`), or a list
        of them. ``at`` is when it was said; between ``valid_from`` and ``valid_until`` it is found by searches.
        ``metadata`` is JSON. ``trust="untrusted"`` marks what a stranger wrote: it is recalled as such, and no LoRA
        learns it unasked. ``supersedes`` names records whose place this takes: they hold until it does (``valid_from``,
        else ``at``, else now), stay in the history, and searches as of then find them. When this returns, the records
        survive ``kill -9`` and a power cut. Raises `InvalidInput` before anything is written, `Full` and other
        `StoreError` with nothing changed.
        """
        return run(
            flows.add(
                self._engine,
                self._scope,
                content,
                metadata=metadata,
                at=at,
                valid_from=valid_from,
                valid_until=valid_until,
                source=source,
                trust=trust,
                supersedes=supersedes,
            )
        )

    def search(
        self, query: str, *, k: int = 10, where: Mapping[str, Any] | None = None, at: When = None, explain: bool = False
    ) -> builtins.list[Hit]:
        """The ``k`` records that best answer ``query``, best first; fewer if there are fewer.

        Words and meaning in one pass, with one embedder call. ``at`` searches what was valid then (default: now).
        ``where`` narrows it inside the search: ``{"topic": "food"}`` equals in the metadata's top level or in ``id``,
        ``role``, ``name``, ``source``, ``trust``, ``at``, ``created``, ``valid_from``, ``valid_until``; tests are
        ``{"price": {"gte": 5, "lt": 9}}``, ``{"in": [...]}``, ``{"prefix": "a"}``, ``{"not": ...}``; conditions combine
        as ``{"and": [...]}``, ``{"or": [...]}``, ``{"not": {...}}``. Types count. `Hit.score` is the probability that
        the record is evidence for the query; ``explain`` adds the raw signals to `Hit.why`.
        """
        return run(flows.search(self._engine, self._scope, query, k=k, where=where, at=at, explain=explain))

    def get(self, id: str) -> Record:
        """One record; `NotFound` if it is unknown or not visible from this scope."""
        return run(local(self._engine.records.get, id, self._scope))

    def list(
        self, where: Mapping[str, Any] | None = None, limit: int = 100, after: str | None = None
    ) -> builtins.list[Record]:
        """Records in order of arrival, at most ``limit``, those behind the id ``after``; ``where`` as in `search`."""
        return run(local(self._engine.records.list, self._scope, where, limit, after))

    def update(self, id: str, text: str | None = None, metadata: Mapping[str, Any] | None = None) -> Record:
        """Correct a record's text, metadata or both; the version before is kept in its history.

        A correction holds for all times: ``search(at=...)`` finds the new text. For what changed in the world use
        ``add(..., supersedes=id)``.
        Core blocks made from the old text are chosen again, LoRA versions that learnt it are retired.
        """
        return run(flows.update(self._engine, self._scope, id, text=text, metadata=metadata))

    @overload
    def history(self, id: str) -> builtins.list[Record]: ...

    @overload
    def history(self, *, about: str) -> builtins.list[Change]: ...

    def history(
        self, id: str | None = None, *, about: str | None = None
    ) -> builtins.list[Record] | builtins.list[Change]:
        """All versions of a record and of those that it superseded or was superseded by, oldest first.

        With ``about`` what changed in that matter, in order of time: each step with what it replaced.
        """
        return run(histories.history(self._engine, self._scope, id, about=about))

    def explain(self, record: str | Record | Hit) -> Explanation:
        """Where a record lives now and why, what it cost and saved so far, and what would move it. Changes nothing;
        raises `NotFound`."""
        return run(local(explaining.explain, self._engine, self._scope, record))

    def forget(
        self,
        ids: str | Sequence[str] | None = None,
        *,
        where: Mapping[str, Any] | None = None,
        everything: bool = False,
        dry_run: bool = False,
    ) -> Erasure:
        """Erase records and all that was made from them: versions, index, KV pages, core blocks, LoRA versions.

        Give ``ids`` or ``where``; ``where={}`` erases everything in this scope, on the root handle only with
        ``everything=True``. Returns the receipt; with ``dry_run`` only says what would go. When it returns, the bytes
        are gone from the folder. Interrupted, the rest goes at the next open.
        """
        return run(
            local(
                forgetting.forget, self._engine, self._scope, ids, where=where, everything=everything, dry_run=dry_run
            )
        )

    def context(self, query: str | None = None, *, max_tokens: int = 500) -> Context:
        """The records for a query (without one: the newest) as a block for your own prompt, within ``max_tokens``."""
        return run(flows.context(self._engine, self._scope, query, max_tokens=max_tokens))

    @overload
    def chat(
        self,
        message: Content,
        *,
        system: str | None = ...,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        schema: Schema | None = ...,
        stream: Literal[False] = ...,
        recall: bool = ...,
        remember: bool = ...,
        **options: Any,
    ) -> Reply: ...
    @overload
    def chat(
        self,
        message: Content,
        *,
        system: str | None = ...,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        schema: Schema | None = ...,
        stream: Literal[True],
        recall: bool = ...,
        remember: bool = ...,
        **options: Any,
    ) -> ReplyStream: ...

    @overload
    def chat(
        self,
        message: Content,
        *,
        system: str | None = ...,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        schema: Schema | None = ...,
        stream: bool,
        recall: bool = ...,
        remember: bool = ...,
        **options: Any,
    ) -> Reply | ReplyStream: ...
    def chat(
        self,
        message: Content,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        schema: Schema | None = None,
        stream: bool = False,
        recall: bool = True,
        remember: bool = True,
        **options: Any,
    ) -> Reply | ReplyStream:
        """One turn with the model: recall, answer, remember.

        ``message`` is of the user, or the result of a tool (``{"role": "tool", "content", "tool_call_id"}``), or a list
        of results where the model asked for several tools at once.
        What was recalled enters at the end of the prompt, so the cached prefix before it stays whole. ``recall=False``
        keeps every record out but this session's own turns; ``remember=False`` stores nothing. ``options`` are
        ``max_tokens, temperature, top_p, seed, stop`` and whatever the vendor takes. On a handle without a session the
        turns go to a session of its own, for the handle's life. With ``stream=True`` a `ReplyStream` comes back at
        once.

        Raises `ConfigError` without a model, `ProviderError` when the model fails and `StoreError` when the turn can't
        be stored (then nothing is remembered; pieces of a stream have come by then).
        """
        flow = chats.chat(
            self._engine,
            self._conversation,
            message,
            system=system,
            tools=tools,
            recall=recall,
            remember=remember,
            schema=schema,
            options=chats.options_of(options),
        )
        return ReplyStream(flow) if stream else run(flow)

    def count_tokens(
        self,
        content: Content,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        exact: bool = False,
    ) -> TokenCount:
        """How many tokens this has for the model: a str by itself; messages, or a str with ``system`` or ``tools``, as
        the request that they make.

        By the model's own tokenizer where it is at hand, else an estimate that learns from what the host counted.
        ``exact=True`` asks the vendor's counting endpoint where there is one: that is a request, and it counts a str,
        too, as the request that it makes.
        """
        return run(counting.count_tokens(self._engine, content, system=system, tools=tools, exact=exact))

    def report(self, *, since: When = None, until: When = None) -> Report:
        """What memory cost and saved in this scope: tokens, seconds, money; on the root handle also bytes on disk.

        ``since`` and ``until`` bound the time of the uses (ISO text or datetime); ``str()`` is a table, ``.html()`` a
        page.
        """
        return run(local(reporting.report, self._engine, self._scope, since=since, until=until))

    def budget(
        self,
        dollars: float | None,
        *,
        per: Literal["day", "month", "ever"] = "day",
        action: Literal["stop", "warn"] = "stop",
    ) -> Budget | None:
        """Let uses in this scope and beneath it cost so many dollars per day or month (UTC), or ever; None removes that
        budget. Once they are spent a chat raises `BudgetExceeded` before anything is sent, or warns once a day.
        """
        return run(local(reporting.budget, self._engine, self._scope, dollars, per=per, action=action))

    def spent(self) -> Spent:
        """What uses in this scope and beneath it cost today, this month and ever, and the budgets they are under."""
        return run(local(reporting.spent, self._engine, self._scope))

    def consolidate(self, *, dry_run: bool = False, budget: Mapping[str, float] | None = None) -> ConsolidationPlan:
        """Move memories of this scope and beneath it to the kind that costs least: core blocks, KV pages or a host's
        prefix, LoRA versions, and back.

        With ``dry_run`` nothing changes: `ConsolidationPlan.moves` are what would be done, each with what it costs and
        is expected to save; else they are made and ``outcomes`` says what became of each, and what earlier ones saved
        since. ``budget`` bounds what this call may spend: ``{"seconds": 60, "dollars": 0.1, "bytes": 10**8}`` (CPU,
        new bytes), by default the setting ``consolidate_budget``. Any number of processes may call it: no move is made
        twice. Can be interrupted: what is done stays, the next call goes on. No record is changed or lost by it.

        Raises `InvalidInput` for a budget of other names or numbers. A move that fails is an outcome, not an error.
        """
        return run(consolidating.consolidate(self._engine, self._scope, dry_run=dry_run, budget=budget))

    def export(self, path: str | os.PathLike[str], *, vectors: bool = False) -> int:
        """Write the records of this scope and beneath, with their histories, as JSON lines; returns how many.

        With ``vectors`` whoever loads the file with the same embedder need not embed them again.
        """
        return run(local(transfer.export, self._engine, self._scope, path, vectors=bool(vectors)))

    def load(
        self,
        path: str | os.PathLike[str],
        format: Literal["auto", "agentmem", "mem0", "chatgpt", "jsonl"] = "auto",
    ) -> int:
        """Bring in an export of agentmem, a local store of mem0, ChatGPT's export (its folder or
        ``conversations.json``), or JSON lines (``{"text", "role"?, "name"?, "at"?, "metadata"?, "id"?, "user"?,
        "agent"?, "session"?}``); returns how many records were new. All or nothing. The forgotten stay away, and
        loading twice adds nothing.

        Raises `InvalidInput` for a line that can't be understood, `ScopeError` for what belongs outside this scope.
        """
        return run(transfer.load(self._engine, self._scope, path, format))

    @property
    def plaintext(self) -> Plaintext:
        """The records and their index, directly."""
        return Plaintext(self._engine, self._scope)

    @property
    def activation(self) -> Activation:
        """The KV pages, directly."""
        return Activation(self._engine, self._scope, self._conversation)

    @property
    def parametric(self) -> Parametric:
        """The LoRA versions, directly."""
        return Parametric(self._engine, self._scope)


class Memory(ScopedMemory):
    """An agent's memory in one folder. The root handle: it sees every scope.

    ``path`` is the folder (default ``./memory``; ``":memory:"`` keeps nothing). ``model`` is ``"scheme:name"``
    (``"local"``, ``"openai:…"``, ``"anthropic:…"``, ``"ollama:…"``, ``"llamacpp:…"``) or a `Provider`; without one
    every verb but ``chat`` and training works. ``embedder`` likewise, ``"none"`` for search by words alone. Further
    settings by keyword, environment or ``agentmem.toml`` (config.py).

    Raises `ConfigError` for wrong settings, `MissingDependency` for a package that is not installed, `StoreError` for a
    folder that can't be used. Close it, or use it in a ``with`` block.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        model: str | Provider | None = None,
        embedder: str | Embedder | None = None,
        config: str | os.PathLike[str] | None = None,
        clock: Callable[[], float] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(
            opened(path=path, model=model, embedder=embedder, config=config, clock=clock, settings=settings),
            Scope(),
        )
        self._background = Background.started(self._engine)

    @classmethod
    def from_config(cls, config: str | os.PathLike[str]) -> Self:
        """A memory with the settings of a TOML file."""
        return cls(config=config)

    def verify(self) -> Verification:
        """Check every record, vector, KV page, saved slot and LoRA version against its checksum."""
        return run(local(flows.verify, self._engine))

    def compact(self) -> Compaction:
        """Give back the room of what was deleted or replaced, in the database, its log, the index and old backups.

        Needs free room of the database's size for a while. Others may use the folder meanwhile; where a reader keeps
        the log from being emptied, the result says so.
        """
        return run(local(flows.compact, self._engine))

    def pause_consolidation(self) -> None:
        """Let no process consolidate this folder in the background until `resume_consolidation`."""
        run(local(Jobs(self._engine.database, self._engine.clock).pause))

    def resume_consolidation(self) -> None:
        """Let processes that were told to consolidate in the background go on."""
        run(local(Jobs(self._engine.database, self._engine.clock).resume))

    def close(self) -> None:
        """Write the index to disk and close everything; safe to call twice. Handles of this memory close with it.

        What is consolidated in the background ends first, within a step of its work.
        """
        if self._background is not None:
            self._background.close()
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
