"""One shard of records taught to one LoRA version: corpus, training, gate, store.

Orders the parts of parametric/ over the engine and its local model; knows nothing of which records to take and of what
is active. Every step can be interrupted: what was trained so far waits in a checkpoint for the same call.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from . import asked
from .acting import concerns
from .engine import Engine
from .errors import ConfigError, NotFound, StoreError
from .progress import progress
from .types import Record, Scope, Usage

if TYPE_CHECKING:
    from .parametric.corpus import Corpus, Example
    from .parametric.gate import Thresholds
    from .parametric.lora import Lora
    from .parametric.recipe import Recipe
    from .parametric.registry import LoraVersion
    from .parametric.train import Tensors

__all__ = [
    "Run",
    "Stop",
    "contradicted",
    "corpus_of",
    "learn",
    "model_of",
    "owned",
    "owner",
    "standing",
    "thresholds_of",
]

_log = logging.getLogger("agentmem")

Stop = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a shard is trained. ``epochs`` None is the recipe's, ``ram_budget`` bounds the bytes beyond the model."""

    seed: int = 0
    epochs: int | None = None
    ram_budget: int | None = None


#: Other active versions that a new one is tried beside in its gate, the newest: 320 records where a shard has 20. Their
#: weights take about 3 MB each, and every sum of them that answers a question takes passes of its own.
BESIDE = 16


def model_of(engine: Engine) -> Tensors:
    """The loaded model that LoRA versions are trained on.

    Raises `ConfigError` where the provider shows no weights: it says which ones do.
    """
    provider = engine.chat_provider()
    if not provider.capabilities.trains:
        raise ConfigError(
            f"{provider.name} gives no access to its weights, so nothing can be trained on it: train with "
            "model='local' (or 'local:<folder or name>'); llama.cpp, Ollama and vLLM can serve what was learnt there"
        )
    tensors: Tensors = provider.tensors()
    return tensors


def thresholds_of(engine: Engine) -> Thresholds:
    """What a version must reach in this memory; raises `ConfigError` for a setting that names no threshold."""
    from .parametric.gate import Thresholds

    return Thresholds.from_settings(engine.settings.lora_gate)


def corpus_of(engine: Engine, scope: Scope, records: Sequence[Record], tensors: Tensors | None = None) -> Corpus:
    """What there is to learn and to test of these records, with their owner's past questions about them; with
    ``tensors`` also what that model writes about them, if a trial shows that it can."""
    from .parametric import corpus as corpora
    from .parametric.selfstudy import study

    whose = {record.id: owner(record, scope) for record in records}
    questions = {
        id_: tuple(question for question in found if owner(question, scope) == whose[id_])
        for id_, found in asked.questions(engine, scope, records).items()
    }
    written = study(tensors, records).examples if tensors is not None else ()
    return corpora.build(records, asked=questions, written=written)


def owner(record: Record, scope: Scope) -> Scope:
    """The scope whose version learns this record in a training of ``scope``: its tenant, user and agent, whose sessions
    share what was learnt. What lies above ``scope`` is learnt for ``scope``."""
    whose = record.scope.model_copy(update={"session": None})
    return whose if whose.within(scope) else scope


def owned(records: Iterable[Record], scope: Scope) -> dict[Scope, list[Record]]:
    """These records by their `owner`. No version learns those of two, or one's facts would answer the other; and what
    one says contradicts nothing that the other said."""
    found: dict[Scope, list[Record]] = {}
    for record in records:
        found.setdefault(owner(record, scope), []).append(record)
    return found


def standing(engine: Engine, scope: Scope) -> list[Record]:
    """The records of this scope and beneath it that hold now, in order of arrival."""
    now = engine.clock()
    found: list[Record] = []
    after: str | None = None
    while page := engine.records.list(scope, limit=1000, after=after):
        after = page[-1].id
        found += [
            record
            for record in page
            if record.scope.within(scope)
            and (record.valid_until is None or record.valid_until.timestamp() > now)
            and (record.valid_from is None or record.valid_from.timestamp() <= now)
        ]
    return found


def contradicted(records: Sequence[Record], approved: Collection[str]) -> set[str]:
    """Those of these records that a later one says otherwise. Nobody said that they ended, yet weights that hold them
    would answer against what was told last. ``approved`` are untrusted ones that may be learnt all the same."""
    from .parametric import corpus as corpora

    told = [r.model_copy(update={"trust": "trusted"}) if r.id in approved else r for r in records]
    held = corpora.build(told).records
    # What states nothing by itself (a question, small talk) contradicts nothing.
    return {record.id for record in told if record.id not in held and corpora.build([record]).records}


