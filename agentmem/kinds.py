"""Verbs over the KV pages of a scope: list, pin, evict, swap, save, restore.

Plain functions over the engine; the two faces (memory.py, async_memory.py) run them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .engine import Engine
from .errors import InvalidInput, NotFound, ScopeError
from .plaintext.drafts import check_path, check_scope, shown
from .provider import HoldsSlots
from .types import Scope

if TYPE_CHECKING:
    from .activation.store import PageEntry
    from .activation.swapping import Swapped

__all__ = [
    "beneath",
    "entries",
    "evict",
    "listed",
    "pin",
    "restore",
    "save",
    "swap_in",
    "swap_out",
]


# ---- activation ----------------------------------------------------------------------------------------------------


def entries(engine: Engine, scope: Scope) -> list[PageEntry]:
    """The pages made from records of this scope and beneath; on the root handle all of them."""
    if scope == Scope():
        return engine.pages.entries()
    mine = engine.records.ids(scope)
    # A page of the root handle's chats may hold records of several users: each sees only their own named.
    return [
        entry.model_copy(update={"records": tuple(record for record in entry.records if record in mine)})
        for entry in engine.pages.entries()
        if mine.intersection(entry.records)
    ]


def pin(engine: Engine, scope: Scope, keys: Sequence[str] | None, *, pinned: bool) -> int:
    """Pin or unpin these pages (default: all of the scope): a pinned page is never evicted to make room."""
    wanted = _keys(engine, scope, keys)
    engine.pages.pin(wanted, bool(pinned))
    return len(wanted)


def evict(engine: Engine, scope: Scope, keys: Sequence[str] | None) -> int:
    """Delete these pages (default: all of the scope). Nothing is lost but the time to compute them again."""
    return engine.pages.evict(_keys(engine, scope, keys))


def swap_out(engine: Engine, scope: Scope, keys: Sequence[str] | None) -> Swapped:
    """Let these pages (default: all of the scope) leave the RAM; their files stay."""
    if keys is None and isinstance(engine.provider, HoldsSlots) and engine.provider.capabilities.kv == "tensors":
        engine.provider.erase_slots()  # what live conversations hold behind their pages
    return engine.pages.swap_out(_keys(engine, scope, keys))


def swap_in(engine: Engine, scope: Scope, keys: Sequence[str] | None) -> Swapped:
    """Bring these pages (default: all of the scope) and those before them into RAM, as far as the budget lets them."""
    return engine.pages.swap_in(_keys(engine, scope, keys))


def _keys(engine: Engine, scope: Scope, keys: Sequence[str] | None) -> list[str]:
    mine = [entry.key for entry in entries(engine, scope)]
    if keys is None:
        return mine
    wanted = listed(keys, "keys")
    for key in wanted:
        if key not in mine:
            raise NotFound(f"no KV page {shown(key)} in {scope}")
    return wanted


def listed(values: Any, what: str) -> list[Any]:
    """A caller's list as one; a single str is a list of one."""
    if isinstance(values, str):
        return [values]
    if not isinstance(values, Iterable):
        raise InvalidInput(f"{what} is a {type(values).__name__}: give a list")
    return list(values)


def save(engine: Engine, scope: Scope, path: str | os.PathLike[str]) -> int:
    """Copy all pages and their lineage into a new folder; returns how many."""
    _whole(scope)
    return engine.pages.save(check_path(path))


def restore(engine: Engine, scope: Scope, path: str | os.PathLike[str]) -> int:
    """Bring saved pages back; those whose records are unknown or were forgotten here are passed over."""
    _whole(scope)
    return engine.pages.restore(check_path(path))


def _whole(scope: Scope) -> None:
    if scope != Scope():
        # The pages of a prompt's head serve every scope beneath them: a part of the store can't be cut out.
        raise ScopeError(f"KV pages are saved and restored for the whole folder, not for {scope}: use the root handle")


def beneath(scope: Scope, other: Any) -> Scope:
    """The scope that a call on a handle means: its own, or a narrower one given as `Scope` or handle."""
    if other is None:
        return scope
    wanted = getattr(other, "_scope", other)
    if not isinstance(wanted, Scope):
        raise ScopeError(f"the scope is a {type(other).__name__}: give a handle made by scope(), or a Scope")
    if not wanted.within(scope):
        raise ScopeError(f"{wanted} lies outside this handle's scope ({scope})")
    return check_scope(wanted)
