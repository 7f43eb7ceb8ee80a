"""Files and RAM under one budget: what was checked stays, what changed is checked again, nothing exceeds the budget."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem import Memory, _pure
from agentmem.activation import residency
from agentmem.activation.cipher import PageCipher
from agentmem.activation.eviction import Costs, PageRow, RamCopy, choose
from agentmem.activation.identity import chain, digest
from agentmem.activation.pages import Layout, Page
from agentmem.activation.store import PageStore
from agentmem.database import Database
from agentmem.errors import ConfigError, Corrupt

GRID = 64
IDENTITY = digest({"weights": "w"})


def prompt(number: int, pages: int = 4) -> list[int]:
    return [number] * GRID * pages


def states(number: int, pages: int = 4) -> list[tuple[Any, Any]]:
    steps = np.arange(GRID * pages, dtype=np.uint16)[None, :, None] + 1000 * number
    parts = [np.ascontiguousarray(np.broadcast_to(steps + layer, (2, GRID * pages, 16))) for layer in (0, 500)]
    return [(part, part) for part in parts]


PAGE = Layout.of(states(0), GRID).page_bytes


class Shelf:
    def __init__(self, folder: Path, **options: Any) -> None:
        self.now = 1000.0
        self.folder = folder / "pages"
        self.database = Database(folder / "memory.db")
        self.store = PageStore(self.database, self.folder, grid=GRID, clock=lambda: self.now, **options)
        self.view = self.store.view(b"salt")

    def seal(self, number: int = 0, pages: int = 4, **options: Any) -> int:
        layers = states(number, pages)
        return self.view.seal(IDENTITY, prompt(number, pages), 0, layers, [("r",)] * pages, **options)

    def read(self, number: int = 0, pages: int = 4) -> int:
        """As a provider reads; a wrong value fails the test."""
        room = [(np.zeros((2, GRID, 16), np.uint16), np.zeros((2, GRID, 16), np.uint16)) for _ in range(2)]
        count = 0
        for page in self.view.longest(IDENTITY, prompt(number, pages)):
            try:
                page.read_layers([k for k, _ in room], [v for _, v in room], 0)
            except Corrupt:
                break
            for copies, sources in zip(room, states(number, pages), strict=True):
                for copy, source in zip(copies, sources, strict=True):
                    assert (copy == source[:, count * GRID : (count + 1) * GRID]).all()
            count += 1
        return count

    def keys(self, number: int = 0, pages: int = 4) -> list[str]:
        return [key.hex() for key in chain(IDENTITY, b"salt", prompt(number, pages), GRID)]

    def file(self, page: int, number: int = 0) -> Path:
        return self.folder / f"{self.keys(number)[page]}.page"

    def on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.page"))

    def within(self) -> bool:
        return self.on_disk() + self.store.bytes_in_ram() <= self.store.budget_bytes


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are trusted as soon as they are written: nothing here changes one within a tick of the clock."""
    monkeypatch.setattr(residency, "SETTLED_NS", -(1 << 62))


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


