"""The door under asyncio: `AsyncMemory` has the verbs of `Memory`, awaited.

The same flows, run by the async driver: providers are awaited, local work (SQLite, FAISS) runs in worker threads. A
test holds the two faces' signatures against each other; docstrings are those of `Memory` and its handles.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from . import chat as chats
from . import consolidate as consolidating
from . import (
    counting,
    explaining,
    flows,
    forgetting,
    histories,
    memory,
    reporting,
    transfer,
)
from .asking import Schema
from .async_handles import AsyncActivation, AsyncParametric, AsyncPlaintext, documented
from .background import Background
from .chat import Conversation
from .engine import Engine
from .explaining import Explanation
from .flow import arun, local
from .flows import When
from .jobs import Jobs
from .ledger.budgets import Budget, Spent
from .ledger.report import Report
from .memory import Content
from .opening import NOT_GIVEN, narrowed, opened
from .planner.values import ConsolidationPlan
from .provider import Provider
from .reply_stream import AsyncReplyStream
from .types import (
    Change,
    Compaction,
    Context,
    Erasure,
    Hit,
    Record,
    Reply,
    Scope,
    TokenCount,
    Verification,
)

if TYPE_CHECKING:
    from .plaintext.embed import Embedder

__all__ = ["AsyncMemory", "AsyncScopedMemory"]


@documented(memory)
class AsyncScopedMemory:
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
    ) -> AsyncScopedMemory:
        return AsyncScopedMemory(
            self._engine, narrowed(self._scope, tenant=tenant, user=user, agent=agent, session=session)
        )

    async def add(
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
        return await arun(
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

    async def search(
        self, query: str, *, k: int = 10, where: Mapping[str, Any] | None = None, at: When = None, explain: bool = False
    ) -> builtins.list[Hit]:
        return await arun(flows.search(self._engine, self._scope, query, k=k, where=where, at=at, explain=explain))

    async def get(self, id: str) -> Record:
        return await arun(local(self._engine.records.get, id, self._scope))

    async def list(
        self, where: Mapping[str, Any] | None = None, limit: int = 100, after: str | None = None
    ) -> builtins.list[Record]:
        return await arun(local(self._engine.records.list, self._scope, where, limit, after))

    async def update(self, id: str, text: str | None = None, metadata: Mapping[str, Any] | None = None) -> Record:
        return await arun(flows.update(self._engine, self._scope, id, text=text, metadata=metadata))

    @overload
    async def history(self, id: str) -> builtins.list[Record]: ...

    @overload
    async def history(self, *, about: str) -> builtins.list[Change]: ...

    async def history(
        self, id: str | None = None, *, about: str | None = None
    ) -> builtins.list[Record] | builtins.list[Change]:
        return await arun(histories.history(self._engine, self._scope, id, about=about))

    async def explain(self, record: str | Record | Hit) -> Explanation:
        return await arun(local(explaining.explain, self._engine, self._scope, record))

    async def forget(
        self,
        ids: str | Sequence[str] | None = None,
        *,
        where: Mapping[str, Any] | None = None,
        everything: bool = False,
        dry_run: bool = False,
    ) -> Erasure:
        return await arun(
            local(
                forgetting.forget, self._engine, self._scope, ids, where=where, everything=everything, dry_run=dry_run
            )
        )

    async def context(self, query: str | None = None, *, max_tokens: int = 500) -> Context:
        return await arun(flows.context(self._engine, self._scope, query, max_tokens=max_tokens))

    @overload
    async def chat(
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
    async def chat(
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
    ) -> AsyncReplyStream: ...

    @overload
    async def chat(
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
    ) -> Reply | AsyncReplyStream: ...

    async def chat(
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
    ) -> Reply | AsyncReplyStream:
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
        return AsyncReplyStream(flow) if stream else await arun(flow)

    async def count_tokens(
        self,
        content: Content,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        exact: bool = False,
    ) -> TokenCount:
        return await arun(counting.count_tokens(self._engine, content, system=system, tools=tools, exact=exact))

    async def report(self, *, since: When = None, until: When = None) -> Report:
        return await arun(local(reporting.report, self._engine, self._scope, since=since, until=until))

    async def budget(
        self,
        dollars: float | None,
        *,
        per: Literal["day", "month", "ever"] = "day",
        action: Literal["stop", "warn"] = "stop",
    ) -> Budget | None:
        return await arun(local(reporting.budget, self._engine, self._scope, dollars, per=per, action=action))

    async def spent(self) -> Spent:
        return await arun(local(reporting.spent, self._engine, self._scope))

    async def consolidate(
        self, *, dry_run: bool = False, budget: Mapping[str, float] | None = None
    ) -> ConsolidationPlan:
        return await arun(consolidating.consolidate(self._engine, self._scope, dry_run=dry_run, budget=budget))

    async def export(self, path: str | os.PathLike[str], *, vectors: bool = False) -> int:
        return await arun(local(transfer.export, self._engine, self._scope, path, vectors=bool(vectors)))

    async def load(
        self,
        path: str | os.PathLike[str],
        format: Literal["auto", "agentmem", "mem0", "chatgpt", "jsonl"] = "auto",
    ) -> int:
        return await arun(transfer.load(self._engine, self._scope, path, format))

    @property
    def plaintext(self) -> AsyncPlaintext:
        return AsyncPlaintext(self._engine, self._scope)

    @property
    def activation(self) -> AsyncActivation:
        return AsyncActivation(self._engine, self._scope, self._conversation)

    @property
    def parametric(self) -> AsyncParametric:
        return AsyncParametric(self._engine, self._scope)


@documented(memory)
class AsyncMemory(AsyncScopedMemory):
    """An agent's memory in one folder. The root handle: it sees every scope.

    ``path`` is the folder (default ``./memory``; ``":memory:"`` keeps nothing). ``model`` is ``"scheme:name"``
    (``"local"``, ``"openai:…"``, ``"anthropic:…"``, ``"ollama:…"``, ``"llamacpp:…"``) or a `Provider`; without one
    every verb but ``chat`` and training works. ``embedder`` likewise, ``"none"`` for search by words alone. Further
    settings by keyword, environment or ``agentmem.toml`` (config.py).

    Raises `ConfigError` for wrong settings, `MissingDependency` for a package that is not installed, `StoreError` for a
    folder that can't be used. Close it, or use it in an ``async with`` block.
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
        return cls(config=config)

    async def verify(self) -> Verification:
        return await arun(local(flows.verify, self._engine))

    async def compact(self) -> Compaction:
        return await arun(local(flows.compact, self._engine))

    async def pause_consolidation(self) -> None:
        await arun(local(Jobs(self._engine.database, self._engine.clock).pause))

    async def resume_consolidation(self) -> None:
        await arun(local(Jobs(self._engine.database, self._engine.clock).resume))

    async def close(self) -> None:
        if self._background is not None:
            await arun(local(self._background.close))
        await arun(local(self._engine.close))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
