"""Codecs through the store: exact ones share pages bit for bit, lossy ones give live and restored runs equal bits."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem import _pure
from agentmem.activation.cipher import PageCipher
from agentmem.activation.identity import digest
from agentmem.activation.pages import CODECS, LOSSY, Codec, Encoded, Layout, NewPage, Page, encode, write_page
from agentmem.activation.store import PageStore
from agentmem.database import Database
from agentmem.errors import Corrupt, Incompatible, InvalidInput

GRID = 64
IDENTITY = digest({"weights": "w"})
EXACT = sorted(set(CODECS) - LOSSY)
Layers = list[tuple[Any, Any]]


def prompt(number: int = 0, pages: int = 3) -> list[int]:
    return [number] * GRID * pages


def states(number: int = 0, pages: int = 3, *, dtype: str = "bf16", dims: tuple[int, int] = (32, 16)) -> Layers:
    """Values as a model's: some dimensions of the keys much larger than others."""
    source = np.random.default_rng(number)

    def part(dim: int) -> Any:
        values = source.standard_normal((2, GRID * pages, dim)).astype(np.float32) * np.exp(np.arange(dim) % 5)
        if dtype == "bf16":
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(np.float32 if dtype == "f32" else np.float16)

    return [(part(dims[0]), part(dims[1])) for _ in range(2)]


def copied(layers: Layers) -> Layers:
    return [(key.copy(), value.copy()) for key, value in layers]


def same(one: Layers, two: Layers) -> bool:
    return all(
        a.tobytes() == b.tobytes()
        for pair, other in zip(one, two, strict=True)
        for a, b in zip(pair, other, strict=True)
    )


