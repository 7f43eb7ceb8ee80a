"""agentmem as a system for eval_retrieval.py, which scores retrieval without a language model's judgement.

From the repository root, with the evaluation beside it:

    export PYTHONPATH=tests/benchmarks
    python ../shared/eval/eval_retrieval.py --dataset locomo --json tests/benchmarks/results/locomo.json \\
        --system baselines:Dense --system baselines:BM25 --system retrieval_system:AgentMem

``AgentMem`` is the default configuration, ``Chatted`` the same with the items stored as a chat stores them, ``Words``
the one without an embedder, ``Vectors`` one whose embedder gives no token vectors. With ``EVAL_CACHE`` set to a folder,
what the embedder computed is kept there for the next run.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentmem import Memory
from agentmem.plaintext import embed
from agentmem.plaintext.encoded import Embedder, Encoded, TokenEmbedder
from agentmem.types import Hit

__all__ = ["AgentMem", "Chatted", "Kept", "Vectors", "Words", "as_chat", "embedder", "filled"]

DATES = ("%I:%M %p on %d %B, %Y", "%B-%d-%Y")


class Kept:
    """A token embedder whose results lie in a folder: of each batch of texts, the arrays in an .npz file."""

    def __init__(self, inner: TokenEmbedder, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._inner, self._folder = inner, folder
        self.name, self.digest, self.dimension = inner.name, inner.digest, inner.dimension

    def encode(self, texts: Sequence[str], *, query: bool = False) -> Encoded:
        """What the embedder says, now or when it was last asked the same."""
        key = hashlib.sha256("\0".join([self.digest, str(query), *texts]).encode()).hexdigest()
        file = self._folder / f"{key[:32]}.npz"
        if not file.exists():
            found = self._inner.encode(texts, query=query)
            assert found.tokens is not None
            assert found.spans is not None
            counts = np.array([len(tokens) for tokens in found.tokens])
            spans = np.array([span for spans in found.spans for span in spans], np.int64).reshape(-1, 2)
            tokens = np.concatenate(found.tokens)
            np.savez(file.with_suffix(".new.npz"), vectors=found.vectors, tokens=tokens, counts=counts, spans=spans)
            file.with_suffix(".new.npz").replace(file)
        with np.load(file) as kept:
            ends = np.cumsum(kept["counts"])[:-1]
            places = [[(int(a), int(b)) for a, b in part] for part in np.split(kept["spans"], ends)]
            return Encoded(kept["vectors"], list(np.split(kept["tokens"], ends)), places)

    async def aencode(self, texts: Sequence[str], *, query: bool = False) -> Encoded:
        """The same as `encode`."""
        return self.encode(texts, query=query)

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Any:
        """The vectors alone."""
        return self.encode(texts, query=query).vectors

    async def aembed(self, texts: Sequence[str], *, query: bool = False) -> Any:
        """The same as `embed`."""
        return self.embed(texts, query=query)

    def passages(self, text: str, name: str | None) -> list[tuple[int, int]]:
        """As the embedder cuts them."""
        return self._inner.passages(text, name)


class _NoTokens:
    """An embedder as a hosted one is: one vector per text and nothing else."""

    def __init__(self, inner: Embedder) -> None:
        self.name, self.digest, self.dimension = f"{inner.name} without tokens", inner.digest, inner.dimension
        self.embed, self.aembed = inner.embed, inner.aembed


def embedder() -> Embedder:
    """The default embedder, with its results kept where ``EVAL_CACHE`` says."""
    found = embed.load("default")
    assert isinstance(found, TokenEmbedder)
    folder = os.environ.get("EVAL_CACHE")
    return Kept(found, Path(folder) / "agentmem") if folder else found


def filled(items: list[dict[str, Any]], embedder: str | Embedder | None = None) -> tuple[Memory, dict[str, str]]:
    """A memory of these items, each verbatim in its session and at its time; and the item of each record id."""
    memory = Memory(":memory:", embedder=embedder)
    user = memory.scope(user="benchmark")
    ids: dict[str, str] = {}
    for session in dict.fromkeys(item["session"] for item in items):
        mine = [item for item in items if item["session"] == session]
        messages = [
            {
                "role": item["role"],
                "content": item["text"],
                **({"name": item["speaker"]} if item["speaker"] != item["role"] else {}),
                **({"at": at} if (at := moment(item.get("time"))) else {}),
            }
            for item in mine
        ]
        records = user.scope(session=session).add(messages)
        ids.update({record.id: item["id"] for record, item in zip(records, mine, strict=True)})
    return memory, ids


def as_chat(items: list[dict[str, Any]], user: str, *, named: bool = True) -> list[tuple[dict[str, Any], list[str]]]:
    """The items as a chat with this speaker stores them: what ``user`` says by the user, under a name if it is
    ``named``, all else by an assistant without one, and what one says at a stretch as one. Each with the ids that it
    is made of."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    for item in items:
        role = "user" if item["speaker"] == user else "assistant"
        last = found[-1][0] if found else {}
        if (last.get("role"), last.get("session")) == (role, item["session"]):
            last["text"] += "\n" + item["text"]
            found[-1][1].append(item["id"])
        else:
            said = {**item, "role": role, "speaker": user if named and role == "user" else role}
            found.append((said, [item["id"]]))
    return found


def moment(text: str | None) -> dt.datetime | None:
    """When an item was said, as the data sets write it; None where they don't say or it is no such date."""
    for form in DATES if text else ():
        try:
            return dt.datetime.strptime(str(text), form).replace(tzinfo=dt.UTC)
        except ValueError:
            continue
    return None


class AgentMem:
    """Adds every item verbatim in its session and searches them all; no option of the project is tuned for the data."""

    choose: Callable[[], str | Embedder | None] = staticmethod(embedder)

    def __init__(self) -> None:
        self._memory: Memory | None = None
        self._embedder = self.choose()

    def reset(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def add(self, items: list[dict[str, Any]]) -> None:
        self._memory, self._ids = filled(items, self._embedder)
        self._items = {item["id"]: item for item in items}

    def search(self, query: str, k: int) -> list[dict[str, Any]]:
        assert self._memory is not None
        hits = self._memory.scope(user="benchmark").search(query, k=k)
        return [{"ids": [self._ids[hit.record.id]], "text": self._shown(hit)} for hit in hits]

    def _shown(self, hit: Hit) -> str:
        """As the evaluation shows an item, but of a long one the best passage only."""
        item = self._items[self._ids[hit.record.id]]
        when = f"[{item['time']}] " if item.get("time") else ""
        return f"{when}{item['speaker']}: {hit.passage}"


class Chatted(AgentMem):
    """With what the first speaker says stored as the user's and all else as an assistant's, as a chat stores it."""

    def add(self, items: list[dict[str, Any]]) -> None:
        told = as_chat(items, items[0]["speaker"])
        self._all = {said["id"]: ids for said, ids in told}
        super().add([said for said, _ in told])

    def search(self, query: str, k: int) -> list[dict[str, Any]]:
        return [{**hit, "ids": self._all[hit["ids"][0]]} for hit in super().search(query, k)]


class Words(AgentMem):
    """Without an embedder."""

    choose = staticmethod(lambda: "none")


class Vectors(AgentMem):
    """With one vector per passage, as hosted embedders give."""

    choose = staticmethod(lambda: _NoTokens(embedder()))
