"""Moving in and out: everything needed to rebuild is in an export, and other memories' stores are read as data."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem import Memory
from agentmem.errors import InvalidInput, ScopeError
from agentmem.pickles import State, read_pickle
from agentmem.plaintext.encoders import HashEmbedder
from agentmem.types import Scope

GOLDEN = Path(__file__).parents[1] / "golden" / "imports"


@pytest.fixture
def memory() -> Iterator[Memory]:
    with Memory(":memory:", embedder="hash") as made:
        yield made


class CountingEmbedder(HashEmbedder):
    def __init__(self) -> None:
        super().__init__()
        self.texts = 0

    def encode(self, texts: Any, *, query: bool = False) -> Any:
        self.texts += len(texts)
        return super().encode(texts, query=query)


def test_an_export_rebuilds_versions_lineage_validity_and_trust(tmp_path: Path, memory: Memory) -> None:
    ana = memory.scope(user="ana")
    [old] = ana.add("I live in Lisbon", at="2020-01-01", metadata={"n": [1, {"a": None}]})
    ana.update(old.id, "I live in Lisbon, Portugal")
    [new] = ana.add("I live in Porto", at="2024-01-01", supersedes=old.id, trust="untrusted", source="web")
    assert memory.export(tmp_path / "out") == 2
    with Memory(":memory:", embedder="hash") as other:
        assert other.load(tmp_path / "out") == 2
        for record in (old, new):
            kept, was = other.history(record.id), memory.history(record.id)
            assert [{**r.model_dump(), "created": None} for r in kept] == [
                {**r.model_dump(), "created": None} for r in was
            ]
        assert [hit.record.id for hit in other.search("live", at="2021-01-01")] == [old.id]
        assert other.load(tmp_path / "out") == 0


def test_with_vectors_nothing_is_embedded_again(tmp_path: Path) -> None:
    text = "long " * 2000 + "end"
    with Memory(":memory:", embedder=CountingEmbedder()) as memory:
        memory.add(["I like tea", text])
        memory.export(tmp_path / "out", vectors=True)
        wanted = memory._engine.database.query("SELECT part, start, stop, vector FROM vectors ORDER BY seq, part")
    counting = CountingEmbedder()
    with Memory(":memory:", embedder=counting) as other:
        assert other.load(tmp_path / "out") == 2
        assert counting.texts == 0
        kept = other._engine.database.query("SELECT part, start, stop, vector FROM vectors ORDER BY seq, part")
        assert [tuple(row) for row in kept] == [tuple(row) for row in wanted]
        assert other.verify().ok
        assert other.search("tea")[0].record.text == "I like tea"
    with Memory(":memory:", embedder="none") as words:
        assert words.load(tmp_path / "out") == 2


@pytest.mark.parametrize(
    "passages",
    [[[0, 99, "AAAA", None]], [[0, 3, "AAAA", None]], [[0, 3, "!", None]], [[0, 3]], 5, [[True, 3, "", None]]],
)
def test_vectors_that_do_not_fit_are_refused(tmp_path: Path, memory: Memory, passages: Any) -> None:
    memory.add("tea")
    memory.export(tmp_path / "out", vectors=True)
    header, line = (tmp_path / "out").read_text().splitlines()
    (tmp_path / "out").write_text(header + "\n" + json.dumps({**json.loads(line), "passages": passages}))
    with Memory(":memory:", embedder="hash") as other:
        with pytest.raises(InvalidInput):
            other.load(tmp_path / "out")
        assert other.list() == []


def test_loading_is_whole_or_nothing(tmp_path: Path, memory: Memory) -> None:
    memory.add([f"text {n}" for n in range(600)])
    memory.export(tmp_path / "out")
    with (tmp_path / "out").open("a") as file:
        file.write("{broken\n")
    with Memory(":memory:", embedder="none") as other:
        with pytest.raises(InvalidInput, match="line 602"):
            other.load(tmp_path / "out")
        assert other.list() == []


def test_what_is_loaded_is_redacted(tmp_path: Path, memory: Memory) -> None:
    [record] = memory.add("I am ana@secret.example", metadata={"cc": "bo@secret.example"})
    memory.update(record.id, "I was ana@secret.example")
    memory.export(tmp_path / "out", vectors=True)
    with Memory(tmp_path / "memory", embedder="hash", redact="email") as other:
        other.load(tmp_path / "out")
        assert [version.text for version in other.history(record.id)] == ["I am [email]", "I was [email]"]
        assert other.list()[0].metadata == {"cc": "[email]"}
    files = [file for file in (tmp_path / "memory").rglob("*") if file.is_file()]
    assert not [file for file in files if b"secret.example" in file.read_bytes()]


def test_a_link_to_what_the_handle_does_not_see_is_dropped(tmp_path: Path, memory: Memory) -> None:
    [foreign] = memory.scope(user="bo").add("bo's")
    [mine] = memory.scope(user="ana").add("ana's")
    memory.scope(user="ana").export(tmp_path / "out")
    memory.forget(mine.id)
    header, line = (tmp_path / "out").read_text().splitlines()
    changed = json.loads(line) | {"supersedes": [foreign.id], "from": [foreign.id]}
    changed["record"]["id"] = "0" * 32
    (tmp_path / "out").write_text(header + "\n" + json.dumps(changed))
    assert memory.scope(user="ana").load(tmp_path / "out") == 1
    assert len(memory.history("0" * 32)) == 1
    assert memory.forget(foreign.id).records == [foreign.id]


# ---- plain JSON lines ------------------------------------------------------------------------------------------------


def test_plain_lines_come_in_once_with_their_scopes(tmp_path: Path, memory: Memory) -> None:
    lines: list[Any] = [
        {"text": "I like tea", "at": "2024-01-01", "metadata": {"n": 1}, "user": "ana"},
        {"content": "Noted.", "role": "assistant", "name": "Helper", "user": "ana", "session": "s"},
        {"text": "same"},
        {"text": "same"},
        "only a text",
        {"text": "with an id", "id": 7},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    assert memory.load(path) == 6
    assert memory.load(path) == memory.load(path, "jsonl") == 0
    [tea] = memory.list({"n": 1})
    assert (tea.scope, tea.source, tea.role) == (Scope(user="ana"), "import", "user")
    [said] = memory.list({"name": "Helper"})
    assert (said.text, said.role, said.scope.session) == ("Noted.", "assistant", "s")
    assert [record.text for record in memory.list()][2:4] == ["same", "same"]
    memory.forget(tea.id)
    assert memory.load(path) == 0


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "5",
        '{"text": ""}',
        '{"text": 5}',
        "{}",
        '{"text": "a", "content": "b"}',
        '{"text": "a", "colour": 1}',
        '{"text": "a", "role": "boss"}',
        '{"text": "a", "at": "yesterday"}',
        '{"text": "a", "user": 5}',
        '{"text": "a\\u0000"}',
        '{"text": "\\ud800"}',
        "[" * 100_000,
    ],
)
def test_a_line_that_is_not_understood_is_named_and_nothing_comes_in(tmp_path: Path, memory: Memory, line: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises((InvalidInput, ScopeError), match="line 2"):
        memory.load(path)
    assert memory.list() == []


def test_a_bound_handle_takes_nobody_elses(tmp_path: Path, memory: Memory) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "not mine", "user": "bo"}\n', encoding="utf-8")
    with pytest.raises(ScopeError):
        memory.scope(user="ana").load(path)
    assert memory.list() == []


def test_links_pipes_and_devices_are_refused(tmp_path: Path, memory: Memory) -> None:
    real = tmp_path / "real.jsonl"
    real.write_text('{"text": "fine"}')
    (tmp_path / "link").symlink_to(real)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").symlink_to(GOLDEN / "chatgpt")
    for path in (tmp_path / "link", tmp_path / "pipe", Path("/dev/zero"), tmp_path / "folder"):
        for kind in ("auto", "agentmem", "jsonl", "mem0", "chatgpt"):
            with pytest.raises(InvalidInput):
                memory.load(path, kind)


# ---- ChatGPT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["chatgpt", "chatgpt/conversations.json"])
def test_chatgpt_comes_with_the_branch_that_was_shown(memory: Memory, path: str) -> None:
    assert memory.load(GOLDEN / path) == 4
    assert memory.load(GOLDEN / path, "chatgpt") == 0
    told = memory.list()
    assert [(r.role, r.text) for r in told] == [
        ("user", "I'm allergic to peanuts. What can I snack on?"),
        ("assistant", "Try apple slices.\nOr rice cakes."),
        ("tool", "search results"),
        ("user", "And this one?"),
    ]
    assert {r.scope.session for r in told} == {"Snack ideas (6655f1b0-0000-8000-8000-000000000001)"}
    assert [r.trust for r in told] == ["trusted", "trusted", "untrusted", "trusted"]
    assert told[0].at is not None
    assert told[0].at.timestamp() == 1717200000.5


def test_a_chatgpt_export_that_runs_in_circles_ends(tmp_path: Path, memory: Memory) -> None:
    node = {"message": {"author": {"role": "user"}, "content": {"parts": ["hello"]}}, "children": []}
    mapping = {"a": {**node, "parent": "b"}, "b": {**node, "parent": "a"}}
    (tmp_path / "conversations.json").write_text(json.dumps([{"id": "x", "mapping": mapping, "current_node": "a"}]))
    assert memory.load(tmp_path) == 2


# ---- mem0 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["mem0_faiss", "mem0_qdrant", "mem0_faiss/store", "mem0_qdrant/store"])
def test_mem0_comes_with_its_scopes_and_metadata(memory: Memory, store: str) -> None:
    assert memory.load(GOLDEN / store) == 4
    assert memory.load(GOLDEN / store, "mem0") == 0
    by_text = {record.text: record for record in memory.list()}
    peanuts = by_text["I am allergic to peanuts."]
    assert peanuts.scope == Scope(user="ana", session="s1")
    assert (peanuts.metadata, peanuts.source, peanuts.role) == ({"topic": "food", "n": 3}, "mem0", "user")
    assert by_text["I live in Porto, 2nd floor — ção ☕"].scope == Scope(user="ana", agent="helper")
    dog = by_text["My dog is called Max."]
    assert (dog.scope, dog.name) == (Scope(user="bo"), "Bo")
    versions = [version.text for version in memory.history(dog.id)]
    assert versions == (["My dog is called Rex."] if "/" not in store else []) + ["My dog is called Max."]


def test_a_lost_vector_store_of_mem0_leaves_its_history(memory: Memory) -> None:
    assert memory.load(GOLDEN / "mem0_faiss" / "history.db") == 4
    assert "My dog is called Max." in [record.text for record in memory.list()]


def test_an_old_pickled_docstore_is_read_without_unpickling(tmp_path: Path, memory: Memory) -> None:
    docstore = json.loads((GOLDEN / "mem0_faiss/store/mem0.json").read_text())
    for protocol in range(5):
        path = tmp_path / f"mem{protocol}.pkl"
        path.write_bytes(pickle.dumps((docstore["docstore"], docstore["index_to_id"]), protocol=protocol))
        assert memory.load(path) == (4 if protocol == 0 else 0)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def test_a_pickle_that_is_a_program_is_refused_and_never_run(
    tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"docstore": {"a": {"data": Evil()}}}, protocol=protocol))
        with pytest.raises(InvalidInput, match="not read"):
            memory.load(tmp_path / "evil.pkl")
    shutil.copytree(GOLDEN / "mem0_qdrant", tmp_path / "store")
    [file] = (tmp_path / "store").rglob("storage.sqlite")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE points SET point = ?", (pickle.dumps(Evil()),))
    connection.close()
    with pytest.raises(InvalidInput):
        memory.load(tmp_path / "store")
    assert not (tmp_path / "pwned").exists()
    assert memory.list() == []


def test_only_the_named_class_is_taken_and_as_a_state() -> None:
    data = pickle.dumps(Scope(user="ana"))
    with pytest.raises(InvalidInput):
        read_pickle(data)
    plain: Any = [{"a": (1, 2.5, None, True, b"x", "é" * 300)}, {1, 2}, frozenset(), (), (1,), (1, 2), (1, 2, 3), 2**80]
    for protocol in (4, 5):  # before 4 a set is made by a call
        assert read_pickle(pickle.dumps(plain, protocol=protocol)) == plain
    state = read_pickle(data, classes=[f"{Scope.__module__}.Scope"])
    assert type(state) is State
    assert state["user"] == "ana"


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-3], lambda d: b"", lambda d: d[5:], lambda d: b"\xff" + d, lambda d: d * 2]
)
def test_a_damaged_pickle_is_a_named_error(damage: Any) -> None:
    data = damage(pickle.dumps({"a": [1, 2, 3]}))
    with contextlib.suppress(InvalidInput):
        assert read_pickle(data) == {"a": [1, 2, 3]}  # what follows the end is not read


@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 200))
def test_any_bytes_are_data_or_a_named_error(junk: bytes, start: int, length: int) -> None:
    data = pickle.dumps({"docstore": {"a": {"data": "x", "n": [1, 2.5, (3, {4})]}}}, protocol=4)
    with contextlib.suppress(InvalidInput):
        read_pickle(data[:start] + junk + data[start + length :])


def test_a_pickle_that_grows_when_it_is_read_stays_small(tmp_path: Path, memory: Memory) -> None:
    bomb: Any = ["lol"] * 10
    for _ in range(60):
        bomb = [bomb] * 10
    path = tmp_path / "bomb.pkl"
    path.write_bytes(pickle.dumps({"docstore": {"a": {"data": "x", "more": bomb}}}))
    with pytest.raises(InvalidInput):
        memory.load(path)
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    keyed = b"\x80\x04}(" + pickle.dumps(nested, protocol=4)[2:-1] + b"K\x01u."
    with pytest.raises(InvalidInput, match="key"):
        read_pickle(keyed)


@pytest.mark.parametrize("name", ["history.db", "store/collection/mem0/storage.sqlite"])
def test_a_damaged_store_of_mem0_is_a_named_error(tmp_path: Path, memory: Memory, name: str) -> None:
    data = (GOLDEN / "mem0_qdrant" / name).read_bytes()
    path = tmp_path / Path(name).name
    for at in range(100, len(data), 997):
        path.write_bytes(data[:at] + b"\xff\x00\xff" + data[at + 3 :])
        with contextlib.suppress(InvalidInput):
            memory.load(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidInput):
        memory.load(path)
