"""Hostile and damaged page files: each breaks one rule of the format, and both readers must name that rule."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from agentmem import _pure
from agentmem.activation.pages import NewPage, write_page

MODULES: list[ModuleType] = [_pure]
try:
    from agentmem import _native

    MODULES.append(_native)  # type: ignore[arg-type,unused-ignore]
except ImportError:
    pass

FIRST, LENGTH, DTYPE, GRID, BLOCK, LAYERS, EXTENTS, TOKENS = 16, 24, 20, 32, 36, 44, 48, 160
NATIVE = Path(__file__).parents[2] / "native"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A good page: 7 tokens, 2 layers, 3 extents of 84 or 56 bytes with padding behind each."""
    path = tmp_path_factory.mktemp("attacks") / "page"
    random = np.random.default_rng(0)
    layers: list[tuple[Any, Any]] = []
    for heads, key_dim, value_dim in ((2, 3, 3), (1, 2, 2)):
        k, v = (random.integers(0, 1 << 16, (heads, 7, dim)).astype(np.uint16) for dim in (key_dim, value_dim))
        layers.append((k, v))
    write_page(path, NewPage(identity=b"i" * 32, parent=b"p" * 32, number=2, tokens=range(7), layers=layers))
    return path.read_bytes()


def layer_table(data: bytes | bytearray) -> int:
    return TOKENS + 4 * int(struct.unpack_from("<I", data, GRID)[0])


def extent_table(data: bytes | bytearray) -> int:
    return layer_table(data) + 16 * int(struct.unpack_from("<I", data, LAYERS)[0])


def mended(data: bytearray) -> bytes:
    """With the header's checksum put right, as a hostile writer would."""
    first = struct.unpack_from("<I", data, FIRST)[0]
    struct.pack_into("<I", data, 12, _pure.crc32c(memoryview(data)[16:first]))
    return bytes(data)


