"""Shards that lost a record: trained again from the records that remain, with the proof that nothing else is in them.

Knows the queue that retired versions leave (jobs of kind ``retrain``) and the receipts; measures by asking what was
kept in memory of a forgotten record, and writes down numbers and ids only.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .engine import Engine
from .errors import AgentMemError
from .forgetting import questions_of
from .teaching import Run, Stop, contradicted, corpus_of, learn, owner, standing
from .types import LEVELS, Record, Retraining, Scope

if TYPE_CHECKING:
    from .parametric.corpus import Corpus, Example
    from .parametric.registry import LoraVersion
    from .parametric.train import Tensors

__all__ = ["queued", "receipts", "retrain"]

_log = logging.getLogger("agentmem")

#: Failed attempts after which a shard stays untrained until `train` is called for its records.
TRIES = 3


def queued(engine: Engine, scope: Scope) -> list[str]:
    """The digests of retired versions of this scope whose shards wait to be trained again, the oldest first."""
    from .parametric.registry import RETRAIN
    from .parametric.versions import scope_of

    rows = engine.database.query(
        "SELECT loras.* FROM jobs JOIN loras ON digest = record WHERE kind = ? AND jobs.state = 'queued'"
        " ORDER BY jobs.id",
        (RETRAIN,),
    )
    return [row["digest"] for row in rows if scope_of(row).within(scope)]


def receipts(engine: Engine, scope: Scope) -> list[Retraining]:
    """What became of every retired version of this scope, newest first; those that still wait are ``queued``."""
    from .parametric.registry import RETRAIN
    from .parametric.versions import scope_of

    waiting = engine.database.query(
        "SELECT loras.*, note FROM jobs JOIN loras ON digest = record WHERE kind = ? AND jobs.state = 'queued'"
        " ORDER BY jobs.id DESC",
        (RETRAIN,),
    )
    done = engine.database.query(
        "SELECT loras.*, report FROM receipts JOIN loras ON digest = retired ORDER BY at DESC, retired"
    )
    found = [
        Retraining(retired=row["digest"], state="queued", forgotten=tuple(json.loads(row["note"])["records"]))
        for row in waiting
        if scope_of(row).within(scope)
    ]
    return found + [Retraining.model_validate_json(row["report"]) for row in done if scope_of(row).within(scope)]


def retrain(engine: Engine, tensors: Tensors, scope: Scope, stop: Stop) -> list[Retraining]:
    """Train what is queued in this scope; each shard is activated where the retired one was, and proven, by itself."""
    found: list[Retraining] = []
    for digest in queued(engine, scope):
        if (job := _job(engine, digest)) is None:  # another process did it meanwhile
            continue
        try:
            found.append(_again(engine, tensors, digest, job, stop))
        except AgentMemError as error:
            if stop():
                raise
            _log.warning("lora-%s could not be trained again: %s", digest[:12], error)
            found.append(_failed(engine, digest, job, str(error)))
    return found


def _again(engine: Engine, tensors: Tensors, digest: str, job: dict[str, Any], stop: Stop) -> Retraining:
    cpu = time.process_time()
    old = engine.registry.get(digest, Scope())
    beside = [v for v in engine.registry.active(old.scope) if v.identity == tensors.identity.hex()]
    elsewhere = {record for v in beside for record in v.records}  # `train` was asked for them meanwhile
    elsewhere |= {record.id for record in engine.records.named(old.records, Scope()) if not _own(record, old.scope)}
    remaining = [record for record in _remaining(engine, old, job["records"]) if record.id not in elsewhere]
    corpus = corpus_of(engine, old.scope, remaining, tensors)
    asked = _asked(engine, old, job["records"], corpus)
    version = None
    if corpus.examples:
        version = learn(
            engine,
            tensors,
            old.scope,
            corpus,
            Run(seed=old.seed, epochs=old.recipe.get("epochs")),
            parents=[old],
            beside=beside,
            keep=[v.digest for v in beside],
            stop=stop,
            label="learning a shard again",
        )
    left = set(old.records) - set(corpus.records) - elsewhere - set(job["records"])
    # A question of the user's own was learnt with what answered it: it states nothing, so nothing of it is forgotten.
    asking = {record.id for record in engine.records.named(sorted(left), old.scope) if not questions_of(record)}
    forgotten = sorted({*job["records"], *(left - asking)})
    kept = [record for record in corpus.records if record not in set(job["records"])]
    base, after = _recalled(engine, tensors, version, asked)
    proof = Retraining(
        retired=digest,
        state="done",
        version=version.digest if version else None,
        forgotten=tuple(forgotten),
        kept=len(corpus.records),
        asked=len(asked),
        base_recall=base,
        recall_before=_share(old, forgotten) if asked else None,
        recall_after=after,
        others_before=_share(old, kept),
        others_after=_share(version, kept) if version else None,
        note=_note(version, forced=job["forced"]),
        cpu_seconds=time.process_time() - cpu,
    )
    _put(engine, proof, version, job)
    for record in forgotten:
        engine.questions.pop(record, None)
    return proof


def _job(engine: Engine, digest: str) -> dict[str, Any] | None:
    """Where a retired version answered, whether by force, and which of its records went; None where nothing waits."""
    from .parametric.registry import RETRAIN

    rows = engine.database.query("SELECT note FROM jobs WHERE kind = ? AND record = ?", (RETRAIN, digest))
    found: dict[str, Any] | None = json.loads(rows[0]["note"]) if rows else None
    return found


def _remaining(engine: Engine, old: LoraVersion, changed: Sequence[str]) -> list[Record]:
    """The records of a retired version that hold still, and that nothing told later contradicts.

    What was learnt before had somebody's approval; a text that came since has to get its own.
    """
    approved = set(old.records) - set(changed)
    held = [record for record in standing(engine, old.scope) if _own(record, old.scope)]
    outdated = contradicted(held, approved)
    return [
        record.model_copy(update={"trust": "trusted"}) if record.id in approved else record
        for record in held
        if record.id in old.records and record.id not in outdated
    ]


def _own(record: Record, scope: Scope) -> bool:
    """False for records of a narrower scope (another user's): `train` teaches those to versions of their own."""
    return owner(record, scope) == scope


def _asked(engine: Engine, old: LoraVersion, gone: Sequence[str], corpus: Corpus) -> list[Example]:
    """Questions that only the records that are gone answer: of those forgotten or changed in this process, as they
    were; of those that ended, as they are."""
    found = [example for id_ in gone for example in engine.questions.get(id_, ())]
    ended = [id_ for id_ in old.records if id_ not in corpus.records and id_ not in engine.questions]
    for record in engine.records.named(ended, old.scope):
        if record.valid_until is not None:
            found += questions_of(record)
    taught = {(example.question, example.answer) for example in (*corpus.examples, *corpus.held_out)}
    return [example for example in found if (example.question, example.answer) not in taught]


def _recalled(
    engine: Engine, tensors: Tensors, version: LoraVersion | None, asked: Sequence[Example]
) -> tuple[float | None, float | None]:
    """The share of these questions that the base answers, and that the new version answers."""
    from .parametric.gate import recall
    from .parametric.lora import applied, base_only, load
    from .parametric.train import steady

    if not asked:
        return None, None
    with tensors.lock, steady(tensors.model):
        with base_only(tensors.model):
            base, _ = recall(tensors, asked)
        if version is None:
            return base, base
        lora = load(engine.registry.ref(version).path, digest=version.digest)
        with applied(tensors.model, lora):
            after, _ = recall(tensors, asked, opening=lora.activated)
    return base, after


def _share(version: LoraVersion, records: Sequence[str]) -> float | None:
    """Recall of these records in a version's gate; None where it asked about none of them."""
    shares = [version.gate.by_record[record] for record in records if record in version.gate.by_record]
    return sum(shares) / len(shares) if shares else None


def _note(version: LoraVersion | None, *, forced: bool) -> str | None:
    if version is None:
        return "no record remains that is to be learnt: what else is active, the base model and the records answer"
    if version.state == "failed" and not forced:
        return f"it did not pass its gate ({version.gate}): the base model and the records answer"
    return None


def _put(engine: Engine, proof: Retraining, version: LoraVersion | None, job: dict[str, Any]) -> None:
    """Activate where the retired one acted, write the receipt, end the job: one transaction."""
    with engine.database.write() as connection:
        if version is not None and (version.state == "ready" or job["forced"]):
            for place in job["places"]:
                scope = Scope(**{level: value or None for level, value in zip(LEVELS, place, strict=True)})
                engine.registry.join([version.digest], scope, force=bool(job["forced"]))
        _write(engine, connection, proof)


def _failed(engine: Engine, digest: str, job: dict[str, Any], why: str) -> Retraining:
    """Count the failure; after `TRIES` of them the receipt says that the shard stays untrained."""
    from .parametric.registry import RETRAIN

    proof = Retraining(retired=digest, state="failed", forgotten=tuple(job["records"]), note=why)
    with engine.database.write() as connection:
        connection.execute("UPDATE jobs SET tries = tries + 1 WHERE kind = ? AND record = ?", (RETRAIN, digest))
        row = connection.execute("SELECT tries FROM jobs WHERE kind = ? AND record = ?", (RETRAIN, digest)).fetchone()
        if row is not None and row["tries"] >= TRIES:
            _write(engine, connection, proof)
    return proof


def _write(engine: Engine, connection: Any, proof: Retraining) -> None:
    from .parametric.registry import RETRAIN

    connection.execute(
        "INSERT OR REPLACE INTO receipts (retired, at, report) VALUES (?, ?, ?)",
        (proof.retired, engine.clock(), proof.model_dump_json()),
    )
    connection.execute("DELETE FROM jobs WHERE kind = ? AND record = ?", (RETRAIN, proof.retired))
