"""LoRA versions as verbs: train, gate, activate, retrain, export, over the engine's registry and its local model.

Orders corpus, training, gate and registry; knows nothing of tensors and nothing of files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .engine import Engine
from .errors import ConfigError, InvalidInput
from .kinds import listed
from .plaintext.drafts import check_path, shown
from .progress import progress
from .types import Record, Scope, Usage

if TYPE_CHECKING:
    from .parametric.registry import LoraVersion

_log = logging.getLogger("agentmem")

__all__ = ["activate", "export", "rollback", "train"]


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
        ids = [record.id if isinstance(record, Record) else record for record in listed(records, "records")]
        chosen = [engine.records.get(record, scope) for record in ids]
    # Somebody looked at these and answers for them; the records themselves stay marked.
    named = [record.id if isinstance(record, Record) else record for record in listed(approve, "approve")]
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
