"""The vector index: in step with the database, rebuilt when in doubt, leaving nothing that was erased."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.database import Database
from agentmem.errors import Incompatible, InvalidInput, StoreError
from agentmem.plaintext import index as module
from agentmem.plaintext import ivf, shards
from agentmem.plaintext.catalog import Catalog
from agentmem.plaintext.exact import fresh
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
        self.catalog = Catalog(self.database)
        self.space = open_space(self.database, "test", "digest", DIMENSION)
        self.vectors: dict[int, Any] = {}
        self.random = np.random.default_rng(len(self.database.query("SELECT * FROM records")))

    def add(self, count: int, tenant: str | None = None, user: str | None = None) -> list[Record]:
        vectors = self.random.normal(size=(count, DIMENSION)).astype(np.float32)
        texts = [f"text {n}" for n in range(count)]
        made = self.records.insert(drafts(texts, scope=Scope(tenant=tenant, user=user)), vectors, self.space)
        first = self.database.query("SELECT max(seq) FROM records")[0][0] - count + 1
        self.vectors.update({first + n: vector for n, vector in enumerate(vectors)})
        return made

    def index(self) -> VectorIndex:
        return VectorIndex(self.database, self.folder / "index", self.space, DIMENSION)

    def search(
        self, index: VectorIndex, query: Any, k: int, rows: Any = None, scope: Scope | None = None
    ) -> tuple[Any, Any]:
        """Row numbers and scores of what is found, among the given rows."""
        view = self.catalog.view(scope.tenant if scope else None)
        allowed = view.allowed(scope or Scope(), 0.0)
        if rows is not None:
            allowed = allowed & np.isin(view.seq, rows)
        places, scores = index.search(query, k, view, allowed)
        return view.seq[places], scores

    def best(self, query: Any, k: int, rows: Any) -> list[int]:
        """The same, by comparing all."""
        return sorted(np.asarray(rows).tolist(), key=lambda row: -float(self.vectors[row] @ query))[:k]

    def files(self) -> dict[str, bytes]:
        folder = self.folder / "index"
        return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    yield made
    with contextlib.suppress(StoreError):
        made.database.close()


@pytest.fixture(params=["exact", "lists"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether vectors are compared one by one or lie in inverted lists."""
    if request.param == "lists":
        monkeypatch.setattr(module, "EXACT", 20)
        monkeypatch.setattr(module, "FEW", 4)
    return str(request.param)


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base from twenty vectors on, all of whose lists are looked into."""
    monkeypatch.setattr(module, "EXACT", 20)
    monkeypatch.setattr(module, "FEW", 0)
    monkeypatch.setattr(ivf, "RECALL", 1.1)


def built(store: Store) -> VectorIndex:
    """An index with a base of all that is there."""
    index = store.index()
    index.count()
    index.compact()
    return index


def based(index: VectorIndex, tenant: str = "") -> int:
    """How many vectors lie in the base of a tenant's loaded shard."""
    index.count(tenant)
    base = index._shards[tenant].base
    return 0 if base is None else len(base)


@pytest.mark.usefixtures("lists")
def test_small_is_exact_and_large_has_lists(store: Store) -> None:
    store.add(300)
    for tenant in ("other", "third"):
        store.add(10, tenant=tenant)
    index = built(store)
    assert (index.count(), index.count("other")) == (300, 10)
    assert (based(index), based(index, "other")) == (300, 0)
    [large, small] = index.facts()
    assert "100.0% of the ten nearest" in large
    assert "2 tenants: all compared" in small


