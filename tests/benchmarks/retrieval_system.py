"""agentmem as a system for eval_retrieval.py, which scores retrieval without a language model's judgement.

From the repository root, with the evaluation beside it:

    export PYTHONPATH=tests/benchmarks
    python ../shared/eval/eval_retrieval.py --system retrieval_system:AgentMem --dataset locomo

``AGENTMEM_EMBEDDER`` chooses the embedder (default: the packaged one).
"""

from __future__ import annotations

import os
import time
from typing import Any

from agentmem.database import Database
from agentmem.plaintext import embed
from agentmem.plaintext.index import VectorIndex, open_space
from agentmem.plaintext.records import Records, drafts
from agentmem.plaintext.search import search
from agentmem.types import Scope

__all__ = ["AgentMem"]


class AgentMem:
    """Adds every item verbatim in its session and searches them all; no option of the project is tuned for the data."""

    def __init__(self) -> None:
        self._embedder = embed.load(os.environ.get("AGENTMEM_EMBEDDER", "default"))

    def reset(self) -> None:
        self._database = Database(":memory:")
        self._records = Records(self._database)
        self._index: VectorIndex | None = None
        self._space: int | None = None
        if self._embedder is not None:
            name, digest, dimension = self._embedder.name, self._embedder.digest, self._embedder.dimension
            self._space = open_space(self._database, name, digest, dimension)
            self._index = VectorIndex(self._database, None, self._space, dimension)
        self._items: dict[str, str] = {}

    def add(self, items: list[dict[str, Any]]) -> None:
        new = [
            draft
            for item in items
            for draft in drafts(
                {"role": item["role"], "content": item["text"], "name": item["speaker"]},
                scope=Scope(user="benchmark", session=item["session"]),
            )
        ]
        vectors = self._embedder.embed([draft.passage for draft in new]) if self._embedder else None
        stored = self._records.insert(new, vectors, self._space)
        self._items.update({record.id: item["id"] for record, item in zip(stored, items, strict=True)})

    def search(self, query: str, k: int) -> list[str]:
        vector = self._embedder.embed([query], query=True)[0] if self._embedder else None
        hits = search(
            self._database,
            self._records,
            self._index,
            vector,
            query,
            scope=Scope(user="benchmark"),
            k=k,
            now=time.time(),
        )
        return [self._items[hit.record.id] for hit in hits]
