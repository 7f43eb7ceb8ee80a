"""The verbs on LoRA versions: train, retrain, activate, roll back, export.

Chooses the records, orders shards and activation; how one shard is taught stands in teaching.py, how one that lost a
record is trained again in retraining.py. Knows nothing of tensors and nothing of files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import retraining
from .engine import Engine
from .errors import InvalidInput, TrainingError
from .flow import Flow, Work
from .forgetting import drop_derived
from .kinds import listed
from .plaintext.drafts import check_path, shown
from .publishing import base_config, withdraw
from .teaching import Run, Stop, contradicted, corpus_of, learn, model_of, owned, standing, thresholds_of
from .types import Record, Retraining, Scope

if TYPE_CHECKING:
    from .parametric.corpus import Corpus
    from .parametric.registry import LoraVersion

_log = logging.getLogger("agentmem")

__all__ = ["activate", "export", "receipts", "retrain", "rollback", "train"]


def train(
    engine: Engine,
    scope: Scope,
    records: Sequence[str | Record] | None,
    *,
    seed: int,
    epochs: int | None,
    activate: bool,
    approve: Sequence[str | Record] = (),
    ram_budget: int | None = None,
) -> Flow[LoraVersion]:
    """Teach records of this scope to new LoRA versions; see `Parametric.train`."""
    _whole(seed, "seed", 0)
    if epochs is not None:
        _whole(epochs, "epochs", 1)
    if ram_budget is not None:
        _whole(ram_budget, "ram_budget", 1)
    named = None if records is None else _ids(records, "records")
    approved = _ids(approve, "approve")
    how = Run(seed=seed, epochs=epochs, ram_budget=ram_budget)

    def work(stop: Stop) -> LoraVersion:
        return _train(engine, scope, named, how, activate=activate, approved=approved, stop=stop)

    version: LoraVersion = yield Work(work)
    return version


def retrain(engine: Engine, scope: Scope) -> Flow[list[Retraining]]:
    """Train the shards again that lost a record; see `Parametric.retrain`."""

    def work(stop: Stop) -> list[Retraining]:
        withdraw(engine, [])  # what ended by itself, or was forgotten by a process that died before it told the engine
        if not retraining.queued(engine, scope):
            return []
        return retraining.retrain(engine, model_of(engine), scope, stop)

    done: list[Retraining] = yield Work(work)
    return done


def receipts(engine: Engine, scope: Scope) -> list[Retraining]:
    """What became of the versions of this scope that learnt a record which was forgotten or changed, newest first."""
    return retraining.receipts(engine, scope)


def _whole(number: Any, name: str, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number < 2**63:
        raise InvalidInput(f"{name} is {shown(number)}: give a whole number of at least {least}")


def _ids(records: Any, what: str) -> list[Any]:
    return [record.id if isinstance(record, Record) else record for record in listed(records, what)]


def _train(
    engine: Engine,
    scope: Scope,
    named: list[Any] | None,
    how: Run,
    *,
    activate: bool,
    approved: list[Any],
    stop: Stop,
) -> LoraVersion:
    thresholds_of(engine)  # a wrong setting is told before anything is computed
    if not engine.chat_provider().capabilities.trains:
        model_of(engine)  # says which providers show their weights
    wanted = [] if named is None else [engine.records.get(id_, scope) for id_ in named]
    trusted = {engine.records.get(id_, scope).id for id_ in approved}
    redone: list[Retraining] = []
    if named is None:
        wanted, redone = _not_learnt(engine, scope, trusted, stop)
    _refuse_strange(trusted, wanted)
    chosen = [r.model_copy(update={"trust": "trusted"}) if r.id in trusted else r for r in wanted]
    plan = [(whose, mine, corpus_of(engine, whose, mine)) for whose, mine in owned(chosen, scope).items()]
    if not any(corpus.examples for _, _, corpus in plan):
        if again := [proof.version for proof in redone if proof.version]:
            return engine.registry.get(again[-1], scope)
        if not plan:
            raise InvalidInput(f"no records to learn in {scope}: add some first, or name those to learn again")
        raise InvalidInput(f"none of these {len(chosen)} records can be learnt ({_why(plan, 3)})")
    if left := sum(len(corpus.left_out) for _, _, corpus in plan):
        _log.warning("%d of %d records are not learnt (%s)", left, len(chosen), _why(plan, 20))
    versions: list[LoraVersion] = []
    for whose, mine, corpus in plan:
        versions += _taught(engine, whose, mine, corpus, how, activate=activate, keep=versions, stop=stop)
    first = engine.registry.get(versions[0].digest, scope)
    return first.model_copy(update={"shards": tuple(version.name for version in versions)})


def _not_learnt(engine: Engine, scope: Scope, trusted: set[str], stop: Stop) -> tuple[list[Record], list[Retraining]]:
    """The records of this scope that no active version of their owner learnt on this base; before, what is outdated is
    taken back and what waits to be learnt again is."""

    def acting(whose: Scope, base: str | None = None) -> set[str]:
        active = engine.registry.active(whose)
        return {record for version in active if base in (None, version.identity) for record in version.records}

    held = owned(standing(engine, scope), scope)
    outdated: set[str] = set()
    learnt: set[str] = set()
    for whose, records in held.items():
        learnt |= (mine := acting(whose))
        outdated |= contradicted(records, mine | trusted)
    if outdated & learnt:
        drop_derived(engine, sorted(outdated & learnt), pages=False)
        engine.finish_erasures()
    withdraw(engine, [])
    redone = retraining.retrain(engine, model_of(engine), scope, stop) if retraining.queued(engine, scope) else []
    wanted: list[Record] = []
    for whose, records in held.items():
        mine = acting(whose)
        if mine:  # what another base learnt, this one can't answer with
            mine = acting(whose, model_of(engine).identity.hex())
        wanted += [record for record in records if record.id not in mine | outdated]
    return wanted, redone


def _why(plan: Sequence[tuple[Scope, list[Record], Corpus]], most: int) -> str:
    left = [f"{record}: {reason}" for _, _, corpus in plan for record, reason in corpus.left_out]
    return "; ".join(left[:most])


def _taught(
    engine: Engine,
    scope: Scope,
    records: Sequence[Record],
    corpus: Corpus,
    how: Run,
    *,
    activate: bool,
    keep: Sequence[LoraVersion],
    stop: Stop,
) -> list[LoraVersion]:
    """Versions of this scope, a shard each, that learnt what ``corpus`` holds of its records."""
    from .parametric.shards import shards

    tensors = model_of(engine)
    active = [v for v in engine.registry.active(scope) if v.identity == tensors.identity.hex()]
    replaced = [v for v in active if _taught_again(engine, v, corpus)]
    beside = [v for v in active if v not in replaced]
    parts = shards(corpus, records, engine.settings.lora_shard)
    versions: list[LoraVersion] = []
    for number, part in enumerate(parts, 1):
        version = learn(
            engine,
            tensors,
            scope,
            replace(corpus_of(engine, scope, part, tensors), left_out=corpus.left_out),
            how,
            parents=[v for v in replaced if set(v.records) & {record.id for record in part}],
            beside=[*beside, *versions],
            keep=[v.digest for v in (*keep, *active, *versions)],
            stop=stop,
            label="learning" if len(parts) == 1 else f"learning {number} of {len(parts)}",
        )
        versions.append(version)
    if activate:
        _activate(engine, scope, versions, replaced)
    return versions


def _activate(engine: Engine, scope: Scope, versions: Sequence[LoraVersion], replaced: Sequence[LoraVersion]) -> None:
    """Those that passed act from now on, beside what is active and in the place of what they learnt anew."""
    ready = {version.digest for version in versions if version.gate.passed}
    for version in versions:
        if version.digest not in ready:
            _log.warning("%s is not active: %s", version.name, version.gate)
    if not ready:
        return
    # One that they were to replace goes only when all that they learnt of its records is in versions that passed.
    held = {record for version in versions if version.digest in ready for record in version.records}
    lost = {record for version in versions for record in version.records} - held
    with engine.database.write():
        gone = {version.digest for version in replaced if lost.isdisjoint(version.records)}
        engine.registry.join([v.digest for v in versions if v.digest in ready], scope, instead_of=gone)


def _taught_again(engine: Engine, version: LoraVersion, corpus: Corpus) -> bool:
    """Whether ``corpus`` teaches all that this version learnt. The user's own past questions that it learnt wordings
    from teach nothing by themselves, and others may be asked by now."""
    from .parametric import corpus as corpora

    left = set(version.records) - set(corpus.records)
    if left == set(version.records):
        return False
    records = engine.records.named(sorted(left), Scope())
    return not any(corpora.build([record.model_copy(update={"trust": "trusted"})]).records for record in records)


def _refuse_strange(approved: set[str], chosen: Sequence[Record]) -> None:
    # Somebody looked at these and answers for them; the records themselves stay marked.
    if strange := approved - {record.id for record in chosen}:
        raise InvalidInput(f"approve names {min(strange)}, which is not among the records to learn: name it there too")


def activate(
    engine: Engine, scope: Scope, versions: Sequence[str | LoraVersion | None], *, force: bool
) -> tuple[LoraVersion, ...]:
    """Answer with exactly these versions in this scope from the next request on; none of them is the base model."""
    named = [_named(version) for version in versions if version is not None]
    return engine.registry.activate(named, scope, force=bool(force))


def rollback(engine: Engine, scope: Scope) -> tuple[LoraVersion, ...]:
    """Go back to what was active in this scope before the last activation; returns it, empty for the base model."""
    return engine.registry.rollback(scope)


def export(
    engine: Engine, scope: Scope, version: str | LoraVersion, path: str | os.PathLike[str], *, format: str
) -> Path:
    """Write a version of this scope in a form that other engines read; see `Parametric.export`."""
    from .parametric.export import FORMATS, export_gguf, export_peft

    if format not in FORMATS:
        raise InvalidInput(f"format is {shown(format)}: give one of {', '.join(FORMATS)}")
    target = check_path(path)
    found = engine.registry.get(_named(version), scope)
    if found.state == "retired":
        raise TrainingError(f"{found.name} is retired, a record it learnt is gone: train a new version")
    ref = engine.registry.ref(found)
    return export_peft([ref], target) if format == "peft" else export_gguf([ref], target, base_config(engine, found))


def _named(version: Any) -> str:
    name = getattr(version, "digest", version)
    if not isinstance(name, str) or not name:
        raise InvalidInput(f"the LoRA version is {shown(version)}: give a version, its name or its digest")
    return name
