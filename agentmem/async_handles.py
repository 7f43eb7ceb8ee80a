"""The direct handles under asyncio: the verbs of handles.py, awaited.

Each verb is a flow run by the async driver; what it does is in the module of its kind. Docstrings are those of the
handles that block.
"""
# ruff: noqa: D102 - docstrings are taken from handles.py

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from . import chat as chats
from . import distilling, extraction, flows, handles, kinds, learning, publishing, reconciling, reembedding
from .chat import Conversation
from .engine import Engine
from .flow import arun, local
from .publishing import Publication
from .types import Extraction, Reconciliation, Record, Retraining, Scope, Usage

if TYPE_CHECKING:
    from .activation.store import PageEntry
    from .activation.swapping import Swapped
    from .async_memory import AsyncScopedMemory
    from .parametric.prefix_gate import TrainedPrefix
    from .parametric.registry import LoraVersion

__all__ = ["AsyncActivation", "AsyncParametric", "AsyncPlaintext", "documented"]

C = TypeVar("C", bound=type)


def documented(blocking: ModuleType) -> Callable[[C], C]:
    """Take the docstrings of the ``blocking`` module's class of the same name: what a verb promises is written once."""

    def take(cls: C) -> C:
        twin = getattr(blocking, cls.__name__.removeprefix("Async"))
        for name, member in vars(cls).items():
            function = getattr(member, "__func__", member)  # a classmethod's docstring lies in its function
            if not name.startswith("_") and not function.__doc__:
                function.__doc__ = getattr(twin, name).__doc__
        return cls

    return take


@documented(handles)
class AsyncPlaintext:
    """Direct handle: records and their index."""

    def __init__(self, engine: Engine, scope: Scope) -> None:
        self._engine = engine
        self._scope = scope

    async def count(self) -> int:
        return await arun(local(self._engine.records.count, self._scope))

    async def around(self, id: str, *, before: int = 2, after: int = 2) -> builtins.list[Record]:
        return await arun(local(self._engine.records.around, id, self._scope, before=before, after=after))

    async def embed(self) -> int:
        return await arun(flows.catch_up(self._engine))

    async def reembed(self) -> int:
        return await arun(reembedding.reembed(self._engine))

    async def extract(
        self,
        *,
        kinds: Sequence[Literal["fact", "preference", "summary"]] = ("fact", "preference"),
        limit: int | None = None,
        retry: bool = False,
    ) -> Extraction:
        return await arun(extraction.extract(self._engine, self._scope, kinds=kinds, limit=limit, retry=bool(retry)))

    async def reconcile(self, *, where: Mapping[str, Any] | None = None, limit: int | None = None) -> Reconciliation:
        return await arun(reconciling.reconcile(self._engine, self._scope, where=where, limit=limit))


@documented(handles)
class AsyncActivation:
    """Direct handle: KV pages. A page holds the model's states of one step of the token grid."""

    def __init__(self, engine: Engine, scope: Scope, conversation: Conversation) -> None:
        self._engine = engine
        self._scope = scope
        self._conversation = conversation

    async def prime(self, *, system: str | None = None, parallel: int | None = None) -> Usage:
        return await arun(chats.prime(self._engine, self._conversation, system=system, parallel=parallel))

    async def warm_every(self, idle_s: float) -> float | None:
        return await arun(local(chats.warm_every, self._engine, self._conversation, idle_s))

    async def entries(self) -> builtins.list[PageEntry]:
        return await arun(local(kinds.entries, self._engine, self._scope))

    async def pin(self, keys: Sequence[str] | None = None, *, pinned: bool = True) -> int:
        return await arun(local(kinds.pin, self._engine, self._scope, keys, pinned=pinned))

    async def evict(self, keys: Sequence[str] | None = None) -> int:
        return await arun(local(kinds.evict, self._engine, self._scope, keys))

    async def swap_out(self, keys: Sequence[str] | None = None) -> Swapped:
        return await arun(local(kinds.swap_out, self._engine, self._scope, keys))

    async def swap_in(self, keys: Sequence[str] | None = None) -> Swapped:
        return await arun(local(kinds.swap_in, self._engine, self._scope, keys))

    async def save(self, path: str | os.PathLike[str]) -> int:
        return await arun(local(kinds.save, self._engine, self._scope, path))

    async def restore(self, path: str | os.PathLike[str]) -> int:
        return await arun(local(kinds.restore, self._engine, self._scope, path))


@documented(handles)
class AsyncParametric:
    """Direct handle: LoRA versions trained from records. Local models only."""

    def __init__(self, engine: Engine, scope: Scope) -> None:
        self._engine = engine
        self._scope = scope

    async def train(
        self,
        scope: Scope | AsyncScopedMemory | None = None,
        records: Sequence[str | Record] | None = None,
        *,
        seed: int = 0,
        epochs: int | None = None,
        activate: bool = True,
        approve: Sequence[str | Record] = (),
        ram_budget: int | None = None,
    ) -> LoraVersion:
        return await arun(
            learning.train(
                self._engine,
                kinds.beneath(self._scope, scope),
                records,
                seed=seed,
                epochs=epochs,
                activate=activate,
                approve=approve,
                ram_budget=ram_budget,
            )
        )

    async def versions(self) -> builtins.list[LoraVersion]:
        return await arun(local(self._engine.registry.versions, self._scope))

    async def active(self) -> tuple[LoraVersion, ...]:
        return await arun(local(self._engine.registry.active, self._scope))

    async def activate(self, *versions: str | LoraVersion | None, force: bool = False) -> tuple[LoraVersion, ...]:
        return await arun(local(learning.activate, self._engine, self._scope, versions, force=force))

    async def rollback(self) -> tuple[LoraVersion, ...]:
        return await arun(local(learning.rollback, self._engine, self._scope))

    async def retrain(self) -> builtins.list[Retraining]:
        return await arun(learning.retrain(self._engine, self._scope))

    async def receipts(self) -> builtins.list[Retraining]:
        return await arun(local(learning.receipts, self._engine, self._scope))

    async def export(
        self, version: str | LoraVersion, path: str | os.PathLike[str], *, format: Literal["peft", "gguf"] = "peft"
    ) -> Path:
        return await arun(local(learning.export, self._engine, self._scope, version, path, format=format))

    async def publish(
        self, version: str | LoraVersion | Sequence[str | LoraVersion] | None = None, to: str | None = None
    ) -> Publication:
        return await arun(local(publishing.publish, self._engine, self._scope, version, to))

    async def unpublish(self, version: str | LoraVersion, to: str | None = None) -> tuple[str, ...]:
        return await arun(local(publishing.unpublish, self._engine, self._scope, version, to))

    async def distil(self, *, tokens: int | None = None, system: str | None = None, seed: int = 0) -> TrainedPrefix:
        return await arun(distilling.distil(self._engine, self._scope, tokens=tokens, system=system, seed=seed))

    async def prefixes(self) -> builtins.list[TrainedPrefix]:
        return await arun(local(distilling.prefixes, self._engine, self._scope))

    async def drop_prefix(self, prefix: str | TrainedPrefix) -> None:
        return await arun(local(distilling.drop_prefix, self._engine, self._scope, prefix))