class Checks:
    """Counts how often states are checked while they are copied, or by themselves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernels = _pure.kernels()
        read, verify = kernels.page_read, kernels.page_verify
        self.count = 0

        def page_read(data: Any, keys: Any, values: Any, at: int, check: bool = True, *rest: Any) -> None:
            self.count += check
            read(data, keys, values, at, check, *rest)

        def page_verify(data: Any) -> None:
            self.count += 1
            verify(data)

        monkeypatch.setattr(kernels, "page_read", page_read)
        monkeypatch.setattr(kernels, "page_verify", page_verify)

    def taken(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    return Checks(monkeypatch)


# ---- in RAM


def test_a_page_is_checked_once_and_then_known_to_be_good(shelf: Shelf, checks: Checks) -> None:
    shelf.seal()
    shelf.view.longest(IDENTITY, prompt(0))
    assert checks.taken() == 0
    assert shelf.read() == 4
    assert checks.taken() == 4
    assert shelf.store.bytes_in_ram() == 4 * PAGE
    assert shelf.read() == 4
    assert checks.taken() == 0


def test_a_page_that_is_read_layer_by_layer_is_good_when_all_were(shelf: Shelf, checks: Checks) -> None:
    shelf.seal(pages=1)
    [page] = shelf.view.longest(IDENTITY, prompt(0, 1))
    room = np.zeros((2, GRID, 16), np.uint16)
    for layer in (1, 1, 0):
        assert not page.verified
        page.read_layers([room], [room.copy()], 0, layer)
    assert (room == states(0, 1)[0][0]).all()
    assert page.verified
    assert checks.taken() == 2
    assert shelf.store.bytes_in_ram() == PAGE


@pytest.mark.parametrize("change", ["flip", "touch", "cut", "replaced", "deleted"])
def test_a_changed_file_is_checked_again(shelf: Shelf, checks: Checks, change: str) -> None:
    shelf.seal()
    shelf.read()
    checks.taken()
    file = shelf.file(2)
    content = bytearray(file.read_bytes())
    if change == "touch":
        file.touch()
    elif change == "cut":
        os.truncate(file, 100)
    elif change == "deleted":
        file.unlink()
    elif change == "replaced":
        copy = file.with_suffix(".copy")
        copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.replace(copy, file)
    else:
        with file.open("r+b") as open_file:
            open_file.seek(-1, os.SEEK_END)
            open_file.write(bytes([content[-1] ^ 1]))
    assert shelf.read() == (4 if change == "touch" else 2)
    assert checks.taken() == (1 if change in {"touch", "flip", "replaced"} else 0)


def test_a_file_that_has_just_changed_is_not_trusted_yet(
    shelf: Shelf, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "SETTLED_NS", 60_000_000_000)
    shelf.seal()
    assert (shelf.read(), shelf.read()) == (4, 4)
    assert checks.taken() == 8
    assert shelf.store.bytes_in_ram() == 0


def test_a_mapping_is_checked_again_after_a_while(
    shelf: Shelf, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.seal()
    assert (shelf.read(), shelf.read()) == (4, 4)
    assert checks.taken() == 4
    monkeypatch.setattr(residency, "RECHECK_S", -1.0)
    assert shelf.read() == 4
    assert checks.taken() == 4
    assert shelf.store.bytes_in_ram() == 4 * PAGE


def test_what_another_process_deleted_leaves_the_ram_with_the_next_look_up(shelf: Shelf, tmp_path: Path) -> None:
    shelf.seal(0)
    shelf.seal(1)
    shelf.read(0)
    other = Shelf(tmp_path)
    other.store.delete(other.keys(0))
    assert shelf.store.bytes_in_ram() == 4 * PAGE
    assert shelf.read(1) == 4
    assert shelf.store.bytes_in_ram() == 4 * PAGE  # those of prompt 1 only
    assert shelf.read(0) == 0


@pytest.mark.parametrize("how", ["delete", "evict", "close"])
def test_deleted_pages_are_in_ram_no_more(shelf: Shelf, how: str) -> None:
    shelf.seal()
    shelf.read()
    if how == "close":
        shelf.store.close()
    else:
        getattr(shelf.store, how)(shelf.keys())
    assert shelf.store.bytes_in_ram() == 0


def test_encrypted_pages_are_decrypted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cipher = PageCipher(bytes(32))
    opened: list[int] = []
    original = cipher.open

    def counting(data: Any, name: bytes) -> Any:
        opened.append(len(data))
        return original(data, name)

    monkeypatch.setattr(cipher, "open", counting)
    shelf = Shelf(tmp_path, cipher=cipher)
    shelf.seal()
    assert (shelf.read(), shelf.read()) == (4, 4)
    assert len(opened) == 4
    assert shelf.store.bytes_in_ram() == 4 * PAGE
    shelf.store.swap_out()
    assert shelf.store.bytes_in_ram() == 0
    assert shelf.read() == 4
    assert len(opened) == 8


# ---- swapping


def resident(path: Path) -> int:
    """Pages of the system's memory that hold this file (mincore)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        count = -(-len(mapping) // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * count)()
        view = (ctypes.c_char * len(mapping)).from_buffer(mapping)
        assert ctypes.CDLL(None).mincore(ctypes.byref(view), ctypes.c_size_t(len(mapping)), flags) == 0
        del view
        return sum(flag & 1 for flag in flags)