def with_u32(offset: int, value: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        struct.pack_into("<I", data, offset, value)
        return data

    return change


def with_layer(layer: int, field: int, value: int) -> Callable[[bytearray], bytearray]:
    return lambda data: with_u32(layer_table(data) + 16 * layer + 4 * field, value)(data)


def with_extent(extent: int, field: int, value: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        formats = ("<Q", "<Q", "<I", "<I")
        offsets = (0, 8, 16, 20)
        struct.pack_into(formats[field], data, extent_table(data) + 24 * extent + offsets[field], value)
        return data

    return change


def with_overlap(data: bytearray) -> bytearray:
    table = extent_table(data)
    data[table + 24 : table + 48] = data[table : table + 24]
    return data


def with_gap(data: bytearray) -> bytearray:
    table = extent_table(data)
    for i in (1, 2):
        offset = struct.unpack_from("<Q", data, table + 24 * i)[0]
        struct.pack_into("<Q", data, table + 24 * i, offset + 64)
    struct.pack_into("<Q", data, LENGTH, len(data) + 64)
    return data + bytes(64)


def with_tail(data: bytearray) -> bytearray:
    struct.pack_into("<Q", data, LENGTH, len(data) + 64)
    return data + b"PK\x05\x06" + bytes(60)


ATTACKS: dict[str, tuple[Callable[[bytearray], bytearray], str]] = {
    "a newer version": (with_u32(8, 2), "version"),
    "the header has no length": (with_u32(FIRST, 0), "header length"),
    "the header is shorter than its fixed part": (with_u32(FIRST, 128), "header length"),
    "the header is not aligned": (with_u32(FIRST, 321), "header length"),
    "the header is longer than the file": (with_u32(FIRST, 0xFFFFFFC0), "header length"),
    "a reserved field is used": (with_u32(52, 1), "reserved"),
    "an unknown dtype": (with_u32(DTYPE, 4), "dtype"),
    "no grid": (with_u32(GRID, 0), "grid"),
    "a grid that is no multiple of 64": (with_u32(GRID, 100), "grid"),
    "a grid bomb": (with_u32(GRID, 0xFFFFFFC0), "grid"),
    "a grid larger than the header": (lambda d: with_u32(BLOCK, 64)(with_u32(GRID, 65536)(d)), "header length"),
    "another block": (with_u32(BLOCK, 3), "grid"),
    "no layers": (with_u32(LAYERS, 0), "layers"),
    "a layer bomb": (with_u32(LAYERS, 0xFFFFFFFF), "layers"),
    "more layers than the header holds": (with_u32(LAYERS, 1024), "header length"),
    "one layer more": (with_u32(LAYERS, 3), "shape"),
    "an extent bomb": (with_u32(EXTENTS, 0xFFFFFFFF), "header length"),
    "one extent less": (with_u32(EXTENTS, 2), "header length"),
    "no heads": (with_layer(0, 0, 0), "shape"),
    "a head bomb": (with_layer(0, 0, 0xFFFFFFFF), "shape"),
    "as many heads as are allowed": (with_layer(1, 0, 1024), "header length"),
    "no dimensions": (with_layer(1, 1, 0), "shape"),
    "a dimension bomb": (with_layer(1, 2, 0xFFFFFFFF), "shape"),
    "the largest dimensions allowed": (with_layer(1, 1, 65536), "extent"),
    "a reserved field of a layer is used": (with_layer(1, 3, 9), "reserved"),
    "an unknown codec": (with_extent(1, 3, 6), "codec"),
    "a raw extent that claims another codec": (with_extent(1, 3, 3), "extent"),
    "an extent before the data": (with_extent(0, 0, 0), "extent"),
    "an extent behind the file": (with_extent(2, 0, 1 << 40), "extent"),
    "an extent whose end wraps around": (with_extent(2, 0, (1 << 64) - 64), "extent"),
    "an extent of no length": (with_extent(1, 1, 0), "extent"),
    "an extent bomb in length": (with_extent(1, 1, (1 << 64) - 1), "extent"),
    "two extents at one place": (with_overlap, "extent"),
    "a gap between extents": (with_gap, "extent"),
    "something behind the last extent": (with_tail, "length"),
    "a wrong checksum in the table": (with_extent(2, 2, 1), "checksum"),
}


def rule_of(module: ModuleType, data: bytes) -> str | None:
    try:
        module.page_verify(data)
    except module.PageError as error:
        return str(error.args[0])
    return None


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_is_refused_by_its_rule(name: str, page: bytes) -> None:
    change, rule = ATTACKS[name]
    data = mended(change(bytearray(page)))
    room = [[np.zeros((2, 7, 3), np.uint16), np.zeros((1, 7, 2), np.uint16)] for _ in range(2)]
    for module in MODULES:
        assert rule_of(module, data) == rule
        with pytest.raises(module.PageError) as caught:
            module.page_read(data, *room, 0)
        assert caught.value.args[0] == rule


def test_bytes_in_the_padding_are_refused(page: bytes) -> None:
    first = struct.unpack_from("<I", page, FIRST)[0]
    tables_end = extent_table(page) + 24 * 3
    header = bytearray(page)
    header[tables_end] = 1
    assert tables_end < first
    extent = bytearray(page)
    extent[first + 84] = 1
    for module in MODULES:
        assert rule_of(module, mended(header)) == "padding"
        assert rule_of(module, bytes(extent)) == "padding"


def test_every_flipped_bit_is_noticed(page: bytes) -> None:
    for module in MODULES:
        step = 1 if module is not _pure else 37
        for bit in range(0, 8 * len(page), step):
            data = bytearray(page)
            data[bit // 8] ^= 1 << bit % 8
            assert rule_of(module, bytes(data)) is not None, f"bit {bit} of {module.__name__}"


def test_every_truncation_and_every_tail_is_noticed(page: bytes) -> None:
    for module in MODULES:
        for length in range(0, len(page), 1 if module is not _pure else 11):
            assert rule_of(module, page[:length]) in {"short", "header length", "length"}
        assert rule_of(module, page + b"\0") == "length"
        assert rule_of(module, page) is None


def test_both_readers_agree_on_any_damage(page: bytes) -> None:
    random = np.random.default_rng(5)
    for _ in range(400):
        data = bytearray(page)
        for _ in range(random.integers(1, 4)):
            data[random.integers(8, len(data))] = random.integers(256)
        rules = {
            rule_of(module, mended(data) if bytes(data[16:20]) == page[16:20] else bytes(data)) for module in MODULES
        }
        assert len(rules) == 1


#: All of native/ but the Python face.
PAGE_SOURCES = sorted(path.name for path in NATIVE.glob("*.c") if not path.name.startswith("module"))


SANITIZED = ["-g", "-O1", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The compiler's command to build a fuzz target under the sanitizers, with what targets share compiled already."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("objects")
    sources = [str(NATIVE / name) for name in ("fuzz/replay.c", *PAGE_SOURCES)]
    command = [compiler, *SANITIZED, "-I", str(NATIVE), "-c", *sources]
    built = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if built.returncode and "sanitize" in built.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    return [compiler, *SANITIZED, "-I", str(NATIVE), *sorted(map(str, folder.glob("*.o")))]


def replayed(target: str, inputs: list[Any], folder: Path, sanitized: list[str]) -> None:
    """Build a fuzz target under the sanitizers and replay these inputs with it."""
    program = folder / f"fuzz_{target}"
    command = [*sanitized, str(NATIVE / f"fuzz/fuzz_{target}.c"), "-o", str(program), "-lm"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode and "sanitize" in built.stderr:  # their run-time library is not there
        pytest.skip("this compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, content in enumerate(inputs):
        (corpus / f"{i:05}").write_bytes(content)
    files = sorted(str(path) for path in corpus.iterdir())
    run = subprocess.run([str(program), *files], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == f"{len(files)} files, no fault\n"


@pytest.mark.slow
def test_the_reader_is_clean_under_the_sanitizers(page: bytes, tmp_path: Path, sanitized: list[str]) -> None:
    random = np.random.default_rng(3)
    inputs: list[Any] = [page, b"", page[:159], page[:160], page * 2]
    inputs += [change(bytearray(page)) for change, _ in ATTACKS.values()]
    inputs += [page[: int(length)] for length in random.integers(0, len(page), 200)]
    for start in (page, *coded_pages(tmp_path)):
        for _ in range(1500):
            data = bytearray(start)
            for _ in range(random.integers(1, 9)):
                # Mostly in the header, where every byte means something.
                data[random.integers(8, 420 if random.random() < 0.8 else len(data))] = random.choice(
                    [0, 1, 64, 127, 255]
                )
            inputs.append(data)
    replayed("page", inputs, tmp_path, sanitized)


def coded_pages(folder: Path) -> list[bytes]:
    """A small page in every other codec."""
    random = np.random.default_rng(7)
    keys, values = ([random.normal(size=(2, 64, 64)).astype(np.float32)] for _ in range(2))
    pages = []
    for codec in range(1, 6):
        table, body = MODULES[-1].page_encode(1, codec, 64, keys, values, 0, False)
        path = folder / f"{codec}.page"
        with path.open("wb") as file:
            MODULES[-1].page_write_encoded(
                file.fileno(),
                1,
                64,
                0,
                b"i" * 32,
                b"k" * 32,
                b"p" * 32,
                np.arange(64, dtype=np.int32),
                ((2, 64, 64),),
                table,
                body,
            )
        pages.append(path.read_bytes())
    return pages


@pytest.mark.slow
def test_the_codecs_are_clean_under_the_sanitizers(tmp_path: Path, sanitized: list[str]) -> None:
    random = np.random.default_rng(11)
    inputs: list[Any] = [random.bytes(int(length)) for length in random.integers(0, 3000, 1500)]
    inputs += [random.bytes(8) + bytes(int(length)) for length in random.integers(0, 300, 200)]
    replayed("codec", inputs, tmp_path, sanitized)