@pytest.mark.parametrize("parts", [1, 3])
def test_search_is_exact_within_what_is_allowed(parts: int, kind: str, store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(ivf, "RECALL", 1.1)
    store.add(300)
    store.add(100, tenant="other")
    if parts > 1:
        with store.database.write() as connection:
            for part in range(1, parts):
                connection.execute(
                    "INSERT INTO vectors SELECT seq, space, ?, start, stop, vector, checksum FROM vectors "
                    "WHERE part = 0 AND seq % 2 = 0",
                    (part,),
                )
    index = built(store)
    assert based(index) == (0 if kind == "exact" else 300 if parts == 1 else 600)
    for trial in range(25):
        query = store.random.normal(size=DIMENSION).astype(np.float32)
        pick = store.random.choice(np.arange(1, 401), 1 + 14 * trial, replace=False)
        rows, scores = store.search(index, query, 10, pick)
        assert rows.tolist() == store.best(query, 10, pick)
        assert np.allclose(scores, [store.vectors[row] @ query for row in rows.tolist()], atol=1e-5)


def test_the_best_passage_counts(store: Store) -> None:
    store.add(3)
    passage = np.full(DIMENSION, 3, np.float32)
    with store.database.write() as connection:
        connection.execute(
            "INSERT INTO vectors VALUES (2, ?, 1, 0, 1, ?, ?)",
            (store.space, passage.tobytes(), zlib.crc32(passage.tobytes())),
        )
    index = store.index()
    rows, scores = store.search(index, passage, 3)
    assert (rows[0], scores[0]) == (2, pytest.approx(9.0 * DIMENSION))
    view = store.catalog.view(None)
    assert index.scores(passage, view, view.places([2]))[0] == pytest.approx(9.0 * DIMENSION)
    assert np.allclose(index.vectors(view, view.places([2]))[0], (store.vectors[2] + passage) / 2)


def test_scores_are_those_of_search_and_rows_without_vectors_have_none(kind: str, store: Store) -> None:
    near = {"exact": 1e-5, "lists": 0.1}[kind]  # of vectors about 4 long, in codes of 8 bits
    store.add(60)
    store.records.insert(drafts("no vector", scope=Scope()))
    index = built(store)
    query = store.vectors[3]
    view = store.catalog.view(None)
    places = view.places([61, 3, 1, 3])
    for _ in range(2):  # before and after a search that left its scores behind
        found = index.scores(query, view, places)
        assert np.isnan(found[0])
        assert np.allclose(found[1:], [store.vectors[row] @ query for row in (3, 1, 3)], atol=near)
        store.search(index, query, 2)
    vectors = index.vectors(view, places)
    assert np.isnan(vectors[0]).all()
    assert np.allclose(vectors[1], store.vectors[3], atol=near)
    assert store.search(index, query, 5, [])[0].tolist() == []
    assert store.search(index, query, 10**9)[0].size == 60


@pytest.mark.usefixtures("kind")
def test_adding_changing_and_deleting_are_seen_by_the_next_search(store: Store) -> None:
    made = store.add(40)
    index = built(store)
    assert store.search(index, store.vectors[1], 1)[0].tolist() == store.best(store.vectors[1], 1, range(1, 41))
    [last] = store.add(1)
    store.vectors[41] *= 10
    store.records.update(last.id, Scope(), text="more", vectors=store.vectors[41][None], space=store.space)
    assert store.search(index, store.vectors[41], 1)[0].tolist() == [41]
    moved = -20 * store.vectors[41]
    for record, row in ((last, 41), (made[4], 5)):
        store.records.update(record.id, Scope(), text="moved", vectors=moved[None], space=store.space)
        assert store.search(index, moved, 1)[0].tolist() == [row]
        assert (index.count(), index.verify()) == (41, [])
        store.records.delete([record.id])
        assert row not in store.search(index, moved, 41)[0].tolist()
        store.add(1)
    assert (index.count(), index.verify()) == (41, [])
    index.compact()
    assert (index.count(), index.verify()) == (41, [])


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
    rows, _ = store.search(index, np.ones(DIMENSION, np.float32), 9)
    assert rows[0] == 4
    assert sorted(rows.tolist()) == [2, 3, 4]


@pytest.mark.parametrize(
    "vector", [np.ones(3), np.full(DIMENSION, np.nan), np.full(DIMENSION, np.inf), np.ones((2, DIMENSION))]
)
def test_a_bad_query_vector_is_refused(vector: Any, store: Store) -> None:
    with pytest.raises(InvalidInput):
        store.search(store.index(), vector, 1)


@pytest.mark.parametrize("exact", [100, 1000])
def test_a_small_tenant_or_user_finds_beside_a_large_one_what_it_finds_alone(
    exact: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXACT", exact)
    monkeypatch.setattr(module, "FEW", 4)
    (tmp_path / "alone").mkdir()
    (tmp_path / "beside").mkdir()
    alone, beside = Store(tmp_path / "alone"), Store(tmp_path / "beside")
    beside.add(3000)
    beside.add(500, tenant="small", user="large")
    for store in (alone, beside):
        store.random = np.random.default_rng(5)
        store.add(30, tenant="small", user="one")
    one, two = indexes = built(alone), built(beside)
    assert (based(one, "small"), based(two, "small")) == (0, 530 if exact == 100 else 0)
    for _ in range(40):
        query = alone.random.normal(size=DIMENSION).astype(np.float32)
        scope = Scope(tenant="small", user="one")
        mine = alone.search(one, query, 10, scope=scope)
        beside_all = np.arange(3501, 3531)
        theirs = beside.search(two, query, 10, beside_all, scope=scope)
        assert (mine[0] + 3500).tolist() == theirs[0].tolist()
        assert np.allclose(mine[1], theirs[1], atol=1e-6)
    assert all(index.verify() == [] for index in indexes)


def saved(store: Store) -> None:
    built(store).close()


def loads(store: Store) -> bool:
    """True if a new index uses its file, False if it reads all from the database."""
    index = store.index()
    used = based(index) > 0
    last = max(store.vectors)
    rows, _ = store.search(index, store.vectors[last], 1)
    assert rows.tolist() == store.best(store.vectors[last], 1, [row[0] for row in store.database.query(SEQS)])
    index._halt()
    return used


SEQS = "SELECT seq FROM records"


@pytest.mark.usefixtures("lists")
def test_a_saved_index_is_used_again_and_caught_up(store: Store) -> None:
    made = store.add(40)
    saved(store)
    assert sorted(name.rsplit(".", 1)[1] for name in store.files()) == ["ivf", "json", "rows"]
    assert loads(store)
    store.records.delete([made[0].id])
    store.add(3)
    assert loads(store)
    index = store.index()
    assert (index.count(), index.verify()) == (42, [])


@pytest.mark.usefixtures("lists")
def test_adding_rewrites_no_file_but_the_manifest(store: Store) -> None:
    store.add(200)
    index = built(store)
    before = store.files()
    store.add(30)
    index.count()
    index.close()
    after = store.files()
    assert {name: data for name, data in before.items() if not name.endswith(".json")}.items() <= after.items()
    assert before.keys() == after.keys()
    again = store.index()
    assert (again.count(), again.verify(), based(again)) == (230, [], 200)


@pytest.mark.usefixtures("lists")
def test_a_manifest_says_what_changed_so_that_no_history_is_needed(store: Store) -> None:
    made = store.add(60)
    index = built(store)
    store.records.delete([made[3].id])
    store.records.update(made[5].id, Scope(), text="moved", vectors=store.vectors[9][None] * 2, space=store.space)
    store.add(2)
    index.count()
    index.close()
    with store.database.write() as connection:
        connection.execute("DELETE FROM changes WHERE change < (SELECT max(change) FROM changes)")
    again = store.index()
    assert (again.count(), again.verify(), based(again)) == (61, [], 60)


@pytest.mark.usefixtures("lists")
def test_a_base_that_grew_old_is_made_anew_while_searches_go_on(store: Store) -> None:
    store.add(40)
    index = store.index()
    for _ in range(3):
        store.search(index, store.vectors[1], 1)
        assert index._building is not None
        index._building.join(60)
        store.search(index, store.vectors[1], 1)
        held = based(index)
        assert held == index.count()
        store.add(60)
    assert (index.count(), index.verify()) == (220, [])
    index.close()


@pytest.mark.usefixtures("lists")
def test_closing_gives_up_a_base_that_is_being_made(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(100)
    waiting = threading.Event()
    original = ivf.Builder.add

    def slow(self: ivf.Builder, *arrays: Any) -> None:
        waiting.set()
        time.sleep(0.2)
        original(self, *arrays)

    monkeypatch.setattr(shards, "CHUNK", 5)
    monkeypatch.setattr(ivf.Builder, "add", slow)
    before = set(threading.enumerate())  # another test's server may still be running
    index = store.index()
    store.search(index, store.vectors[1], 1)
    assert waiting.wait(60)
    index.close()
    assert store.files() == {}
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("lists")
def test_vectors_erased_while_a_base_is_made_are_not_in_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = store.add(100)
    original = ivf.Builder.add

    def meanwhile(self: ivf.Builder, *arrays: Any) -> None:
        original(self, *arrays)
        store.records.delete([made[7].id])

    monkeypatch.setattr(ivf.Builder, "add", meanwhile)
    index = built(store)
    assert (index.count(), index.verify()) == (99, [])
    assert nearest(store, store.vectors[8]) > 0.01


@pytest.mark.usefixtures("lists")
def test_a_base_that_can_not_be_made_is_logged_and_not_tried_at_every_search(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.add(40)
    tried: list[int] = []

    def fails(*arguments: Any) -> None:
        tried.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ivf.Builder, "write", fails)
    index = store.index()
    for _ in range(3):
        assert store.search(index, store.vectors[2], 1)[0].tolist() == store.best(store.vectors[2], 1, range(1, 41))
        if index._building is not None:
            index._building.join(60)
    assert len(tried) == 1
    assert "one by one" in caplog.text


def test_without_faiss_everything_is_exact(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT", 20)
    monkeypatch.setattr(ivf, "faiss_works", lambda: False)
    store.add(60)
    index = built(store)
    assert store.search(index, store.vectors[5], 3)[0].tolist() == store.best(store.vectors[5], 3, range(1, 61))
    assert (store.files(), index.verify()) == ({}, [])


DAMAGES = ["flip", "half", "empty", "junk", "rows flip", "rows gone", "file gone", "manifest gone", "manifest junk"]


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("damage", [*DAMAGES, "manifest list", "manifest lacks", "count", "another embedder"])
def test_a_damaged_file_is_not_used_and_that_is_logged(
    damage: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.add(40)
    saved(store)
    folder = store.folder / "index"
    [path], [rows], [manifest] = (list(folder.glob(f"*.{end}")) for end in ("ivf", "rows", "json"))
    data, said = bytearray(path.read_bytes()), json.loads(manifest.read_text())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "half":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "junk":
        path.write_bytes(os.urandom(500))
    elif damage == "rows flip":
        rows.write_bytes(rows.read_bytes()[:-1] + b"\x07")
    elif damage == "manifest junk":
        manifest.write_bytes(b"\xff\x00{")
    elif damage == "manifest list":
        manifest.write_text("[1]")
    elif damage == "manifest lacks":
        manifest.write_text(json.dumps({key: value for key, value in said.items() if key != "probes"}))
    elif damage == "count":
        manifest.write_text(json.dumps({**said, "count": 39}))
    elif damage == "another embedder":
        manifest.write_text(json.dumps({**said, "digest": "other"}))
    else:
        {"rows gone": rows, "file gone": path, "manifest gone": manifest}[damage].unlink()
    caplog.set_level("WARNING", "agentmem")
    assert not loads(store)
    assert damage == "manifest gone" or "not used" in caplog.text
    saved(store)
    assert loads(store)
    assert store.index().verify() == []


@pytest.mark.usefixtures("lists")
def test_verify_names_a_file_damaged_while_it_is_open(store: Store) -> None:
    store.add(40)
    index = built(store)
    assert index.verify() == []
    [path] = (store.folder / "index").glob("*.ivf")
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    assert any("damaged" in line for line in index.verify())


@pytest.mark.usefixtures("lists")
def test_a_file_of_another_history_is_not_used(tmp_path: Path, store: Store) -> None:
    store.add(40)
    store.database.close()
    shutil.copy(tmp_path / "memory.db", tmp_path / "backup.db")
    first = Store(tmp_path)
    first.vectors = store.vectors
    first.add(5)
    saved(first)
    assert loads(first)
    first.database.close()
    # The backup comes back, and as many records are added to it: the same numbers, other vectors.
    os.replace(tmp_path / "backup.db", tmp_path / "memory.db")
    (tmp_path / "memory.id").unlink()
    second = Store(tmp_path)
    second.random, second.vectors = np.random.default_rng(99), {**store.vectors}
    second.add(5)
    assert not loads(second)
    second.database.close()


@pytest.mark.usefixtures("lists")
def test_an_index_older_than_the_kept_changes_is_rebuilt(store: Store) -> None:
    store.add(40)
    saved(store)
    running = store.index()
    assert running.count() == 40
    store.add(5)
    with store.database.write() as connection:
        connection.execute("DELETE FROM changes WHERE change <= 42")
    assert not loads(store)
    assert (running.count(), running.verify()) == (45, [])


@pytest.mark.usefixtures("lists")
def test_a_tenants_name_never_becomes_a_path(store: Store) -> None:
    for tenant in ("../../escape", "/etc/passwd", "con", "a" * 500):
        store.add(30, tenant=tenant)
    saved(store)
    assert len(store.files()) == 12
    assert all(len(name.split(".")[0].split("-")[0]) == 32 for name in store.files())


def nearest(store: Store, vector: Any) -> float:
    """The smallest angle (as 1 - cosine) between a vector and anything that the files hold: codes, centres, numbers."""
    faiss = pytest.importorskip("faiss")
    least = 2.0
    for name, data in store.files().items():
        assert vector.tobytes() not in data
        if name.endswith(".ivf"):
            index = faiss.read_index(str(store.folder / "index" / name))
            kept = []
            for number in range(index.nlist):
                for place in range(index.invlists.list_size(number)):
                    kept.append(np.empty(DIMENSION, np.float32))
                    index.reconstruct_from_offset(number, place, faiss.swig_ptr(kept[-1]))
            centres = [index.quantizer.reconstruct(n) for n in range(index.nlist)]
            for other in [*kept, *centres]:
                length = float(np.linalg.norm(other) * np.linalg.norm(vector))
                least = min(least, 1 - float(other @ vector) / length if length else 2.0)
    return least


@pytest.mark.usefixtures("lists")
def test_rewrite_leaves_no_erased_vector_in_any_file(store: Store) -> None:
    made = store.add(60)
    store.add(50, tenant="idle")
    saved(store)
    (store.folder / "index" / "left.ivf.77.tmp").write_bytes(store.vectors[4].tobytes())
    assert any(store.vectors[4].tobytes() in data for data in store.files().values())
    index = store.index()
    index.count()
    store.records.delete([made[3].id])
    index.rewrite()
    assert nearest(store, store.vectors[4]) > 0.01
    assert nearest(store, store.vectors[5]) < 0.001
    assert (index.count(), index.verify(), based(index)) == (59, [], 60)
    assert loads(store)


@pytest.mark.usefixtures("lists")
def test_a_vector_alone_in_its_list_leaves_with_the_list_s_centre(store: Store) -> None:
    store.add(60)
    far = np.zeros(DIMENSION, np.float32)
    far[3] = 30
    [record] = store.records.insert(drafts("far away", scope=Scope()), far[None], store.space)
    index = built(store)
    assert nearest(store, far) < 0.001
    store.records.delete([record.id])
    index.rewrite()
    assert nearest(store, far) > 0.01


@pytest.mark.usefixtures("lists")
def test_an_index_saved_late_by_another_handle_holds_nothing_erased(store: Store) -> None:
    made = store.add(60)
    other = built(store)
    store.records.delete([made[3].id])
    mine = store.index()
    mine.count()
    mine.rewrite()
    other.count()
    other.close()
    assert nearest(store, store.vectors[4]) > 0.01
    assert loads(store)


@pytest.mark.usefixtures("lists")
def test_files_are_private(store: Store) -> None:
    store.add(30)
    saved(store)
    assert len(store.files()) == 3
    for path in (store.folder / "index").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    assert (store.folder / "index").stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("lists")
def test_a_full_disk_costs_the_file_and_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = store.add(40)
    index = built(store)
    before = store.files()
    store.records.delete([made[0].id])
    index.count()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    index.save()
    assert "not saved" in caplog.text
    assert store.files() == before
    with pytest.raises(StoreError):
        index.rewrite()
    monkeypatch.undo()
    assert store.search(index, store.vectors[2], 1)[0].tolist() == store.best(store.vectors[2], 1, range(2, 41))
    index.rewrite()
    assert nearest(store, store.vectors[1]) > 0.01


def test_verify_names_what_does_not_fit(store: Store) -> None:
    store.add(5)
    index = store.index()
    index.count()
    with store.database.write() as connection:
        connection.execute(
            "UPDATE vectors SET (vector, checksum) = (SELECT vector, checksum FROM vectors WHERE seq = 2)"
        )
    assert index.verify() != []


@pytest.mark.usefixtures("lists")
def test_verify_names_a_vector_that_a_base_lacks(store: Store) -> None:
    store.add(40)
    index = built(store)
    with store.database.write() as connection:
        connection.execute(
            "INSERT INTO vectors SELECT seq, space, 1, 0, 0, vector, checksum FROM vectors WHERE seq = 3"
        )
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


@pytest.mark.usefixtures("kind")
def test_threads_search_while_others_add_and_delete(store: Store) -> None:
    index = store.index()
    store.add(50)
    failures: list[BaseException] = []

    def search() -> None:
        try:
            for _ in range(50):
                rows, scores = store.search(index, np.ones(DIMENSION, np.float32), 10)
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
    index.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_starts_with_a_free_lock(store: Store) -> None:
    store.add(5)
    index = store.index()
    index.count()
    with index._lock:
        child = os.fork()
        if child == 0:
            done: list[int] = []
            thread = threading.Thread(target=lambda: done.append(index.count()), daemon=True)
            thread.start()
            thread.join(20)
            os._exit(0 if done == [5] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_an_array_that_grows_is_its_process_s_own_and_empty_at_first() -> None:
    made = fresh((1000, 384), np.float32)
    assert made.shape == (1000, 384)
    assert made.dtype == np.float32
    assert not made.any()
    made[:] = 1
    child = os.fork()
    if child == 0:
        made[:] = 2
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (made == 1).all()
    assert fresh((0, 384), np.float32).shape == (0, 384)
