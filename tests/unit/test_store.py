"""The page store: what is kept is found, what is doubtful is a miss, what is forgotten is gone."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from agentmem.activation.identity import chain, digest
from agentmem.activation.pages import Layout, Page, stage_pages
from agentmem.activation.store import PageStore
from agentmem.database import Database
from agentmem.errors import Corrupt, Full, InvalidInput, NotFound, StoreError

GRID = 16
IDENTITY = digest({"weights": "w"})
TOKENS = list(range(GRID * 4 + 3))


def states(positions: int = GRID * 4, layers: int = 2) -> list[tuple[Any, Any]]:
    """K and V whose values say their position, so that a page in a wrong place shows."""
    steps = np.arange(positions, dtype=np.uint16)[None, :, None]
    return [
        (
            np.ascontiguousarray(np.broadcast_to(steps + 1000 * layer, (2, positions, 8))),
            np.ascontiguousarray(np.broadcast_to(steps + 1000 * layer + 500, (2, positions, 4))),
        )
        for layer in range(layers)
    ]


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Shelf:
    """A memory folder with a store, and the few moves that most tests make."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.options = folder, options
        self.database = Database(folder / "memory.db")
        self.clock = Clock()
        settings: dict[str, Any] = {"grid": GRID, "clock": self.clock, **options}
        self.store = PageStore(self.database, folder / "pages", **settings)
        self.view = self.store.view(b"salt")

    def seal(self, tokens: list[int] = TOKENS, records: Any = None, first: int = 0, identity: bytes = IDENTITY) -> int:
        count = len(tokens) // GRID
        layers = [(k[:, first * GRID :], v[:, first * GRID :]) for k, v in states(count * GRID)]
        return self.view.seal(identity, tokens, first, layers, (records or [("r",)] * count)[first:])

    def found(self, tokens: list[int] = TOKENS) -> int:
        """Pages that a provider gets to use: what is handed out, up to the first that can't be copied."""
        room = [(np.zeros((2, GRID, 8), np.uint16), np.zeros((2, GRID, 4), np.uint16)) for _ in range(2)]
        count = 0
        for page in self.view.longest(IDENTITY, tokens):
            try:
                page.read_layers([k for k, _ in room], [v for _, v in room], 0)
            except Corrupt:
                break
            count += 1
            wanted = states(count * GRID)
            for copies, sources in zip(room, wanted, strict=True):
                assert all((copy == source[:, -GRID:]).all() for copy, source in zip(copies, sources, strict=True))
        return count

    def files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "pages").iterdir() if path.suffix == ".page")

    def keys(self, tokens: list[int] = TOKENS) -> list[str]:
        return [key.hex() for key in chain(IDENTITY, b"salt", tokens, GRID)]

    def file(self, number: int) -> Path:
        return self.folder / "pages" / f"{self.keys()[number]}.page"

    def forget(self, record: str) -> list[str]:
        with self.database.write() as connection:
            connection.execute("INSERT INTO tombstones (record, at) VALUES (?, 0)", (record,))
        return self.store.delete(self.store.made_from([record]))

    def lineage(self) -> int:
        return int(self.database.query("SELECT COUNT(*) AS n FROM lineage WHERE kind = 'page'")[0]["n"])

    def reopened(self) -> Shelf:
        self.store.close()
        self.database.close()
        return Shelf(self.folder, **self.options)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


PAGE_BYTES = Layout.of(states(), GRID).page_bytes


# ---- keeping and finding


def test_sealed_pages_are_found_and_hold_their_states(shelf: Shelf) -> None:
    assert shelf.seal() == 4
    pages = shelf.reopened().view.longest(IDENTITY, TOKENS)
    assert [page.number for page in pages] == [0, 1, 2, 3]
    room = [(np.zeros_like(k), np.zeros_like(v)) for k, v in states()]
    for i, page in enumerate(pages):
        assert not page.verified  # checked while it is copied, not before
        page.read_layers([k for k, _ in room], [v for _, v in room], i * GRID)
        assert page.verified
    for copies, sources in zip(room, states(), strict=True):
        assert all((copy == source).all() for copy, source in zip(copies, sources, strict=True))


