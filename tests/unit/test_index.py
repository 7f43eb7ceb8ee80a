"""The vector index: in step with the database, rebuilt when in doubt, leaving nothing that was erased."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.database import Database
from agentmem.errors import Incompatible, InvalidInput, StoreError
from agentmem.plaintext import index as module
from agentmem.plaintext.index import VectorIndex, open_space
from agentmem.plaintext.records import Records, drafts
from agentmem.types import Record, Scope

DIMENSION = 16


class Store:
    """A folder with records that have random vectors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = Database(folder / "memory.db")
        self.records = Records(self.database)
        self.space = open_space(self.database, "test", "digest", DIMENSION)
        self.vectors: dict[int, Any] = {}
        self.random = np.random.default_rng(len(self.database.query("SELECT * FROM records")))

    def add(self, count: int, tenant: str | None = None) -> list[Record]:
        vectors = self.random.normal(size=(count, DIMENSION)).astype(np.float32)
        texts = [f"text {n}" for n in range(count)]
        made = self.records.insert(drafts(texts, scope=Scope(tenant=tenant)), vectors, self.space)
        first = self.database.query("SELECT max(seq) FROM records")[0][0] - count + 1
        self.vectors.update({first + n: vector for n, vector in enumerate(vectors)})
        return made

    def index(self) -> VectorIndex:
        return VectorIndex(self.database, self.folder / "index", self.space, DIMENSION)

    def allowed(self) -> dict[str, Any]:
        groups: dict[str, list[int]] = {}
        for tenant, row in self.database.query("SELECT tenant, seq FROM records"):
            groups.setdefault(tenant, []).append(row)
        return {tenant: np.array(rows) for tenant, rows in groups.items()}

    def files(self) -> dict[str, bytes]:
        folder = self.folder / "index"
        return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    yield made
    with contextlib.suppress(StoreError):
        made.database.close()