class Shelf:
    def __init__(self, folder: Path, codec: Codec, **options: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder / "pages"
        self.database = Database(folder / "memory.db")
        self.store = PageStore(self.database, self.folder, grid=GRID, codec=codec, **options)
        self.view = self.store.view(b"salt")

    def seal(self, layers: Layers, number: int = 0) -> int:
        """As a provider does: page after page is computed and encoded, then all are kept. Changes ``layers``."""
        pages = layers[0][0].shape[1] // GRID
        encoded = [self.view.encode(layers, i * GRID) for i in range(pages)]
        return self.view.seal(IDENTITY, prompt(number, pages), 0, layers, [("r",)] * pages, encoded=encoded)

    def restored(self, like: Layers, number: int = 0) -> tuple[int, Layers]:
        room = [(np.zeros_like(key), np.zeros_like(value)) for key, value in like]
        count = 0
        for page in self.view.longest(IDENTITY, prompt(number, like[0][0].shape[1] // GRID)):
            try:
                page.read_layers([key for key, _ in room], [value for _, value in room], count * GRID)
            except Corrupt:
                break
            count += 1
        return count, room

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.page"))


@pytest.mark.parametrize("dtype", ["bf16", "f32", "f16"])
@pytest.mark.parametrize("codec", CODECS)
def test_a_restored_run_has_the_bits_of_the_live_one(tmp_path: Path, codec: Codec, dtype: str) -> None:
    shelf = Shelf(tmp_path, codec)
    assert shelf.view.lossy == (codec in LOSSY)
    computed = states(dtype=dtype)
    live = copied(computed)
    assert shelf.seal(live) == 3
    assert same(live, computed) == (codec not in LOSSY)
    count, room = Shelf(tmp_path, codec).restored(live)
    assert count == 3
    assert same(room, live)
    assert shelf.store.verify() == []
    assert {(entry.codec, entry.bytes) for entry in shelf.store.entries()} == {
        (codec, path.stat().st_size) for path in shelf.files()
    }


@pytest.mark.parametrize("codec", sorted(LOSSY))
def test_lossy_pages_are_as_small_as_their_codec_promises(tmp_path: Path, codec: Codec) -> None:
    layers = states(dims=(64, 64))
    shelf = Shelf(tmp_path, codec)
    shelf.seal(copied(layers))
    layout = Layout.of(layers, GRID)
    sizes = {path.stat().st_size for path in shelf.files()}
    assert max(sizes) < {"int8": 0.62, "k8v4": 0.52, "int4": 0.42}[codec] * layout.page_bytes


def test_exact_codecs_share_their_pages_and_lossy_ones_have_their_own(tmp_path: Path) -> None:
    layers = states()
    for codec in EXACT:
        assert Shelf(tmp_path, codec).seal(copied(layers)) == (3 if codec == EXACT[0] else 0)
    for codec in EXACT:
        count, room = Shelf(tmp_path, codec).restored(layers)
        assert count == 3
        assert same(room, layers)
    for codec in LOSSY:
        shelf = Shelf(tmp_path, codec)
        assert shelf.restored(layers)[0] == 0
        assert shelf.seal(copied(layers)) == 3
        assert shelf.restored(layers)[0] == 3
    assert len(Shelf(tmp_path, "raw").files()) == 3 * (1 + len(LOSSY))


def test_a_chain_may_be_of_several_exact_codecs(tmp_path: Path) -> None:
    layers = states()
    start = [(key[:, :GRID].copy(), value[:, :GRID].copy()) for key, value in layers]
    raw, lossless = Shelf(tmp_path, "raw"), Shelf(tmp_path, "lossless")
    assert raw.view.seal(IDENTITY, prompt(0, 1), 0, start, [("r",)]) == 1
    assert lossless.seal(layers) == 2
    count, room = raw.restored(layers)
    assert count == 3
    assert same(room, layers)
    assert sorted(entry.codec for entry in raw.store.entries()) == ["lossless", "lossless", "raw"]


@pytest.mark.parametrize("codec", sorted(LOSSY))
def test_a_lossy_store_keeps_only_what_the_live_run_went_on_with(tmp_path: Path, codec: Codec) -> None:
    shelf = Shelf(tmp_path, codec)
    layers = states()
    other = encode(copied(layers), GRID, 0, "int8" if codec == "int4" else "int4")
    small = encode([(key[:, :16], value[:, :16]) for key, value in layers], 16, 0, codec)
    for encoded in (None, [], [shelf.view.encode(layers, 0)], [None] * 3, [other] * 3, [small] * 3):
        with pytest.raises(InvalidInput, match=r"codec|another store"):
            shelf.view.seal(IDENTITY, prompt(), 0, layers, [("r",)] * 3, encoded=encoded)
    assert shelf.files() == []


def test_encoded_pages_need_no_tensors_and_exact_stores_need_no_encoding(tmp_path: Path) -> None:
    layers = states()
    lossy, exact = Shelf(tmp_path / "a", "int8"), Shelf(tmp_path / "b", "lossless")
    encoded = [lossy.view.encode(layers, i * GRID) for i in range(3)]
    assert lossy.view.seal(IDENTITY, prompt(), 0, (), [("r",)] * 3, encoded=encoded) == 3
    assert exact.view.encode(layers, 0) is None
    assert exact.view.seal(IDENTITY, prompt(), 0, layers, [("r",)] * 3) == 3


def test_states_that_can_not_be_encoded_are_refused(tmp_path: Path) -> None:
    view = Shelf(tmp_path, "int8").view
    layers = states()
    for bad in (
        [],
        [(layers[0][0], layers[1][0].astype(np.float64))],
        [(key[:, :10], value[:, :10]) for key, value in layers],
    ):
        with pytest.raises(InvalidInput):
            view.encode(bad, 0)
    frozen = copied(layers)
    frozen[1][1].flags.writeable = False
    with pytest.raises(InvalidInput):
        view.encode(frozen, 0)
    with pytest.raises(InvalidInput, match="none of raw, lossless"):
        PageStore(Database(":memory:"), tmp_path / "x", codec="zip")  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", sorted(LOSSY))
def test_a_longer_chain_of_small_pages_fits_the_same_budget(tmp_path: Path, codec: Codec) -> None:
    layers = states(pages=8, dims=(64, 64))
    budget = 4 * Layout.of(layers, GRID).page_bytes
    raw, lossy = Shelf(tmp_path / "a", "raw", budget_bytes=budget), Shelf(tmp_path / "b", codec, budget_bytes=budget)
    assert raw.seal(copied(layers)) == 4
    assert lossy.seal(copied(layers)) > 5
    assert lossy.store.bytes() == sum(path.stat().st_size for path in lossy.files()) <= budget


@pytest.mark.parametrize("codec", CODECS)
def test_both_twins_read_and_write_the_same_files(
    tmp_path: Path, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = states(pages=1)
    fields: dict[str, Any] = {"identity": IDENTITY, "parent": b"p" * 32, "number": 0, "tokens": prompt(0, 1)}
    write_page(tmp_path / "one", NewPage(**fields, layers=layers, codec=codec))
    monkeypatch.setattr(_pure, "kernels", lambda: _pure)
    write_page(tmp_path / "two", NewPage(**fields, layers=layers, codec=codec))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    page = Page(tmp_path / "one")
    page.verify()


# ---- damage


def damaged(content: bytes, choose: random.Random) -> bytes:
    """A quarter of the cases cut short, the others with one bit flipped; every part of the file alike."""
    if choose.random() < 0.25:
        return content[: choose.randrange(len(content))]
    changed = bytearray(content)
    # Headers are small and states are large: both get their share.
    where = choose.randrange(min(len(content), 1500)) if choose.random() < 0.3 else choose.randrange(len(content))
    changed[where] ^= 1 << choose.randrange(8)
    return bytes(changed)


def used(path: Path, room: Layers, *, whole: bool) -> None:
    page = Page(path)
    if whole:
        page.verify()
    else:
        page.read_layers([key for key, _ in room], [value for _, value in room], 0)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_every_flip_and_truncation_of_a_page_is_noticed(tmp_path: Path, codec: Codec) -> None:
    """2,000 cases a codec, through the file: a page that opens and reads is the page that was written."""
    layers = states(pages=1, dims=(8, 8))
    path = tmp_path / "page"
    write_page(
        path,
        NewPage(identity=IDENTITY, parent=b"p" * 32, number=0, tokens=prompt(0, 1), layers=layers, codec=codec),
        durable=False,
    )
    content = path.read_bytes()
    choose = random.Random(codec)
    room = [(np.zeros_like(key), np.zeros_like(value)) for key, value in layers]
    for case in range(2000):
        path.write_bytes(damaged(content, choose))
        with pytest.raises((Corrupt, Incompatible)):
            used(path, room, whole=bool(case % 2))


@pytest.mark.slow
@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("codec", CODECS)
def test_no_damage_of_a_stored_page_gives_a_wrong_answer(tmp_path: Path, codec: Codec, encrypted: bool) -> None:
    """Through the whole store: 100 % noticed, the sound prefix is still given, the page is put aside and comes anew."""
    shelf = Shelf(tmp_path, codec, cipher=PageCipher(bytes(32)) if encrypted else None)
    live = states(dims=(8, 8))
    computed = copied(live)
    assert shelf.seal(live) == 3
    choose = random.Random(codec)
    order = [shelf.folder / f"{entry.key}.page" for entry in shelf.store.entries()]
    for _ in range(100):
        which = choose.randrange(3)
        content = order[which].read_bytes()
        order[which].write_bytes(damaged(content, choose))
        count, room = shelf.restored(live)
        assert count == which
        assert same([(k[:, : which * GRID], v[:, : which * GRID]) for k, v in room],
                    [(k[:, : which * GRID], v[:, : which * GRID]) for k, v in live])  # fmt: skip
        again = copied(computed)
        assert shelf.seal(again) == 3 - which
        assert same(again, live)
    assert shelf.restored(live)[0] == 3


# ---- processes


def seal_for_ever(folder: Path, codec: Codec, start: int) -> None:
    shelf = Shelf(folder, codec, cipher=PageCipher(bytes(32)) if start % 2000 else None)
    print("ready", flush=True)  # noqa: T201
    for number in range(start, start + 100_000):
        shelf.seal(states(number, dims=(8, 8)), number)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_a_process_killed_while_it_seals_leaves_nothing_wrong(tmp_path: Path, codec: Codec) -> None:
    here = str(Path(__file__).parent)
    moments = random.Random(codec)
    for round_ in range(6):
        start = 1000 * round_
        code = (
            f"import sys; sys.path.insert(0, {here!r}); import test_page_codecs as t; from pathlib import Path; "
            f"t.seal_for_ever(Path({str(tmp_path)!r}), {codec!r}, {start})"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0.02, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        shelf = Shelf(tmp_path, codec, cipher=PageCipher(bytes(32)) if start % 2000 else None)
        assert shelf.store.verify() == []
        assert {path.stem for path in shelf.files()} == {entry.key for entry in shelf.store.entries()}
        assert not list(shelf.folder.glob("*.tmp"))
        live = states(start, dims=(8, 8))
        assert shelf.seal(live, start) in range(4)
        count, room = shelf.restored(live, start)
        assert count == 3
        assert same(room, live)
        shelf.store.close()
        shelf.database.close()


def work(folder: Path, seed: int, seconds: float, results: Any) -> None:
    """Seal, read, swap, evict and pin at random; what is read has to be what such a prompt gives."""
    choose = random.Random(seed)
    layers = states(1, dims=(8, 8))
    budget = 12 * Layout.of(layers, GRID).page_bytes
    shelf = Shelf(folder, "lossless", budget_bytes=budget)
    end, moves, read = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        number = choose.randrange(6)
        wanted = states(number, dims=(8, 8))
        match choose.randrange(6):
            case 0 | 1:
                shelf.seal(copied(wanted), number)
            case 2 | 3:
                count, room = shelf.restored(wanted, number)
                read += count
                part = slice(count * GRID)
                assert same([(k[:, part], v[:, part]) for k, v in room], [(k[:, part], v[:, part]) for k, v in wanted])
            case 4:
                choose.choice([shelf.store.swap_in, shelf.store.swap_out])()
            case _:
                entries = [entry.key for entry in shelf.store.entries()]
                shelf.store.evict(entries[choose.randrange(len(entries)) :][:1] if entries else [])
        assert shelf.store.bytes() <= budget
        moves += 1
    results.put((moves, read))


@pytest.mark.slow
def test_two_processes_seal_evict_and_swap_on_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=work, args=(tmp_path, seed, 4.0, results)) for seed in range(2)]
    for process in processes:
        process.start()
    done = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert all(moves > 20 and read > 10 for moves, read in done)
    shelf = Shelf(tmp_path, "raw")
    assert shelf.store.verify() == []
    assert not list(shelf.folder.glob("*.tmp"))


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode  # fmt: skip
    if not mounted:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("codec", CODECS)
def test_a_full_disk_breaks_nothing_and_keeps_what_was_there(
    small_disk: Path, tmp_path: Path, codec: Codec, encrypted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(tmp_path / "memory.db")
    cipher = PageCipher(bytes(32)) if encrypted else None
    store = PageStore(database, small_disk, grid=GRID, codec=codec, cipher=cipher)
    shelf = Shelf.__new__(Shelf)
    shelf.folder, shelf.database, shelf.store, shelf.view = small_disk, database, store, store.view(b"salt")
    kept: dict[int, Layers] = {}
    for number in range(100):
        layers = states(number)
        if shelf.seal(layers, number) < 3:
            break
        kept[number] = layers
    assert kept
    assert "No space left" in caplog.text
    assert not list(small_disk.glob("*.tmp"))
    for number, layers in kept.items():
        count, room = shelf.restored(layers, number)
        assert count == 3
        assert same(room, layers)
    assert store.verify() == []
    assert store.evict() == 0
    store.delete([entry.key for entry in store.entries()][:3])
    again = states(100)
    assert shelf.seal(again, 100) == 3
    assert same(shelf.restored(again, 100)[1], again)
    database.close()


def test_an_encoded_page_is_a_value() -> None:
    encoded = encode(states(pages=1), GRID, 0, "int8")
    assert isinstance(encoded, Encoded)
    assert (encoded.codec, encoded.layout) == ("int8", Layout.of(states(pages=1), GRID))
    assert len(encoded.table) == 16 * 4
    assert len(encoded.body) % 64 == 0