def test_the_longest_common_prefix_is_found(shelf: Shelf) -> None:
    shelf.seal()
    assert shelf.found(TOKENS[: GRID * 2 + 5]) == 2
    assert shelf.found([*TOKENS[: GRID * 3], 9, 9, 9, *range(60)]) == 3
    assert shelf.found([5, *TOKENS[1:]]) == 0
    assert shelf.found(TOKENS[: GRID - 1]) == 0
    assert shelf.found([]) == 0


def test_pages_are_added_behind_what_is_there(shelf: Shelf) -> None:
    assert shelf.seal(TOKENS[: GRID * 2]) == 2
    assert shelf.seal(first=2) == 2
    assert shelf.seal() == 0  # nothing new
    assert shelf.found() == 4
    assert len(shelf.files()) == 4


@pytest.mark.parametrize("other", ["identity", "salt", "grid"])
def test_other_circumstances_are_a_miss(shelf: Shelf, other: str) -> None:
    shelf.seal()
    store = shelf.store
    if other == "grid":
        store = PageStore(shelf.database, shelf.folder / "pages", grid=8, clock=shelf.clock)
    view = store.view(b"tlas" if other == "salt" else b"salt")
    identity = digest({"weights": "v"}) if other == "identity" else IDENTITY
    assert list(view.longest(identity, TOKENS)) == []
    assert shelf.found() == 4


def test_a_read_only_view_reads_and_keeps_nothing(shelf: Shelf) -> None:
    shelf.seal(TOKENS[:GRID])
    view = shelf.store.view(b"salt", writable=False)
    assert view.seal(IDENTITY, TOKENS, 0, states(), [("r",)] * 4) == 0
    assert len(view.longest(IDENTITY, TOKENS)) == 1
    assert view.grid == GRID


def test_arguments_that_do_not_fit_together_are_refused(shelf: Shelf) -> None:
    for layers, records, first in (
        (states(GRID), [("r",)] * 4, 0),
        (states(), [("r",)] * 3, 0),
        (states(), [("r",)] * 4, -1),
        ([(k.astype(np.float64), v) for k, v in states()], [("r",)] * 4, 0),
    ):
        with pytest.raises(InvalidInput):
            shelf.view.seal(IDENTITY, TOKENS, first, layers, records)
    assert shelf.store.entries() == []
    with pytest.raises(InvalidInput, match="multiple of 64"):
        PageStore(shelf.database, shelf.folder / "pages", grid=100)


def test_a_page_needs_its_parent(shelf: Shelf) -> None:
    assert shelf.seal(first=2) == 0
    assert shelf.files() == []
    assert shelf.lineage() == 0


def test_entries_tell_all_and_uses_are_counted(shelf: Shelf) -> None:
    shelf.seal(records=[("a",), ("a",), ("a", "b"), ("a", "b")])
    shelf.clock.now += 5
    shelf.found()
    shelf.found(TOKENS[:GRID])
    entries = shelf.store.entries()
    assert [entry.key for entry in entries] == shelf.keys()
    assert [entry.uses for entry in entries] == [2, 1, 1, 1]
    assert [entry.records for entry in entries] == [("a",), ("a",), ("a", "b"), ("a", "b")]
    assert {(entry.identity, entry.tokens, entry.bytes) for entry in entries} == {(IDENTITY.hex(), GRID, PAGE_BYTES)}
    assert {(entry.created, entry.used) for entry in entries} == {(1000.0, 1005.0)}
    assert shelf.store.bytes() == 4 * PAGE_BYTES == sum(path.stat().st_size for path in map(shelf.file, range(4)))