def can_be_dropped(folder: Path) -> bool:
    """Whether this file system lets go of cached bytes when told to (one in memory can't)."""
    control = folder / "control"
    control.write_bytes(bytes(100_000))
    with control.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident(control) == 0


def test_swapping_out_empties_the_ram_and_keeps_the_files(shelf: Shelf, checks: Checks) -> None:
    shelf.seal()
    shelf.read()
    checks.taken()
    assert resident(shelf.file(0)) > 0
    done = shelf.store.swap_out()
    assert (done.pages, done.bytes) == (4, 4 * PAGE)
    assert done.seconds > 0
    assert shelf.store.bytes_in_ram() == 0
    assert all(str(shelf.folder) not in line for line in Path("/proc/self/maps").read_text().splitlines())
    if can_be_dropped(shelf.folder):
        assert resident(shelf.file(0)) == 0
    assert shelf.read() == 4
    assert checks.taken() == 4


def test_swapping_in_checks_ahead_of_use(shelf: Shelf, checks: Checks) -> None:
    shelf.seal()
    done = shelf.store.swap_in(shelf.keys()[:2])
    assert (done.pages, done.bytes) == (2, 2 * PAGE)
    assert checks.taken() == 2
    assert shelf.store.bytes_in_ram() == 2 * PAGE
    assert shelf.read() == 4
    assert checks.taken() == 2
    again = shelf.store.swap_in()
    assert again.pages == 4
    assert checks.taken() == 0


def test_swapping_in_brings_the_last_used_and_no_more_than_the_share(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget_bytes=24 * PAGE)
    for number in range(3):
        shelf.now += 10
        shelf.seal(number)
    done = shelf.store.swap_in()
    assert done.pages == 6
    assert shelf.store.bytes_in_ram() == 6 * PAGE
    held = {copy.key.hex() for copy in shelf.store._budget.ram.copies()}
    assert held == {*shelf.keys(2), *shelf.keys(1)[:2]}


def test_swapping_in_puts_damaged_pages_aside(shelf: Shelf) -> None:
    shelf.seal()
    content = bytearray(shelf.file(2).read_bytes())
    content[-1] ^= 1
    shelf.file(2).write_bytes(content)
    shelf.file(3).unlink()
    assert shelf.store.swap_in().pages == 2
    assert len(list((shelf.folder / "quarantine").iterdir())) == 1
    assert shelf.read() == 2


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_page_can_be_swapped_out_and_deleted_while_it_is_read(tmp_path: Path, encrypted: bool) -> None:
    shelf = Shelf(tmp_path, cipher=PageCipher(bytes(32)) if encrypted else None)
    shelf.seal()
    shelf.read()
    pages = shelf.view.longest(IDENTITY, prompt(0))
    views = [memoryview(page.data) for page in pages]
    before = [bytes(view) for view in views]
    shelf.store.swap_out()
    shelf.store.delete(shelf.keys())
    assert [bytes(view) for view in views] == before
    room = np.zeros((2, GRID, 16), np.uint16)
    pages[0].read_layers([room, room], [room, room], 0)
    assert (room == states(0)[1][1][:, :GRID]).all()


def test_threads_read_while_others_swap(shelf: Shelf) -> None:
    shelf.seal()
    stop, failures = threading.Event(), []

    def until_stopped(move: Any) -> None:
        try:
            while not stop.is_set():
                move()
        except BaseException as error:
            failures.append(error)

    def read() -> None:
        assert shelf.read() == 4

    moves = (read, read, read, shelf.store.swap_out, shelf.store.swap_in)
    threads = [threading.Thread(target=until_stopped, args=(move,)) for move in moves]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert shelf.store.bytes_in_ram() <= 4 * PAGE


