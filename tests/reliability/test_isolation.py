"""Odd scope ids side by side in one folder: no handle reads, changes, forgets or exports what is another's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentmem import Memory, NotFound, ScopedMemory, ScopeError

pytestmark = pytest.mark.slow

#: Reads of foreign ids where AGENTMEM_RELIABILITY=full, else a part of them.
READS = 1_000_000 if os.environ.get("AGENTMEM_RELIABILITY") == "full" else 20_000
#: Ids that other stores trimmed, folded, widened, took for a pattern, for a path or for SQL.
IDS = [
    *("alice", " alice", "alice ", "alice\n", "\talice", "Alice", "ALICE", "al ice", "alice\u200b", "\ufeffalice"),
    *("*", "%", "_", "?", "[a-z]*", "alice*", "%alice%", ".", "..", "../alice", "/", "alice/../ben", "C:\\alice"),
    *("null", "None", "0", "00", "-1", "1e3", "true", "' OR 1=1 --", '"; DROP TABLE records; --', "a'b", "{}", "[]"),
    *("\u00e9", "e\u0301", "\u0430lice", "\uff41lice", "\u202ealice", "x" * 512),
]
assert len(IDS) == len(set(IDS)) >= 40


@pytest.mark.parametrize("level", ["tenant", "user"])
def test_no_odd_id_reaches_what_is_anothers(tmp_path: Path, level: str) -> None:
    with Memory(tmp_path / "memory", embedder="hash") as memory:
        handles: dict[str, ScopedMemory] = {id_: memory.scope(**{level: id_}) for id_ in IDS}
        own = {
            id_: handle.add([f"secret of number {n} {part}" for part in range(3)])
            for n, (id_, handle) in enumerate(handles.items())
        }
        mine = {id_: {record.id for record in records} for id_, records in own.items()}
        reads = 0
        for id_, handle in handles.items():
            assert {record.id for record in handle.list(limit=1_000)} == mine[id_]
            assert {hit.record.id for hit in handle.search("secret of number", k=100)} == mine[id_]
            assert handle.plaintext.count() == 3
            foreign = [record for other, records in own.items() if other != id_ for record in records]
            for record in foreign:
                for verb in (handle.get, handle.history):
                    with pytest.raises(NotFound):
                        verb(record.id)
                reads += 2
            assert handle.list(where={"id": foreign[0].id}) == []
            assert handle.list(after=own[id_][0].id) == own[id_][1:]
            for refused in _changes(handle, foreign[0].id):
                with pytest.raises((NotFound, ScopeError)):
                    refused()
            if id_ in IDS[::8]:
                handle.export(tmp_path / "out.jsonl")
                text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
                assert not any(record.id in text for record in foreign)
                (tmp_path / "out.jsonl").unlink()
        while reads < READS // 2:
            for id_, handle in handles.items():
                records = handle._engine.records
                for other in IDS:
                    if other != id_:
                        assert records.named([record.id for record in own[other]], handle._scope) == []
                        reads += len(own[other])
        assert {record.id: record.text for record in memory.list(limit=1_000)} == {
            record.id: record.text for records in own.values() for record in records
        }
        handles["*"].forget(where={})
        handles["%"].forget(where={})
        assert len(memory.list(limit=1_000)) == 3 * (len(IDS) - 2)
        assert memory.verify().problems == []


def _changes(handle: ScopedMemory, foreign: str) -> list[Callable[[], Any]]:
    return [
        lambda: handle.update(foreign, "taken over"),
        lambda: handle.forget(foreign),
        lambda: handle.forget([foreign], dry_run=True),
        lambda: handle.add("in its place", supersedes=foreign),
    ]


def test_a_foreign_id_and_an_unknown_one_give_the_same_error(tmp_path: Path) -> None:
    with Memory(tmp_path, embedder="none") as memory:
        [theirs] = memory.scope(user="ana").add("hers")
        mine = memory.scope(user="ben")
        unknown = "0" * 32
        for verb in (mine.get, mine.history, mine.forget, lambda id_: mine.update(id_, "x")):
            errors = []
            for id_ in (theirs.id, unknown):
                with pytest.raises(NotFound) as caught:
                    verb(id_)
                errors.append(str(caught.value).replace(id_, "ID"))
            assert errors[0] == errors[1]