def test_a_closed_store_finds_and_keeps_nothing(shelf: Shelf) -> None:
    shelf.seal()
    shelf.store.close()
    shelf.store.close()
    assert shelf.found() == 0
    assert shelf.seal() == 0


# ---- damage


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the magic": lambda path: flip(path, 0),
    "a bit of the version": lambda path: flip(path, 8),
    "a bit of the header": lambda path: flip(path, 100),
    "a bit of the states": lambda path: flip(path, -1),
    "cut short": lambda path: os.truncate(path, 1000),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another page": lambda path: shutil.copy(min(path.parent.glob("*.page"), key=lambda p: p == path), path),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_page_is_a_miss_put_aside_and_kept_anew(
    shelf: Shelf, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.seal()
    assert shelf.found() == 4
    DAMAGES[name](shelf.file(2))
    assert shelf.found() == 2
    assert "put aside" in caplog.text
    assert shelf.keys()[2][:12] in caplog.text or "holds another page" in caplog.text
    assert len(list((shelf.folder / "pages" / "quarantine").iterdir())) == 1
    assert [entry.number for entry in shelf.store.entries()] == [0, 1]  # page 3 is of no use without page 2
    assert shelf.seal(first=2) == 2
    assert shelf.found() == 4
    assert shelf.store.verify() == []


def test_a_link_in_place_of_a_page_is_a_miss(shelf: Shelf) -> None:
    shelf.seal()
    real = shelf.file(2).rename(shelf.folder / "real")
    shelf.file(2).symlink_to(real)
    assert shelf.found() == 2


def test_a_missing_file_is_a_miss_and_its_row_is_swept(shelf: Shelf) -> None:
    shelf.seal()
    shelf.file(1).unlink()
    assert shelf.found() == 1
    assert [entry.number for entry in shelf.store.entries()] == [0]
    assert shelf.lineage() == 1
    assert len(shelf.files()) == 1


def test_a_file_without_a_row_is_a_miss_and_swept(shelf: Shelf) -> None:
    shelf.seal()
    with shelf.database.write() as connection:
        connection.execute("DELETE FROM pages WHERE number = 0")
    assert shelf.found() == 0
    again = shelf.reopened()
    assert again.files() == []
    assert again.lineage() == 0


def test_what_a_killed_process_left_is_swept_but_nothing_foreign(shelf: Shelf) -> None:
    shelf.seal()
    folder = shelf.folder / "pages"
    (folder / f"{'0' * 64}.{'1' * 16}.tmp").write_bytes(b"half a page")
    (folder / f"{'0' * 64}.page").write_bytes(b"no row")
    (folder / "notes.txt").write_text("mine")
    again = shelf.reopened()
    assert again.files() == sorted(path.name for path in map(shelf.file, range(4)))
    assert not list(folder.glob("*.tmp"))
    assert (folder / "notes.txt").exists()
    assert again.found() == 4


def test_no_sweep_while_pages_are_being_written(shelf: Shelf) -> None:
    temporary = shelf.folder / "pages" / f"{'0' * 64}.{'1' * 16}.tmp"
    temporary.write_bytes(b"half a page")
    with shelf.store._catalog.locked(exclusive=False) as held:
        assert held
        shelf.store._catalog.tidy()
        assert temporary.exists()
    shelf.store._catalog.tidy()
    assert not temporary.exists()


def test_quarantine_does_not_grow_for_ever(shelf: Shelf) -> None:
    for _ in range(12):
        shelf.seal(TOKENS[:GRID])
        flip(shelf.file(0), -1)
        assert shelf.found() == 0
    assert len(list((shelf.folder / "pages" / "quarantine").iterdir())) == 8