def learn(
    engine: Engine,
    tensors: Tensors,
    scope: Scope,
    corpus: Corpus,
    how: Run,
    *,
    parents: Sequence[LoraVersion] = (),
    beside: Sequence[LoraVersion] = (),
    keep: Sequence[str] = (),
    stop: Stop,
    label: str = "learning",
) -> LoraVersion:
    """A stored version of ``scope`` that learnt ``corpus`` and went through its gate; it is not active yet.

    ``parents`` are versions whose place it takes, ``beside`` those that will act with it, ``keep`` digests that must
    not make room for it. The same run again, after it was stored, gives what is stored.
    """
    from .parametric.gate import gate
    from .parametric.train import estimate
    from .parametric.train import train as teach
    from .parametric.versions import judged_alike

    thresholds = thresholds_of(engine)
    recipe = _recipe(engine, tensors)
    run = _key(tensors, scope, corpus, recipe, how)
    found = engine.registry.found(run, scope)
    filtered = engine.settings.lora_when == "recalled"
    if found is not None and judged_alike(found.gate, thresholds, filtered=filtered):
        return found
    begun = time.perf_counter()
    expected = estimate(tensors, corpus, recipe=recipe, epochs=how.epochs, ram_budget=how.ram_budget)
    _log.info("%s: %d records, %s", label, len(corpus.records), expected)
    with engine.registry.run(run, corpus.records) as checkpoint:
        with progress(f"{label} ({expected})") as moved:
            trained = teach(
                tensors,
                corpus,
                seed=how.seed,
                epochs=how.epochs,
                recipe=recipe,
                progress=moved,
                stop=stop,
                checkpoint=checkpoint,
                keep=True,  # a gate that is interrupted must not cost the training
                ram_budget=how.ram_budget,
            )
        tried = _loaded(engine, beside[-BESIDE:])
        learnt = {*corpus.records, *(record for version, _ in tried for record in version.records)}
        told = concerns(engine, scope, learnt) if filtered else None
        learners = [corpus.records, *(version.records for version, _ in tried)]
        report = gate(
            tensors,
            trained,
            corpus,
            thresholds=thresholds,
            beside=[lora for _, lora in tried],
            others=len(beside),
            earlier=_earlier(engine, scope, [*parents, *(version for version, _ in tried)]),
            concerns=None if told is None else lambda question: not told(question).isdisjoint(corpus.records),
            acting=None if told is None else lambda asked: _acting(asked, told, learners),
        )
        version = engine.registry.add(
            trained,
            scope=scope,
            gate=report,
            parents=[parent.digest for parent in parents],
            left_out=corpus.left_out,
            keep=keep,
            run=run,
        )
    spent = Usage(total_s=time.perf_counter() - begun)
    engine.ledger.note("train", engine.chat_provider().name, scope, spent, size=version.bytes, here=True)
    return version


def _recipe(engine: Engine, tensors: Tensors) -> Recipe:
    """The recipe measured for a model of this size: activated where the engine can serve that and nobody wants it
    otherwise."""
    from .parametric.recipe import recipe_for

    size = sum(weight.numel() for weight in tensors.model.parameters())
    can = engine.chat_provider().capabilities.activated_loras
    return recipe_for(size, activated=can and engine.settings.lora_activated)


def _key(tensors: Tensors, scope: Scope, corpus: Corpus, recipe: Recipe, how: Run) -> str:
    """What tells one run from another: model, scope, examples, recipe, seed, length."""
    said = [(example.question, example.answer, example.system) for example in corpus.examples]
    learnt = sorted(corpus.records.items())
    told = [tensors.identity.hex(), list(scope.levels()), learnt, said, asdict(recipe), asdict(how)]
    return hashlib.sha256(json.dumps(told).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _loaded(engine: Engine, versions: Sequence[LoraVersion]) -> list[tuple[LoraVersion, Lora]]:
    """These versions with their weights; what is damaged is left out."""
    from .parametric.lora import load

    found: list[tuple[LoraVersion, Lora]] = []
    for version in versions:
        try:
            found.append((version, load(engine.registry.ref(version).path, digest=version.digest)))
        except (StoreError, NotFound) as error:
            _log.warning("%s is left out of a gate: %s", version.name, error)
    return found


def _acting(asked: Example, told: Callable[[str], frozenset[str]], learnt: Sequence[Iterable[str]]) -> list[int]:
    """Which versions, by the records that each learnt, act on a question in a chat; the one that taught it anyway."""
    concerned = {*told(asked.question), *asked.records}
    return [at for at, records in enumerate(learnt) if not concerned.isdisjoint(records)]


def _earlier(engine: Engine, scope: Scope, versions: Sequence[LoraVersion]) -> Corpus | None:
    """What these versions taught and still holds: a new one beside them, or in their place, must not lose it."""
    ids = list(dict.fromkeys(record for version in versions for record in version.records))
    records = engine.records.named(ids, Scope())
    if not records:
        return None
    corpus = corpus_of(engine, scope, [record.model_copy(update={"trust": "trusted"}) for record in records])
    return corpus if corpus.examples else None