def test_a_memory_swaps_its_scope(tmp_path: Path) -> None:
    with Memory(tmp_path / "m", embedder="none", page_codec="raw") as memory:
        record = memory.scope(user="ana").add("x")[0].id
        pages = memory._engine.pages
        view = pages.view(b"salt")
        tokens = list(range(pages.grid * 2))
        part = np.zeros((1, pages.grid * 2, 4), np.float32)
        assert view.seal(IDENTITY, tokens, 0, [(part, part)], [(), (record,)]) == 2
        assert memory.activation.swap_in().pages == 2
        memory.activation.swap_out()
        assert memory.scope(user="ana").activation.swap_in().pages == 2, "a page is of no use without those before it"
        assert memory.scope(user="ben").activation.swap_out().pages == 0
        assert memory.scope(user="ana").activation.swap_out().pages == 1
        assert pages.bytes_in_ram() == memory.activation.entries()[0].bytes
        assert {entry.codec for entry in memory.activation.entries()} == {"raw"}


def test_the_disk_reads_ahead_when_a_prompt_comes_from_there(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.seal()
    advised: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: advised.append(call[-1]))
    monkeypatch.setattr("agentmem.activation.store._CACHED_RATE", 0.001)
    assert shelf.read() == 4
    assert advised == []
    shelf.store.swap_out()
    monkeypatch.setattr("agentmem.activation.store._CACHED_RATE", float("inf"))
    advised.clear()
    assert shelf.read() == 4
    assert advised == [os.POSIX_FADV_WILLNEED] * 3
    assert shelf.read() == 4
    assert len(advised) == 3  # not for what is in RAM