def test_verify_names_each_damaged_and_orphaned_file(shelf: Shelf) -> None:
    shelf.seal()
    assert shelf.store.verify() == []
    flip(shelf.file(3), -1)
    shelf.file(2).unlink()
    (shelf.folder / "pages" / f"{'0' * 64}.page").write_bytes(b"no row")
    (shelf.folder / "pages" / "notes.txt").write_text("mine")
    problems = "\n".join(shelf.store.verify())
    assert problems.count("\n") == 3
    assert f"{shelf.keys()[3]}.page: an extent fails its checksum" in problems
    assert f"{shelf.keys()[2]}.page is missing" in problems
    assert f"{'0' * 64}.page belongs to no stored page" in problems
    assert "notes.txt is not a file of this store" in problems


# ---- forgetting


def test_forgetting_a_record_deletes_every_page_made_from_it_and_all_behind(shelf: Shelf) -> None:
    shelf.seal(records=[("a",), ("a", "b"), ("a",), ("a",)])
    assert shelf.store.made_from(["nobody"]) == []
    assert shelf.store.made_from(["b"]) == shelf.keys()[1:]
    gone = shelf.forget("b")
    assert gone == shelf.keys()[1:]
    assert shelf.files() == [shelf.file(0).name]
    assert shelf.lineage() == 1
    assert shelf.found() == 1


def test_pages_of_a_forgotten_record_are_not_kept_again(shelf: Shelf) -> None:
    shelf.forget("b")
    assert shelf.seal(records=[("a",), ("a", "b"), ("a", "b"), ("a", "b")]) == 1
    assert shelf.found() == 1
    assert not list((shelf.folder / "pages").glob("*.tmp"))


