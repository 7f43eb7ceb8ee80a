"""A process that changes a memory folder, saying before each change what it will do and after it that it is stored.

`Expected` is the other side: what must be in the folder when the process has died, from what it said until then. It is
kept outside the store under test. Run as ``python -m tests.reliability.writer FOLDER SEED COUNT``.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from agentmem import Memory, Record

__all__ = ["Expected", "problems", "stored", "write", "write_to"]

Tell = Callable[[bytes], object]
WORDS = ["peanut", "garden", "violin", "harbour", "ledger", "compass", "orchid", "granite", "saffron", "walnut"]


def write(folder: Path, tell: Tell, *, seed: int, count: int, first: int = 0, user: str = "ana") -> None:
    """Make ``count`` random changes, numbered from ``first``; then close the memory."""
    chance = random.Random(seed)
    with Memory(folder, embedder="hash") as memory:
        mine = memory.scope(user=user)
        ids = [record.id for record in mine.list(limit=200)]
        for number in range(first, first + count):
            intent = _intent(chance, ids, f"{user}{number}")
            tell(json.dumps(intent).encode() + b"\n")
            new = _do(mine, intent)
            tell(json.dumps({"done": new}).encode() + b"\n")
            ids += new
            gone = set(intent.get("forget", []))
            ids = [id_ for id_ in ids if id_ not in gone]


def _intent(chance: random.Random, ids: list[str], name: str) -> dict[str, Any]:
    kind = chance.choices(["add", "batch", "update", "forget", "supersede"], [60, 12, 12, 8, 8])[0]
    text = f"{name}: the {chance.choice(WORDS)} is near the {chance.choice(WORDS)} " * chance.choice([1, 1, 1, 40])
    if kind == "update" and ids:
        return {"update": chance.choice(ids), "texts": [text]}
    if kind == "forget" and ids:
        return {"forget": chance.sample(ids, min(len(ids), chance.choice([1, 1, 3])))}
    if kind == "supersede" and ids:
        return {"supersede": chance.choice(ids), "texts": [text]}
    return {"add": True, "texts": [f"{text}({part})" for part in range(chance.randint(2, 9) if kind == "batch" else 1)]}


def _do(memory: Any, intent: dict[str, Any]) -> list[str]:
    """Make one change; returns the ids of new records."""
    if "update" in intent:
        memory.update(intent["update"], intent["texts"][0])
    elif "forget" in intent:
        memory.forget(intent["forget"])
    elif "supersede" in intent:
        return [record.id for record in memory.add(intent["texts"], supersedes=intent["supersede"])]
    else:
        return [record.id for record in memory.add(intent["texts"])]
    return []


def write_to(connection: Connection, folder: str, seed: int, count: int, first: int, user: str = "ana") -> None:
    """`write` in a process of ``multiprocessing``."""
    write(Path(folder), connection.send_bytes, seed=seed, count=count, first=first, user=user)
    connection.close()


def stored(folder: Path) -> dict[str, Record]:
    """All records of a folder, by id; each came through its checksum."""
    with Memory(folder, embedder="hash") as memory:
        return {record.id: record for record in memory.list(limit=10**6)}


def problems(folder: Path) -> list[str]:
    """What `verify` finds in a folder."""
    with Memory(folder, embedder="hash") as memory:
        return memory.verify().problems


@dataclass
class Expected:
    """What a writer said it stored: the text of every record, and the one change that it may have been at."""

    texts: dict[str, str] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    pending: dict[str, Any] | None = None
    changes: int = 0

    def heard(self, line: bytes) -> None:
        """Take in one thing that the writer said."""
        said = json.loads(line)
        if "done" not in said:
            self.pending = said
            return
        assert self.pending is not None
        self.texts, self.ended = self._after(said["done"])
        self.pending = None
        self.changes += 1

    def _after(self, new: list[str]) -> tuple[dict[str, str], set[str]]:
        intent = self.pending or {}
        texts, ended = dict(self.texts), set(self.ended)
        if "update" in intent:
            texts[intent["update"]] = intent["texts"][0]
        elif "forget" in intent:
            for id_ in intent["forget"]:
                del texts[id_]
                ended.discard(id_)
        else:
            texts.update(zip(new, intent["texts"], strict=True))
            if "supersede" in intent:
                ended.add(intent["supersede"])
        return texts, ended

    def check(self, records: dict[str, Record]) -> None:
        """Every acknowledged change is there, and of the one at which the writer died all or nothing."""
        texts = {id_: record.text for id_, record in records.items()}
        ended = {id_ for id_, record in records.items() if record.valid_until is not None}
        if (texts, ended) == (self.texts, self.ended):
            return
        lost = {id_: text for id_, text in self.texts.items() if texts.get(id_) != text}
        extra = {id_: text for id_, text in texts.items() if id_ not in self.texts}
        assert self.pending is not None, f"lost {lost}, extra {extra}, after {self.changes} changes"
        assert (texts, ended) == self._after(sorted(extra)), f"lost {lost}, extra {extra}, at {self.pending}"

    def accept(self, records: dict[str, Record]) -> None:
        """Go on from what was found (and checked)."""
        self.texts = {id_: record.text for id_, record in records.items()}
        self.ended = {id_ for id_, record in records.items() if record.valid_until is not None}
        self.pending = None


if __name__ == "__main__":
    write(Path(sys.argv[1]), lambda line: os.write(1, line), seed=int(sys.argv[2]), count=int(sys.argv[3]))