@pytest.mark.parametrize("fault", ["mapping", "opening"])
def test_a_file_that_can_not_be_read_is_a_miss(shelf: Shelf, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.seal()

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(*((_pure.kernels(), "prefault") if fault == "mapping" else (os, "fstat")), fail)
        assert shelf.read() == 0
        assert shelf.store.swap_in().pages == 0
    assert shelf.seal() in {0, 4}
    assert shelf.read() == 4


@pytest.mark.parametrize("short", ["EMFILE", "ENFILE", "ENOMEM"])
def test_a_process_that_is_short_of_something_loses_no_page(
    shelf: Shelf, short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.seal()
    keys = [entry.key for entry in shelf.store.entries()]

    def fail(*_: Any) -> None:
        raise OSError(getattr(errno, short), "short")

    with monkeypatch.context() as patch:
        patch.setattr("agentmem.activation.pages._mapped", fail)
        assert shelf.read() == 0
        assert shelf.store.swap_in().pages == 0
        assert shelf.store.verify() == sorted(f"pages/{key}.page can't be opened (short)" for key in keys)
    assert shelf.read() == 4


# ---- the RAM's own budget


def mapped_now(folder: Path) -> tuple[int, int]:
    """Bytes of files of this folder in the process's address space, and in its memory (smaps)."""
    sizes = {"Size": 0, "Rss": 0}
    mine = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in sizes:
            sizes[name] += int(rest.split()[0]) * 1024 * mine
        elif "-" in name.split()[0]:
            mine = str(folder) in line
    return sizes["Size"], sizes["Rss"]


def whole(size: int) -> int:
    """This file's bytes in whole pages of the system."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def test_what_is_mapped_is_counted_until_nobody_reads_it(shelf: Shelf) -> None:
    shelf.seal()
    pages = shelf.view.longest(IDENTITY, prompt(0))
    for page in pages:
        page.verify()
        del page
    assert shelf.store.bytes_mapped() == shelf.store.bytes_in_ram() == 4 * PAGE
    assert mapped_now(shelf.folder) == (4 * whole(PAGE), 4 * whole(PAGE))
    view = memoryview(pages[3].data)
    shelf.store.swap_out()
    assert (shelf.store.bytes_in_ram(), shelf.store.bytes_mapped()) == (0, 4 * PAGE)
    del pages
    assert shelf.store.bytes_mapped() == PAGE
    view.release()
    assert shelf.store.bytes_mapped() == 0
    assert mapped_now(shelf.folder) == (0, 0)


@pytest.mark.parametrize("encrypted", [False, True])
def test_prompts_take_turns_within_the_ram_budget(tmp_path: Path, encrypted: bool) -> None:
    cipher = PageCipher(bytes(32)) if encrypted else None
    shelf = Shelf(tmp_path, ram_budget_bytes=8 * PAGE, cipher=cipher)
    for number in range(5):
        shelf.seal(number)
    for number in (0, 1, 2, 3, 4, 0, 3, 3, 1, 4):
        shelf.now += 10
        pages = shelf.view.longest(IDENTITY, prompt(number))
        assert len(pages) == 4
        assert shelf.store.bytes_mapped() <= 8 * PAGE, "what was there made way before these were mapped"
        for page in pages:
            page.verify()
            del page
        assert mapped_now(shelf.folder)[1] <= 8 * whole(PAGE)
        del pages
    # An encrypted file is a little longer than its page, and way is made for as much.
    assert shelf.store.bytes_mapped() == shelf.store.bytes_in_ram() == (7 if encrypted else 8) * PAGE


def test_a_prompt_that_is_larger_than_the_ram_budget_is_read_all_the_same(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, ram_budget_bytes=2 * PAGE)
    shelf.seal(0)
    shelf.seal(1)
    assert (shelf.read(0), shelf.read(1)) == (4, 4)
    assert shelf.store.bytes_mapped() == shelf.store.bytes_in_ram() == 2 * PAGE


def test_without_a_ram_budget_nothing_stays(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, ram_budget_bytes=0)
    shelf.seal()
    assert (shelf.read(), shelf.store.swap_in().pages) == (4, 0)
    assert shelf.store.bytes_mapped() == 0


def test_the_ram_budget_may_exceed_a_quarter_but_not_the_whole(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget_bytes=8 * PAGE, ram_budget_bytes=100 * PAGE)
    shelf.seal()
    shelf.read()
    assert shelf.store.bytes_in_ram() == 4 * PAGE
    shelf.seal(1, 3)
    assert shelf.within()


def test_swapping_in_takes_no_ram_from_a_running_request(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, ram_budget_bytes=6 * PAGE)
    shelf.seal(0)
    shelf.seal(1)
    reading = shelf.view.longest(IDENTITY, prompt(0))
    for page in reading:
        page.verify()
        del page
    shelf.now += 10
    assert shelf.store.swap_in(shelf.keys(1)).pages == 2, "as much as the request leaves"
    assert shelf.store.bytes_mapped() == 6 * PAGE
    del reading
    assert shelf.store.swap_in(shelf.keys(1)).pages == 4
    assert shelf.store.bytes_mapped() <= 6 * PAGE


def test_turns_from_threads_leave_nothing_mapped_beside_the_copies(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, ram_budget_bytes=5 * PAGE)
    for number in range(4):
        shelf.seal(number)
    wrong: list[int] = []

    def turns(first: int) -> None:
        for turn in range(20):
            number = (first + turn) % 4
            if shelf.read(number) != 4:
                wrong.append(number)
            shelf.store.swap_in(shelf.keys((number + 1) % 4))

    threads = [threading.Thread(target=turns, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert shelf.store.bytes_mapped() == shelf.store.bytes_in_ram() <= 5 * PAGE
    shelf.store.swap_out()
    assert mapped_now(shelf.folder) == (0, 0)


def test_a_memory_takes_the_ram_budget_from_its_settings(tmp_path: Path) -> None:
    with Memory(tmp_path / "m", embedder="none", page_budget=1000, ram_budget=600) as memory:
        assert memory._engine.pages._budget.share == 600
    with Memory(tmp_path / "n", embedder="none", page_budget=1000) as memory:
        assert memory._engine.pages._budget.share == 250
    with pytest.raises(ConfigError, match="ram_budget"):
        Memory(tmp_path / "o", ram_budget=-1)


# ---- one budget


def test_the_budget_holds_at_every_step(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget_bytes=20 * PAGE)
    random = np.random.default_rng(3)
    for _ in range(60):
        shelf.now += float(random.integers(0, 50))
        number = int(random.integers(0, 9))
        move = random.integers(0, 4)
        if move == 0:
            shelf.seal(number)
        elif move == 1:
            shelf.read(number)
        elif move == 2:
            shelf.store.swap_in()
        else:
            shelf.store.pin(shelf.keys(number), bool(random.integers(0, 4) == 0))
        assert shelf.within()
        assert shelf.store.bytes_in_ram() <= 5 * PAGE
        assert shelf.store.bytes() == shelf.on_disk()


def test_no_moment_of_a_seal_has_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(tmp_path, budget_bytes=6 * PAGE)
    shelf.seal(0)
    original, seen = os.replace, []

    def watch(source: Any, target: Any) -> None:
        original(source, target)
        seen.append(shelf.on_disk())

    monkeypatch.setattr(os, "replace", watch)
    assert shelf.seal(1) == 4
    assert len(seen) == 4
    assert max(seen) <= 6 * PAGE


def test_copies_yield_to_new_files(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget_bytes=8 * PAGE)
    shelf.seal(0)
    shelf.read(0)
    assert shelf.store.bytes_in_ram() == 2 * PAGE  # a quarter
    shelf.seal(1)
    assert shelf.store.bytes_in_ram() == 0
    assert shelf.store.bytes() == 8 * PAGE


def test_a_copy_in_use_displaces_a_file_that_nobody_used_for_long(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget_bytes=8 * PAGE)
    shelf.seal(0)
    shelf.now += 1e6
    shelf.seal(1, 3)
    assert shelf.read(1, 3) == 3
    assert shelf.store.bytes_in_ram() == PAGE  # what was free; nothing is deleted while a request waits
    shelf.seal(1)
    assert shelf.read(1) == 4
    assert shelf.store.bytes_in_ram() == 2 * PAGE
    assert shelf.read(0) == 2
    assert shelf.within()


def test_of_a_prompt_that_does_not_fit_the_beginning_stays(tmp_path: Path, checks: Checks) -> None:
    shelf = Shelf(tmp_path, budget_bytes=16 * PAGE)
    shelf.seal(0, 6)
    for _ in range(3):
        shelf.now += 10
        assert shelf.read(0, 6) == 6
        held = {copy.key.hex() for copy in shelf.store._budget.ram.copies()}
        assert held == set(shelf.keys(0, 6)[:4])
    assert checks.taken() == 6 + 2 + 2


def test_a_read_never_deletes_a_file(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget_bytes=8 * PAGE)
    shelf.seal(0)
    shelf.now += 1e9
    shelf.seal(1)
    for _ in range(3):
        shelf.now += 10
        shelf.read(1)
    assert shelf.store.bytes() == 8 * PAGE
    assert shelf.store.swap_in().pages == 2  # this may
    assert shelf.store.bytes() == 6 * PAGE


def test_copies_never_have_more_than_a_quarter(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget_bytes=8 * PAGE)
    shelf.seal(0)
    shelf.now += 1e6
    shelf.seal(1)
    for _ in range(5):
        shelf.now += 1e6
        shelf.read(1)
        shelf.store.swap_in()
    assert shelf.store.bytes_in_ram() <= 2 * PAGE
    assert shelf.store.bytes() >= 6 * PAGE


def test_pinned_files_stay_and_a_full_store_takes_nothing_new(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget_bytes=4 * PAGE)
    shelf.seal(0)
    shelf.store.pin(shelf.keys(0))
    shelf.read(0)
    assert shelf.seal(1) == 0
    assert (shelf.read(0), shelf.read(1)) == (4, 0)
    assert shelf.within()
    shelf.store.pin(shelf.keys(0), False)
    assert shelf.seal(1) == 4
    assert (shelf.read(0), shelf.read(1)) == (0, 4)


def row(number: int, *, used: float = 0.0, size: int = 100, identity: bytes = b"i", pinned: bool = False) -> PageRow:
    return PageRow(
        key=bytes([number]) * 32,
        identity=identity,
        parent=b"",
        number=0,
        bytes=size,
        created=0.0,
        used=used,
        uses=0,
        pinned=pinned,
        codec="raw",
    )


def test_what_goes_first_is_cheap_for_its_bytes_and_long_unused() -> None:
    costs = Costs(64)
    costs.computed(b"dear", 0, 1, 10.0)
    costs.computed(b"cheap", 0, 1, 0.1)
    rows = [
        row(1, identity=b"dear"),
        row(2, identity=b"cheap"),
        row(3, identity=b"dear", size=10),
        row(4, identity=b"cheap", used=99.99),
        row(5, identity=b"cheap", pinned=True),
    ]
    chosen = choose(rows, free=1 << 40, now=100.0, costs=costs)
    assert [key[0] for key in chosen.files] == [2, 1, 3, 4]


def test_a_copy_goes_before_its_file_and_pinned_copies_last() -> None:
    costs = Costs(64)
    costs.loaded(1_000_000, 0.01)
    rows = [row(1), row(2, pinned=True)]
    copies = [RamCopy(bytes([n]) * 32, 0, 100, 0.0, n == 2) for n in (1, 2)]
    assert choose(rows, free=100, now=10.0, costs=costs, copies=copies).files == []
    everything = choose(rows, free=1 << 40, now=10.0, costs=costs, copies=copies)
    assert [key[0] for key in everything.copies] == [1, 2]
    assert [key[0] for key in everything.files] == [1]


def test_costs_are_what_was_measured() -> None:
    costs = Costs(64)
    assert costs.load_s(1 << 30) == pytest.approx(1.07, abs=0.01)
    costs.loaded(1 << 20, 1.0)
    assert costs.load_s(1 << 20) == 1.0
    costs.loaded(1 << 20, 0.5)
    assert 0.5 < costs.load_s(1 << 20) < 1.0
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        costs.loaded(1 << 20, bad)
        costs.computed(b"i", 0, 2, bad)
    first = costs.compute_s(row(1))
    costs.computed(b"i", 0, 1, 100 * first)
    assert costs.compute_s(row(1)) == pytest.approx(100 * first)


def test_what_a_provider_measured_decides(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget_bytes=1 << 40)
    other = digest({"weights": "slow"})
    tokens = prompt(7)
    shelf.seal(0, seconds=0.001)
    shelf.view.seal(other, tokens, 0, states(7), [("r",)] * 4, seconds=1000.0)
    shelf.now += 10
    assert shelf.store.evict(bytes=4 * PAGE) == 4
    assert shelf.read(0) == 0
    assert len(shelf.view.longest(other, tokens)) == 4


def test_a_forked_child_reads_what_is_in_ram(shelf: Shelf) -> None:
    shelf.seal()
    shelf.read()
    with shelf.store._budget.ram._lock, shelf.store._catalog._lock, shelf.store._budget.costs._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if (shelf.read(), shelf.store.swap_out().pages) == (4, 4) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert shelf.read() == 4


def test_handles_before_python_3_13_leave_descriptors_for_others(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_most_mappings", lambda: 3)
    shelf.seal()
    assert shelf.read() == 4
    assert shelf.store.bytes_in_ram() == 3 * PAGE


def test_a_handle_is_closed_for_itself_only(shelf: Shelf) -> None:
    shelf.seal(pages=1)
    shelf.read(pages=1)
    [one], [two] = (shelf.view.longest(IDENTITY, prompt(0, 1)) for _ in range(2))
    one.close()
    assert isinstance(two, Page)
    assert len(two.data) == PAGE
    assert shelf.read(pages=1) == 1


def test_pages_that_no_request_asked_for_in_ten_minutes_leave_ram_with_the_next(shelf: Shelf) -> None:
    for number in (0, 1, 2):
        shelf.seal(number)
        assert shelf.read(number) == 4
    held = shelf.store.bytes_in_ram()
    shelf.store.pin(shelf.keys(2))
    shelf.now += 601
    assert shelf.read(1) == 4
    assert shelf.store.bytes_in_ram() == held * 2 // 3, "what is read now stays, and what is pinned"
    assert shelf.read() == 4, "they are still on disk"
