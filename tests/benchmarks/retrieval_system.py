"""agentmem as a system for eval_retrieval.py, which scores retrieval without a language model's judgement.

From the repository root, with the evaluation beside it:

    export PYTHONPATH=tests/benchmarks
    python ../shared/eval/eval_retrieval.py --dataset locomo --json tests/benchmarks/results/locomo.json \\
        --system baselines:Dense --system baselines:BM25 --system retrieval_system:AgentMem

``AGENTMEM_EMBEDDER`` chooses the embedder (default: the packaged one).
"""

from __future__ import annotations

from typing import Any

from agentmem import Memory

__all__ = ["AgentMem"]


class AgentMem:
    """Adds every item verbatim in its session and searches them all; no option of the project is tuned for the data."""

    def __init__(self) -> None:
        self._memory: Memory | None = None

    def reset(self) -> None:
        if self._memory is not None:
            self._memory.close()
        self._memory = Memory(":memory:")
        self._user = self._memory.scope(user="benchmark")
        self._items: dict[str, str] = {}

    def add(self, items: list[dict[str, Any]]) -> None:
        for session in dict.fromkeys(item["session"] for item in items):
            mine = [item for item in items if item["session"] == session]
            messages = [{"role": item["role"], "content": item["text"], "name": item["speaker"]} for item in mine]
            records = self._user.scope(session=session).add(messages)
            self._items.update({record.id: item["id"] for record, item in zip(records, mine, strict=True)})

    def search(self, query: str, k: int) -> list[str]:
        return [self._items[hit.record.id] for hit in self._user.search(query, k=k)]
