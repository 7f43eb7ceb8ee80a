"""The handles of one kind of memory: ``mem.plaintext``, ``mem.activation``, ``mem.parametric``.

Knows their public signatures and what they promise, as memory.py does for the verbs; the work is in the flows.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import chat as chats
from . import distilling, extraction, flows, kinds, learning, publishing, reconciling, reembedding
from .chat import Conversation
from .engine import Engine
from .flow import local, run
from .publishing import Publication
from .types import Extraction, Reconciliation, Record, Retraining, Scope, Usage

if TYPE_CHECKING:
    from .activation.store import PageEntry
    from .activation.swapping import Swapped
    from .memory import ScopedMemory
    from .parametric.prefix_gate import TrainedPrefix
    from .parametric.registry import LoraVersion

__all__ = ["Activation", "Parametric", "Plaintext"]


class Plaintext:
    """Direct handle: records and their index."""

    def __init__(self, engine: Engine, scope: Scope) -> None:
        self._engine = engine
        self._scope = scope

    def count(self) -> int:
        """How many records this scope sees."""
        return run(local(self._engine.records.count, self._scope))

    def around(self, id: str, *, before: int = 2, after: int = 2) -> builtins.list[Record]:
        """A record, such as that of a hit, amid its neighbours in its session, in order of arrival."""
        return run(local(self._engine.records.around, id, self._scope, before=before, after=after))

    def embed(self) -> int:
        """Embed the records that have no vector of the current embedder yet; returns how many. Can be interrupted."""
        return run(flows.catch_up(self._engine))

    def reembed(self) -> int:
        """Embed every record by the embedder in the settings and turn to it; returns how many records that were.

        A folder that another embedder filled is searched with that one until this is done. Can be interrupted and
        goes on where it stopped; other processes work on meanwhile and turn over with this one.
        """
        return run(reembedding.reembed(self._engine))

    def extract(
        self,
        *,
        kinds: Sequence[Literal["fact", "preference", "summary"]] = ("fact", "preference"),
        limit: int | None = None,
        retry: bool = False,
    ) -> Extraction:
        """Let the model note facts and preferences of what users said, and summaries of sessions, as new records.

        They have ``metadata["kind"]``, the source "extracted", the scope of the turns they were written from and
        lineage to them; what an untrusted turn says stays untrusted. A turn is read once per model, at most ``limit``
        turns in one call; failed ones are tried again later, ``retry`` also reads refused ones again. Nothing that was
        said is changed. Can be interrupted. Forgetting a turn forgets what was extracted from it.
        """
        return run(extraction.extract(self._engine, self._scope, kinds=kinds, limit=limit, retry=bool(retry)))

    def reconcile(self, *, where: Mapping[str, Any] | None = None, limit: int | None = None) -> Reconciliation:
        """Ask the model which facts of one subject can't both hold; each such pair becomes a record that names both.

        Facts are records with ``metadata["kind"]`` "fact" or "preference", or those that match ``where``. Neither is
        changed: say which one holds by ``add(..., supersedes=...)``. Each pair is asked about once.
        """
        return run(reconciling.reconcile(self._engine, self._scope, where=where, limit=limit))


class Activation:
    """Direct handle: KV pages. A page holds the model's states of one step of the token grid."""

    def __init__(self, engine: Engine, scope: Scope, conversation: Conversation) -> None:
        self._engine = engine
        self._scope = scope
        self._conversation = conversation

    def prime(self, *, system: str | None = None, parallel: int | None = None) -> Usage:
        """Prefill what the next ``chat`` of this handle begins with (system, core, history), ahead of the turn.

        With ``parallel``, the number of requests that will come at once, a host is asked only where that costs less
        than letting each of them write the prefix; else nothing is sent.
        """
        return run(chats.prime(self._engine, self._conversation, system=system, parallel=parallel))

    def warm_every(self, idle_s: float) -> float | None:
        """In which steps of seconds `prime` would keep this handle's prefix at its host through ``idle_s`` seconds for
        less than writing it anew; None where that does not pay, or the prefix stays anyway."""
        return run(local(chats.warm_every, self._engine, self._conversation, idle_s))

    def entries(self) -> builtins.list[PageEntry]:
        """The pages made from this scope's records; on the root handle all of them."""
        return run(local(kinds.entries, self._engine, self._scope))

    def pin(self, keys: Sequence[str] | None = None, *, pinned: bool = True) -> int:
        """Keep these pages (default: all of the scope) from being evicted; returns how many."""
        return run(local(kinds.pin, self._engine, self._scope, keys, pinned=pinned))

    def evict(self, keys: Sequence[str] | None = None) -> int:
        """Delete these pages (default: all of the scope); returns how many. They are computed again when needed."""
        return run(local(kinds.evict, self._engine, self._scope, keys))

    def swap_out(self, keys: Sequence[str] | None = None) -> Swapped:
        """Let these pages (default: all of the scope) leave the RAM, and say what that took; their files stay."""
        return run(local(kinds.swap_out, self._engine, self._scope, keys))

    def swap_in(self, keys: Sequence[str] | None = None) -> Swapped:
        """Bring these pages (default: all of the scope), and the pages before them, into RAM ahead of use, checked.

        Call it on the handle that speaks next, while another one answers: its first token then waits for no disk. Says
        what is there afterwards. The last used come first, up to ``ram_budget``. Damaged pages are put aside; a file
        that was written this very moment is left for its first use.
        """
        return run(local(kinds.swap_in, self._engine, self._scope, keys))

    def save(self, path: str | os.PathLike[str]) -> int:
        """Copy all pages with their lineage into a new folder; returns how many. As private as the transcript. Trained
        prefixes are left out, and how many is logged: `Parametric.distil` makes them again elsewhere.

        On the root handle only: the pages of a prompt's head serve many scopes. What is forgotten later stays in that
        folder: the receipt of `forget` names it while it is there, and deleting it is yours.
        """
        return run(local(kinds.save, self._engine, self._scope, path))

    def restore(self, path: str | os.PathLike[str]) -> int:
        """Bring saved pages back; returns how many. Damaged ones and those of forgotten records are passed over."""
        return run(local(kinds.restore, self._engine, self._scope, path))


