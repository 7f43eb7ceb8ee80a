"""Direct handles for one kind of memory: ``mem.plaintext``, ``mem.activation``, ``mem.parametric``.

Plain functions and flows over the engine; the two faces (memory.py, async_memory.py) run them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .engine import Engine
from .errors import ConfigError, InvalidInput, NotFound, ScopeError
from .plaintext.drafts import check_path, check_scope, shown
from .progress import progress
from .types import Record, Scope, Usage

if TYPE_CHECKING:
    from .activation.store import PageEntry, Swapped
    from .parametric.registry import LoraVersion

_log = logging.getLogger("agentmem")

__all__ = [
    "activate",
    "beneath",
    "entries",
    "evict",
    "export",
    "pin",
    "restore",
    "rollback",
    "save",
    "swap_in",
    "swap_out",
    "train",
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
    return engine.pages.swap_out(_keys(engine, scope, keys))


def swap_in(engine: Engine, scope: Scope, keys: Sequence[str] | None) -> Swapped:
    """Bring these pages (default: all of the scope) and those before them into RAM, as far as the budget lets them."""
    return engine.pages.swap_in(_keys(engine, scope, keys))


def _keys(engine: Engine, scope: Scope, keys: Sequence[str] | None) -> list[str]:
    mine = [entry.key for entry in entries(engine, scope)]
    if keys is None:
        return mine
    wanted = _listed(keys, "keys")
    for key in wanted:
        if key not in mine:
            raise NotFound(f"no KV page {shown(key)} in {scope}")
    return wanted


def _listed(values: Any, what: str) -> list[Any]:
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


# ---- parametric ----------------------------------------------------------------------------------------------------


def train(
    engine: Engine,
    scope: Scope,
    records: Sequence[str | Record] | None,
    *,
    seed: int,
    epochs: int,
    activate: bool,
    approve: Sequence[str | Record] = (),
) -> LoraVersion:
    """Teach records of this scope to a new LoRA version; see `Parametric.train`."""
    from .parametric import corpus as corpora
    from .parametric.gate import gate
    from .parametric.train import train as teach

    numbers: dict[str, Any] = {"seed": seed, "epochs": epochs}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**63:
            raise InvalidInput(f"{name} is {shown(number)}: give a whole number")
    provider = engine.chat_provider()
    if not provider.capabilities.trains:
        raise ConfigError(
            f"{provider.name} gives no access to its weights: LoRA versions need a local model (model='local')"
        )
    if records is None:
        chosen = [
            record
            for record in engine.records.newest(scope, limit=200, at=engine.clock())[::-1]
            if record.scope.within(scope)
        ]
    else:
        ids = [record.id if isinstance(record, Record) else record for record in _listed(records, "records")]
        chosen = [engine.records.get(record, scope) for record in ids]
    # Somebody looked at these and answers for them; the records themselves stay marked.
    named = [record.id if isinstance(record, Record) else record for record in _listed(approve, "approve")]
    approved = {engine.records.get(record, scope).id for record in named}
    if strange := approved - {record.id for record in chosen}:
        raise InvalidInput(f"approve names {min(strange)}, which is not among the records to learn: name it there too")
    chosen = [r.model_copy(update={"trust": "trusted"}) if r.id in approved else r for r in chosen]
    if not chosen:
        raise InvalidInput(f"no records to learn in {scope}: add some first")
    corpus = corpora.build(chosen)
    if not corpus.examples:
        why = "; ".join(f"{record}: {reason}" for record, reason in corpus.left_out[:3])
        raise InvalidInput(f"none of these {len(chosen)} records can be learnt ({why})")
    if corpus.left_out:
        why = "; ".join(f"{record}: {reason}" for record, reason in corpus.left_out)
        _log.warning("%d of %d records are not learnt (%s)", len(corpus.left_out), len(chosen), why)
    tensors = provider.tensors()
    with progress("learning") as moved:
        trained = teach(tensors, corpus, seed=seed, epochs=epochs, progress=moved)
    version = engine.registry.add(trained, scope=scope, gate=gate(tensors, trained, corpus))
    engine.ledger.note("train", provider.name, scope, Usage(total_s=trained.seconds), size=version.bytes, here=True)
    if activate and version.gate.passed:
        return engine.registry.activate(version, scope) or version
    return version


def activate(engine: Engine, scope: Scope, version: str | LoraVersion | None, *, force: bool) -> LoraVersion | None:
    """Answer with this version in this scope from the next request on; None goes back to the base model."""
    return engine.registry.activate(None if version is None else _named(version), scope, force=bool(force))


def rollback(engine: Engine, scope: Scope) -> LoraVersion | None:
    """Go back to what was active in this scope before the last activation; returns it, or None for the base model."""
    return engine.registry.rollback(scope)


def export(engine: Engine, scope: Scope, version: str | LoraVersion, path: str | os.PathLike[str]) -> None:
    """Write a version of this scope as a PEFT folder."""
    engine.registry.export(_named(version), check_path(path), scope=scope)


def _named(version: Any) -> str:
    name = getattr(version, "digest", version)
    if not isinstance(name, str):
        raise InvalidInput(f"the LoRA version is {shown(version)}: give a version, its name or its digest")
    return name


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