def test_a_record_forgotten_while_its_page_is_written_is_not_kept(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = stage_pages

    def slow(*args: Any, **fields: Any) -> list[Path]:
        staged = original(*args, **fields)
        shelf.forget("b")
        monkeypatch.setattr("agentmem.activation.sealing.stage_pages", original)
        return staged

    monkeypatch.setattr("agentmem.activation.sealing.stage_pages", slow)
    assert shelf.seal(records=[("a",), ("a", "b"), ("a", "b"), ("a", "b")]) == 1
    assert shelf.files() == [shelf.file(0).name]
    assert not list((shelf.folder / "pages").glob("*.tmp"))


def test_a_page_deleted_between_commit_and_publication_does_not_come_back(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = shelf.store._catalog
    original = catalog.publish

    def late(staged: dict[bytes, Path]) -> int:
        assert len(shelf.forget("b")) == 3  # rows are there, files are not yet
        return original(staged)

    monkeypatch.setattr(catalog, "publish", late)
    shelf.seal(records=[("a",), ("a", "b"), ("a", "b"), ("a", "b")])
    assert shelf.files() == [shelf.file(0).name]
    assert shelf.found() == 1


def test_forgetting_reaches_into_quarantine(shelf: Shelf) -> None:
    shelf.seal(TOKENS[:GRID], records=[("secret",)])
    flip(shelf.file(0), -1)
    assert shelf.found() == 0
    quarantine = shelf.folder / "pages" / "quarantine"
    assert len(list(quarantine.iterdir())) == 1
    again = shelf.reopened()
    assert again.forget("secret") == again.keys(TOKENS[:GRID])
    assert list(quarantine.iterdir()) == []
    assert again.lineage() == 0


def test_lineage_grows_when_other_records_give_the_same_tokens(shelf: Shelf) -> None:
    shelf.seal(TOKENS[:GRID], records=[("a",)])
    assert shelf.seal(TOKENS[:GRID], records=[("twin",)]) == 0
    assert shelf.forget("twin") == shelf.keys(TOKENS[:GRID])
    assert shelf.files() == []


def test_pinned_pages_are_deleted_too(shelf: Shelf) -> None:
    shelf.seal()
    shelf.store.pin(shelf.keys())
    assert shelf.store.delete([shelf.keys()[0]]) == shelf.keys()
    assert shelf.files() == []
    assert shelf.store.delete([]) == []


@pytest.mark.parametrize("key", ["", "x", "../" * 20, "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_what_is_no_key_is_refused(shelf: Shelf, key: str) -> None:
    for move in (shelf.store.delete, shelf.store.pin, shelf.store.evict):
        with pytest.raises(InvalidInput, match="64 hex digits"):
            move([key])


# ---- the budget


def numbers(shelf: Shelf) -> list[int]:
    return [entry.number for entry in shelf.store.entries()]


def test_the_least_recently_used_chain_goes_first_from_its_end(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget_bytes=6 * PAGE_BYTES)
    first, second = TOKENS[: GRID * 4], [9] * GRID * 4
    shelf.seal(first)
    shelf.clock.now += 10
    shelf.seal(second)
    assert shelf.store.bytes() == 6 * PAGE_BYTES
    assert shelf.found(first) == 2
    assert shelf.found(second) == 4


def test_a_use_keeps_a_chain(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget_bytes=8 * PAGE_BYTES)
    first, second, third = ([n] * GRID * 4 for n in (1, 2, 3))
    for tokens in (first, second):
        shelf.clock.now += 10
        shelf.seal(tokens)
    shelf.clock.now += 10
    assert shelf.found(first) == 4
    shelf.clock.now += 10
    shelf.seal(third)
    assert [shelf.found(tokens) for tokens in (first, second, third)] == [4, 0, 4]


def test_of_equal_age_the_page_that_is_dearer_to_compute_stays(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget_bytes=1 << 30)
    deep, flat = TOKENS[: GRID * 4], [9] * GRID
    shelf.seal(deep)
    shelf.seal(flat)
    shelf.clock.now += 100
    assert shelf.store.evict(bytes=1) == 1
    assert shelf.found(flat) == 0
    assert shelf.found(deep) == 4


def test_pinned_pages_and_those_before_them_stay(shelf: Shelf) -> None:
    shelf.seal()
    shelf.store.pin([shelf.keys()[1]])
    assert shelf.store.evict(bytes=1 << 40) == 2
    assert numbers(shelf) == [0, 1]
    assert shelf.store.evict(shelf.keys()) == 0
    shelf.store.pin(shelf.keys(), False)
    assert shelf.store.evict(shelf.keys()[:1]) == 2
    assert shelf.files() == []


def test_evicting_by_key_takes_what_is_behind(shelf: Shelf) -> None:
    shelf.seal()
    assert shelf.store.evict() == 0
    assert shelf.store.evict([shelf.keys()[2]]) == 2
    assert numbers(shelf) == [0, 1]
    assert shelf.lineage() == 2


def test_a_chain_longer_than_the_budget_is_kept_as_far_as_it_fits(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget_bytes=3 * PAGE_BYTES - 1)
    assert shelf.seal() == 2
    assert shelf.found() == 2
    shelf.store.budget_bytes = PAGE_BYTES - 1
    assert shelf.seal([9] * GRID) == 0


def test_a_clock_that_goes_back_breaks_nothing(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget_bytes=4 * PAGE_BYTES)
    shelf.seal([1] * GRID * 3)
    shelf.clock.now = -5.0
    assert shelf.seal([2] * GRID * 3) == 3
    assert shelf.store.bytes() <= 4 * PAGE_BYTES


# ---- faults


def test_a_full_disk_is_a_warning_and_no_page(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert shelf.seal() == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be kept" in caplog.text
    assert shelf.files() == []
    assert not list((shelf.folder / "pages").glob("*.tmp"))
    assert shelf.seal() == 4  # and after room was made it works again


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO"])
def test_no_error_of_the_disk_breaks_a_chat(
    shelf: Shelf, code: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **fields: Any) -> Path:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr("agentmem.activation.sealing.stage_pages", fail)
    assert shelf.seal() == 0
    assert os.strerror(getattr(errno, code)) in caplog.text
    monkeypatch.undo()
    assert shelf.seal() == 4


def test_a_read_only_folder_is_a_warning_and_no_page(caplog: pytest.LogCaptureFixture) -> None:
    # Not below tmp_path, which is its owner's alone: nothing is read-only for the superuser, who asks as nobody here.
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        pages = Path(name) / "pages"
        pages.mkdir()
        Path(name).chmod(0o755)
        pages.chmod(0o555)
        database = Database(":memory:")
        try:
            if user == 0:
                os.seteuid(65534)
            view = PageStore(database, pages, grid=GRID).view(b"salt")
            assert view.seal(IDENTITY, TOKENS, 0, states(), [("r",)] * 4) == 0
            assert list(view.longest(IDENTITY, TOKENS)) == []
        finally:
            os.seteuid(user)
            pages.chmod(0o755)
            database.close()
        assert "could not be kept" in caplog.text
        assert list(pages.iterdir()) == []


def test_where_nothing_can_be_written_what_is_asked_is_told_and_what_is_wanted_refused(
    shelf: Shelf, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise Full("no room")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    assert shelf.found() == 4
    with monkeypatch.context() as patch:
        patch.setattr(shelf.store._catalog, "flush", full)
        shelf.store.swap_in()
        assert len(shelf.store.entries()) == shelf.store.swap_out().pages == 4
    assert "could not be noted: no room" in caplog.text
    empty = other(tmp_path, "a", "b", "c")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(StoreError, match="read-only"):
            shelf.store.evict([entry.key for entry in shelf.store.entries()])
        patch.setattr(os, "replace", refuse)
        with pytest.raises(StoreError, match="read-only"):
            empty.store.restore(saved)
    assert shelf.found() == 4


def test_a_folder_that_can_not_be_made_is_a_warning_and_no_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    view = PageStore(Database(":memory:"), tmp_path / "file" / "pages", grid=GRID).view(b"salt")
    assert view.seal(IDENTITY, TOKENS, 0, states(), [("r",)] * 4) == 0
    assert list(view.longest(IDENTITY, TOKENS)) == []
    assert "could not be kept" in caplog.text


def test_a_database_that_can_not_be_asked_is_a_miss(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    shelf.seal()
    shelf.database.close()
    assert shelf.found() == 0
    assert shelf.seal([1] * GRID) == 0
    assert "closed" in caplog.text


# ---- many at once


def test_threads_seal_and_read_the_same_pages(shelf: Shelf) -> None:
    written, failures = [], []

    def work() -> None:
        try:
            written.append(shelf.seal())
            for _ in range(10):
                assert shelf.found() == 4
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert max(written) == 4
    assert len(shelf.files()) == 4
    assert shelf.store.verify() == []


def seal_in_process(folder: Path, rounds: int, results: Any) -> None:
    shelf = Shelf(folder)
    for number in range(rounds):
        shelf.seal([number] * GRID * 4)
    results.put([shelf.found([number] * GRID * 4) for number in range(rounds)])
    shelf.store.close()


@pytest.mark.slow
def test_two_processes_seal_the_same_pages_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=seal_in_process, args=(tmp_path, 15, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [[4] * 15] * 2
    for process in processes:
        process.join()
    shelf = Shelf(tmp_path)
    assert len(shelf.files()) == 60
    assert shelf.store.verify() == []
    assert not list((tmp_path / "pages").glob("*.tmp"))


def seal_for_ever(folder: Path, start: int) -> None:
    shelf = Shelf(folder)
    print("ready", flush=True)  # noqa: T201
    for number in range(start, start + 100_000):
        shelf.seal([number] * GRID * 4, records=[(f"r{number}",)] * 4)


@pytest.mark.slow
def test_a_process_killed_while_it_seals_leaves_nothing_wrong(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    random = np.random.default_rng(7)
    kept = 0
    for round_ in range(8):
        start = 1000 * round_
        code = (
            f"import sys; sys.path.insert(0, {here!r}); import test_store; from pathlib import Path; "
            f"test_store.seal_for_ever(Path({str(tmp_path)!r}), {start})"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(float(random.uniform(0.02, 0.25)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        shelf = Shelf(tmp_path)
        assert shelf.store.verify() == []
        rows = {entry.key for entry in shelf.store.entries()}
        assert {name.removesuffix(".page") for name in shelf.files()} == rows
        assert not list((tmp_path / "pages").glob("*.tmp"))
        assert shelf.lineage() == len(rows)
        kept = len(rows)
        for number in (0, 1):
            assert shelf.found([start + number] * GRID * 4) in range(5)
        shelf.store.close()
        shelf.database.close()
    assert kept > 0


def test_a_forked_child_reads_and_keeps_pages(shelf: Shelf) -> None:
    shelf.seal(TOKENS[: GRID * 2])
    child = os.fork()
    if child == 0:
        os._exit(0 if (shelf.found(), shelf.seal()) == (2, 2) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert shelf.found() == 4


# ---- turns that were never stored


def with_records(shelf: Shelf, *ids: str) -> None:
    with shelf.database.write() as connection:
        for name in ids:
            columns = [row["name"] for row in connection.execute("PRAGMA table_info(records)") if row["notnull"]]
            names = [column for column in columns if column != "id"]
            connection.execute(f"INSERT INTO records (id, {', '.join(names)}) VALUES (?{', 0' * len(names)})", (name,))


def test_pages_of_a_turn_that_was_never_stored_go_once_it_must_be_over(shelf: Shelf) -> None:
    with_records(shelf, "told")
    shelf.seal(records=[("told",), ("told",), ("told", "never"), ("told", "never")])
    shelf.store.pin(shelf.keys()[3:])
    shelf.found()  # all of them are in RAM
    shelf.clock.now += 3599
    assert (shelf.store.drop_unstored(), shelf.found()) == (0, 4)  # a turn under way may store them yet
    shelf.clock.now += 2
    assert (shelf.store.drop_unstored(), shelf.found()) == (2, 2)
    assert shelf.files() == sorted(f"{key}.page" for key in shelf.keys()[:2])
    assert shelf.lineage() == 2
    assert shelf.store.drop_unstored() == 0


def test_they_go_at_the_next_open_with_all_that_was_made_behind_them(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    with_records(shelf, "told")
    shelf.seal(TOKENS[: GRID * 2], records=[("never",), ("never", "told")])
    shelf.clock.now += 3000
    # Another turn said the same and found them: what it adds is as old as it is, but stands on them.
    assert shelf.seal(records=[("told",)] * 4, first=2) == 2
    shelf.store.close()
    shelf.database.close()
    later = Shelf(tmp_path, clock=lambda: 1000.0 + 3700)
    assert (later.files(), later.lineage(), later.store.entries()) == ([], 0, [])


def test_a_folder_that_can_not_be_written_opens_with_them(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.seal(records=[("never",)] * 4)
    shelf.clock.now += 3700
    with monkeypatch.context() as patch:
        patch.setattr(shelf.database, "write", mock.Mock(side_effect=StoreError("read only")))
        assert shelf.store.drop_unstored() == 0
    assert "read only" in caplog.text
    assert shelf.found() == 4


# ---- carrying pages elsewhere


@pytest.fixture
def saved(shelf: Shelf, tmp_path: Path) -> Path:
    shelf.seal(records=[("a",), ("a", "b"), ("a", "b"), ("a", "b")])
    shelf.store.pin(shelf.keys()[:1])
    assert shelf.store.save(tmp_path / "saved") == 4
    return tmp_path / "saved"


def other(tmp_path: Path, *records: str) -> Shelf:
    (tmp_path / "other").mkdir()
    shelf = Shelf(tmp_path / "other")
    with_records(shelf, *records)
    return shelf


def test_saved_pages_come_back_elsewhere(saved: Path, tmp_path: Path) -> None:
    elsewhere = other(tmp_path, "a", "b")
    assert elsewhere.store.restore(str(saved)) == 4
    assert elsewhere.store.restore(saved) == 0
    assert elsewhere.found() == 4
    assert [(entry.records, entry.pinned) for entry in elsewhere.store.entries()] == [
        (("a",), True),
        *[(("a", "b"), False)] * 3,
    ]
    assert elsewhere.store.verify() == []


def test_pages_of_forgotten_or_unknown_records_do_not_come_back(saved: Path, tmp_path: Path) -> None:
    elsewhere = other(tmp_path, "a")
    assert elsewhere.store.restore(saved) == 1
    with_records(elsewhere, "b")
    elsewhere.forget("b")
    assert elsewhere.store.restore(saved) == 0
    assert elsewhere.found() == 1


def test_what_was_forgotten_is_told_to_be_in_a_saved_folder_while_it_is_there(
    shelf: Shelf, saved: Path, tmp_path: Path
) -> None:
    shelf.store.delete(shelf.keys())
    assert shelf.store.saved_with(["b"]) == [str(saved)]
    assert shelf.store.saved_with(["c"]) == []
    (saved / "manifest.json").write_text("{}")
    assert shelf.store.saved_with(["c"]) == [str(saved)]
    shutil.rmtree(saved)
    assert shelf.store.saved_with(["b"]) == []


def test_damaged_saved_pages_and_those_behind_them_are_passed_over(saved: Path, tmp_path: Path, shelf: Shelf) -> None:
    flip(saved / shelf.file(2).name, -1)
    elsewhere = other(tmp_path, "a", "b")
    assert elsewhere.store.restore(saved) == 2
    assert not list((elsewhere.folder / "pages").glob("*.tmp"))


def test_a_page_under_another_name_is_passed_over(saved: Path, tmp_path: Path, shelf: Shelf) -> None:
    shutil.copy(saved / shelf.file(1).name, saved / shelf.file(0).name)
    assert other(tmp_path, "a", "b").store.restore(saved) == 0


def test_only_what_fits_the_budget_comes_back(saved: Path, tmp_path: Path) -> None:
    elsewhere = other(tmp_path, "a", "b")
    elsewhere.store.budget_bytes = 3 * PAGE_BYTES
    assert elsewhere.store.restore(saved) == 3
    assert elsewhere.found() == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["pages"][1].update(records=[]),
        lambda m: m["pages"][1].update(key="../" * 21 + "x"),
        lambda m: m["pages"][1].update(number=-1),
        lambda m: m.pop("digest"),
        lambda m: m.update(format="1"),
        lambda m: m.update(extra=1),
    ],
)
def test_a_changed_list_is_corrupt(saved: Path, tmp_path: Path, change: Callable[[Any], object]) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    change(manifest)
    (saved / "manifest.json").write_text(json.dumps(manifest))
    elsewhere = other(tmp_path, "a", "b")
    with pytest.raises(Corrupt, match=r"manifest\.json"):
        elsewhere.store.restore(saved)
    assert elsewhere.files() == []


def test_nothing_saved_is_not_found_and_a_full_folder_is_not_saved_over(shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no KV pages were saved"):
        shelf.store.restore(tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InvalidInput, match="not an empty folder"):
        shelf.store.save(tmp_path / "full")


def test_a_save_that_fails_leaves_nothing(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentmem.errors import Full

    shelf.seal()
    original, calls = os.fsync, []

    def fail(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        original(fd)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Full, match="No space left"):
        shelf.store.save(tmp_path / "saved")
    monkeypatch.undo()
    assert not [path for path in tmp_path.iterdir() if "saved" in path.name]


def test_saving_leaves_damaged_pages_out(shelf: Shelf, tmp_path: Path) -> None:
    shelf.seal()
    flip(shelf.file(3), -1)
    assert shelf.store.save(tmp_path / "saved") == 3
    assert Page(tmp_path / "saved" / shelf.file(0).name).number == 0