@pytest.fixture(params=["faiss", "numpy"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "_faiss_works", lambda: request.param == "faiss")
    return str(request.param)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("few", [0, 1000])
def test_search_is_exact_within_what_is_allowed(few: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW", few)
    store.add(200)
    store.add(100, tenant="other")
    index = store.index()
    for trial in range(20):
        query = store.random.normal(size=DIMENSION).astype(np.float32)
        pick = store.random.choice(np.arange(1, 301), 1 + 7 * trial, replace=False)
        rows, scores = index.search(query, 10, {"": pick[pick <= 200], "other": pick[pick > 200]})
        expected = sorted(pick.tolist(), key=lambda row: -float(store.vectors[row] @ query))[:10]
        assert rows.tolist() == expected
        assert np.allclose(scores, [store.vectors[row] @ query for row in expected], atol=1e-5)


@pytest.mark.usefixtures("engine")
def test_scores_are_those_of_search_and_unknown_rows_have_none(store: Store) -> None:
    store.add(30)
    index = store.index()
    query = store.vectors[3]
    scores = index.scores(query, {"": np.array([1, 3, 99])})
    assert scores.keys() == {1, 3}
    assert scores[3] == pytest.approx(float(query @ query), rel=1e-5)
    assert index.search(query, 5, {})[0].tolist() == []
    assert index.search(query, 5, {"nobody": np.array([7])})[0].tolist() == []
    assert index.search(query, 10**9, store.allowed())[0].size == 30


@pytest.mark.usefixtures("engine")
def test_adding_changing_and_deleting_are_seen_by_the_next_search(store: Store) -> None:
    store.add(5)
    index = store.index()
    assert index.search(store.vectors[1], 1, store.allowed())[0].tolist() == [1]
    [sixth] = store.add(1)
    assert index.search(store.vectors[6], 1, store.allowed())[0].tolist() == [6]
    moved = -10 * store.vectors[6]
    store.records.update(sixth.id, Scope(), text="moved", vectors=moved[None], space=store.space)
    assert index.search(moved, 1, store.allowed())[0].tolist() == [6]
    store.records.delete([sixth.id])
    assert index.search(moved, 6, {"": np.arange(1, 7)})[0].tolist() != [6]
    assert (index.count(), index.verify()) == (5, [])


def test_what_another_process_commits_is_seen(store: Store) -> None:
    store.add(3)
    index = store.index()
    assert index.count() == 3
    code = (
        "import sys, numpy as np\n"
        "from agentmem.database import Database\n"
        "from agentmem.plaintext.records import Records, drafts\n"
        "from agentmem.types import Scope\n"
        "records = Records(Database(sys.argv[1]))\n"
        "records.insert(drafts('new', scope=Scope()), np.full((1, 16), 9, np.float32), 1)\n"
        "records.delete([records.list(Scope())[0].id])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(store.folder / "memory.db")], check=True, timeout=60)
    rows, _ = index.search(np.ones(DIMENSION, np.float32), 9, store.allowed())
    assert rows[0] == 4
    assert sorted(rows.tolist()) == [2, 3, 4]


@pytest.mark.parametrize(
    "vector", [np.ones(3), np.full(DIMENSION, np.nan), np.full(DIMENSION, np.inf), np.ones((2, DIMENSION))]
)
def test_a_bad_query_vector_is_refused(vector: Any, store: Store) -> None:
    with pytest.raises(InvalidInput):
        store.index().search(vector, 1, {})


def saved(store: Store) -> None:
    index = store.index()
    index.search(np.ones(DIMENSION, np.float32), 1, store.allowed())
    index.close()


def loads(store: Store, monkeypatch: pytest.MonkeyPatch) -> bool:
    """True if a new index uses its file, False if it is built from the database."""
    built: list[str] = []
    original = VectorIndex._stored

    def counted(self: VectorIndex, tenant: str) -> Any:
        built.append(tenant)
        return original(self, tenant)

    monkeypatch.setattr(VectorIndex, "_stored", counted)
    index = store.index()
    rows, _ = index.search(store.vectors[max(store.vectors)], 1, store.allowed())
    used = not built
    assert rows.size == 1
    assert rows[0] == max(store.vectors)
    index.save()
    assert index.verify() == []
    monkeypatch.setattr(VectorIndex, "_stored", original)
    return used


def test_a_saved_index_is_used_again_and_caught_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = store.add(20)
    saved(store)
    names = store.files()
    assert len(names) == 2
    assert loads(store, monkeypatch)
    store.records.delete([made[0].id])
    store.add(3)
    assert loads(store, monkeypatch)


DAMAGES = ["flip", "half", "empty", "junk", "manifest gone", "manifest junk", "manifest list", "file gone", "count"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_rebuilt_with_a_logged_line(
    damage: str, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.add(20)
    saved(store)
    [path] = (store.folder / "index").glob("*.faiss")
    manifest, data = path.with_suffix(".json"), bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "half":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "junk":
        path.write_bytes(os.urandom(500))
    elif damage == "manifest gone":
        manifest.unlink()
    elif damage == "manifest junk":
        manifest.write_bytes(b"\xff\x00{")
    elif damage == "manifest list":
        manifest.write_text("[1]")
    elif damage == "file gone":
        path.unlink()
    elif damage == "count":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "count": 19}))
    caplog.set_level("WARNING", "agentmem")
    assert not loads(store, monkeypatch)
    assert damage in ("manifest gone", "file gone") or "rebuilding" in caplog.text


def test_a_file_of_another_history_is_not_used(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(10)
    store.database.close()
    shutil.copy(tmp_path / "memory.db", tmp_path / "backup.db")
    first = Store(tmp_path)
    first.vectors = store.vectors
    first.add(5)
    saved(first)
    first.database.close()
    # The backup comes back, and as many records are added to it: the same numbers, other vectors.
    os.replace(tmp_path / "backup.db", tmp_path / "memory.db")
    second = Store(tmp_path)
    second.random = np.random.default_rng(99)
    second.add(5)
    assert not loads(second, monkeypatch)
    second.database.close()


def test_an_index_older_than_the_kept_changes_is_rebuilt(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(10)
    saved(store)
    running = store.index()
    assert running.count() == 10
    store.add(5)
    with store.database.write() as connection:
        connection.execute("DELETE FROM changes WHERE change <= 12")
    assert not loads(store, monkeypatch)
    assert (running.count(), running.verify()) == (15, [])


def test_a_tenants_name_never_becomes_a_path(store: Store) -> None:
    for tenant in ("../../escape", "/etc/passwd", "con", "a" * 500):
        store.add(1, tenant=tenant)
    saved(store)
    assert len(store.files()) == 8
    assert all(len(name.split(".")[0]) == 32 for name in store.files())


def test_rewrite_leaves_no_erased_vector_in_any_file(store: Store) -> None:
    made = store.add(10)
    store.add(5, tenant="idle")
    saved(store)
    (store.folder / "index" / "left.faiss.77.tmp").write_bytes(store.vectors[4].tobytes())
    assert any(store.vectors[4].tobytes() in data for data in store.files().values())
    index = store.index()
    index.count()
    store.records.delete([made[3].id])
    index.rewrite()
    assert not any(store.vectors[4].tobytes() in data for data in store.files().values())
    assert any(store.vectors[5].tobytes() in data for data in store.files().values())
    assert index.verify() == []


def test_an_index_saved_late_by_another_handle_holds_nothing_erased(store: Store) -> None:
    made = store.add(10)
    other = store.index()
    other.count()
    store.records.delete([made[3].id])
    store.index().rewrite()
    other.close()
    assert not any(store.vectors[4].tobytes() in data for data in store.files().values())


def test_files_are_private(store: Store) -> None:
    store.add(1)
    saved(store)
    for path in (store.folder / "index").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    assert (store.folder / "index").stat().st_mode & 0o777 == 0o700


def test_a_full_disk_costs_the_file_and_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.add(5)
    index = store.index()
    index.count()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    index.save()
    assert "not saved" in caplog.text
    assert store.files() == {}
    with pytest.raises(StoreError):
        index.rewrite()
    monkeypatch.undo()
    assert index.search(store.vectors[2], 1, store.allowed())[0].tolist() == [2]


def test_verify_names_what_does_not_fit(store: Store) -> None:
    store.add(5)
    index = store.index()
    index.count()
    with store.database.write() as connection:
        connection.execute("UPDATE vectors SET vector = (SELECT vector FROM vectors WHERE seq = 2) WHERE seq = 1")
    assert index.verify() != []


def test_a_damaged_vector_is_left_out_and_logged(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.add(5)
    with store.database.write() as connection:
        connection.execute("UPDATE vectors SET vector = zeroblob(64) WHERE seq = 1")
    assert store.index().count() == 4
    assert "damaged" in caplog.text


def test_one_digest_has_one_dimension(store: Store) -> None:
    assert open_space(store.database, "renamed", "digest", DIMENSION) == store.space
    assert open_space(store.database, "test", "another digest", DIMENSION) != store.space
    with pytest.raises(Incompatible):
        open_space(store.database, "test", "digest", DIMENSION + 1)


def test_spaces_are_never_mixed(store: Store) -> None:
    store.add(5)
    other = VectorIndex(
        store.database, store.folder / "index", open_space(store.database, "b", "b", DIMENSION), DIMENSION
    )
    assert other.count() == 0


def test_threads_search_while_others_add_and_delete(store: Store) -> None:
    index = store.index()
    store.add(50)
    failures: list[BaseException] = []

    def search() -> None:
        try:
            for _ in range(50):
                rows, scores = index.search(np.ones(DIMENSION, np.float32), 10, store.allowed())
                assert len(rows) == 10
                assert sorted(scores.tolist(), reverse=True) == scores.tolist()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        made = store.add(3)
        store.records.delete([made[0].id])
    for thread in threads:
        thread.join()
    assert failures == []
    assert (index.count(), index.verify()) == (90, [])