class Parametric:
    """Direct handle: LoRA versions trained from records. Local models only."""

    def __init__(self, engine: Engine, scope: Scope) -> None:
        self._engine = engine
        self._scope = scope

    def train(
        self,
        scope: Scope | ScopedMemory | None = None,
        records: Sequence[str | Record] | None = None,
        *,
        seed: int = 0,
        epochs: int | None = None,
        activate: bool = True,
        approve: Sequence[str | Record] = (),
        ram_budget: int | None = None,
    ) -> LoraVersion:
        """Teach records to a LoRA and store it as a version; within a minute for ten facts on a CPU.

        Default are the records of the scope that hold now, are trusted and that no active version learnt; before them,
        what waits for `retrain` is done. ``records`` names exactly those to learn. Untrusted ones are left out but for
        those in ``approve``, which you have looked at. Records of several users (tenants, agents) are learnt apart, by
        versions of their own scopes; more of one than the setting ``lora_shard`` become several, each trained on its
        own. The first is returned, its ``shards`` names all.

        A version that passes its gate is activated for its scope unless ``activate=False``, beside those that are
        active here or above; one that learnt all records of an older one takes its place. One that fails stays
        inactive, with the report in ``.gate``. ``ram_budget`` bounds the bytes that training holds beyond the model.
        Interrupted (or its task cancelled), nothing is stored; the same call goes on from its checkpoint.

        Raises `ConfigError` for a model without weights, `InvalidInput` where there is nothing to learn,
        `TrainingError` where a record is forgotten or changed meanwhile, `Full` where ``lora_budget`` has no room.
        """
        return run(
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

    def versions(self) -> builtins.list[LoraVersion]:
        """The versions of this scope, beneath it and of the levels above it, newest first."""
        return run(local(self._engine.registry.versions, self._scope))

    def active(self) -> tuple[LoraVersion, ...]:
        """The versions that answer in this scope, as their sum; empty for the base model."""
        return run(local(self._engine.registry.active, self._scope))

    def activate(self, *versions: str | LoraVersion | None, force: bool = False) -> tuple[LoraVersion, ...]:
        """Answer with exactly these versions, as their sum, from the next request on; none (or None) is the base model.

        All act or none does. Raises `TrainingError` for a retired version, and for one that failed its gate unless
        ``force``; `ScopeError` for one that learnt from a narrower scope.
        """
        return run(local(learning.activate, self._engine, self._scope, versions, force=force))

    def rollback(self) -> tuple[LoraVersion, ...]:
        """Go back to what was active before; returns it, empty for the base model."""
        return run(local(learning.rollback, self._engine, self._scope))

    def retrain(self) -> builtins.list[Retraining]:
        """Train the shards again that lost a record: each without what was forgotten, with the new text of what was
        changed. Returns the proof of each; empty where nothing waits.

        Since the record went, plaintext memory and the base model answer. The new version takes the old one's place
        where it passes its gate. The recall of what was forgotten can be measured only by the process that forgot it,
        before it ends: nobody else has the questions. Can be interrupted; the next call goes on.
        """
        return run(learning.retrain(self._engine, self._scope))

    def receipts(self) -> builtins.list[Retraining]:
        """What became of the versions of this scope that learnt a record which was forgotten or changed since, newest
        first: `retrain`'s proofs, and those that still wait for it. Numbers and ids, kept for good."""
        return run(local(learning.receipts, self._engine, self._scope))

    def export(
        self, version: str | LoraVersion, path: str | os.PathLike[str], *, format: Literal["peft", "gguf"] = "peft"
    ) -> Path:
        """Write a version for other engines: a PEFT folder (vLLM, transformers) or a GGUF file (llama.cpp, Ollama).

        ``path`` must not exist or be empty; a GGUF file may also be put into a folder, under its digest-named name.
        Returns what was written. It is a copy: what is forgotten later stays in it.
        """
        return run(local(learning.export, self._engine, self._scope, version, path, format=format))

    def publish(
        self, version: str | LoraVersion | Sequence[str | LoraVersion] | None = None, to: str | None = None
    ) -> Publication:
        """Give a version to the engine ``to``, such as "ollama:llama3.2" or "vllm:http://host:8000" (default: this
        memory's own model), under a name that holds its digest; several, or all active ones (None), as their sum.

        Forgetting a record that one of them learnt takes it back there, or says in the receipt that it could not.
        A user, password or key in the address is used for this call and not kept: what is taken back later goes by the
        settings (``base_url``, ``api_key``).
        Raises `ConfigError` for an engine with no place for a LoRA, `ProviderError` where it refuses or is away.
        """
        return run(local(publishing.publish, self._engine, self._scope, version, to))

    def unpublish(self, version: str | LoraVersion, to: str | None = None) -> tuple[str, ...]:
        """Take a version back from the engine ``to``, or from all; returns the names that are gone there."""
        return run(local(publishing.unpublish, self._engine, self._scope, version, to))

    def distil(self, *, tokens: int | None = None, system: str | None = None, seed: int = 0) -> TrainedPrefix:
        """Distil what this scope's prompts begin with (system text and core block) into ``tokens`` KV states, by
        default a part of its length, which answer in its place from the next request on.

        About a minute for 40 facts. Judged on questions that were not trained, against the whole head; one that fails
        its ``.gate`` is not kept. It serves prompts that begin with exactly these tokens (``system`` is the text that
        `chat` is given) and under which no LoRA acts on the head; a core block that changed is read in full again.
        Forgetting one of its records deletes it. Interrupted, nothing is kept.

        Raises `ConfigError` for a model without weights or without KV pages, `InvalidInput` where there is no core
        block, `TrainingError` for an architecture that can have none.
        """
        return run(distilling.distil(self._engine, self._scope, tokens=tokens, system=system, seed=seed))

    def prefixes(self) -> builtins.list[TrainedPrefix]:
        """The trained prefixes made of records that this scope sees, newest first."""
        return run(local(distilling.prefixes, self._engine, self._scope))

    def drop_prefix(self, prefix: str | TrainedPrefix) -> None:
        """Delete a trained prefix, given as value, name or digest: what it stood for is read in full again.

        Raises `NotFound`.
        """
        return run(local(distilling.drop_prefix, self._engine, self._scope, prefix))
