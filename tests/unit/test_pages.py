"""Page files: written whole or not at all, mapped only when sound, and readable for ever."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import resource
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from agentmem import _pure
from agentmem.activation.identity import digest, root
from agentmem.activation.pages import LayerShape, Layout, NewPage, Page, stage_pages, write_page
from agentmem.errors import Corrupt, Incompatible, InvalidInput

GOLDEN = Path(__file__).parents[1] / "golden" / "pages"
IDENTITY = digest({"weights": "w"})
PARENT = root(IDENTITY, b"salt", 16)


def states(dtype: Any = np.uint16, positions: int = 16) -> list[tuple[Any, Any]]:
    random = np.random.default_rng(0)
    item = np.dtype(dtype).itemsize
    layers: list[tuple[Any, Any]] = []
    for _ in range(3):
        k, v = (
            np.frombuffer(random.bytes(2 * positions * dim * item), dtype).reshape(2, positions, dim) for dim in (8, 4)
        )
        layers.append((k, v))
    return layers


def write(path: Path, layers: list[tuple[Any, Any]] | None = None, **changes: Any) -> Path:
    fields: dict[str, Any] = {"identity": IDENTITY, "parent": PARENT, "number": 0, "tokens": range(16)}
    fields |= {"layers": layers or states(), **changes}
    write_page(path, NewPage(**fields))
    return path


@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "f32"), (np.float16, "f16"), (np.uint16, "bf16")])
def test_what_was_written_is_read(tmp_path: Path, dtype: Any, name: str) -> None:
    layers = states(dtype, positions=48)
    page = Page(write(tmp_path / "page", layers, at=20, number=3))
    assert (page.identity, page.parent, page.number, page.tokens) == (IDENTITY, PARENT, 3, tuple(range(16)))
    assert page.layout == Layout(name, 16, (LayerShape(2, 8, 4),) * 3)  # type: ignore[arg-type]
    assert page.layout.page_bytes == (tmp_path / "page").stat().st_size
    room = [(np.zeros((2, 40, 8), dtype), np.zeros((2, 40, 4), dtype)) for _ in range(3)]
    assert not page.verified
    page.read_layers([key for key, _ in room], [value for _, value in room], 24)
    assert page.verified
    for copies, sources in zip(room, layers, strict=True):
        for copy, source in zip(copies, sources, strict=True):
            assert copy[:, 24:].tobytes() == source[:, 20:36].tobytes()
            assert not copy[:, :24].any()


def test_a_mapped_page_outlives_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "page")
    page = Page(path)
    path.unlink()
    page.verify()
    page.close()


def test_a_damaged_page_is_corrupt_and_says_where(tmp_path: Path) -> None:
    path = write(tmp_path / "page")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    page = Page(path)
    with pytest.raises(Corrupt, match=r"page: an extent fails its checksum \(layer 2, head 1, block 0\)"):
        page.verify()
    room = [np.zeros((2, 16, 8), np.uint16)] * 3, [np.zeros((2, 16, 4), np.uint16)] * 3
    with pytest.raises(Corrupt):
        page.read_layers(*room, 0)
    assert not page.verified


@pytest.mark.parametrize("content", [b"", b"x", b"AMKVPAGE", bytes(4096)])
def test_what_is_no_page_is_corrupt(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "page"
    path.write_bytes(content)
    with pytest.raises(Corrupt, match="page"):
        Page(path)


def test_a_newer_format_is_incompatible(tmp_path: Path) -> None:
    path = write(tmp_path / "page")
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, 8, 2)
    path.write_bytes(content)
    with pytest.raises(Incompatible, match="newer agentmem"):
        Page(path)


def test_a_key_that_does_not_follow_from_the_tokens_is_corrupt(tmp_path: Path) -> None:
    path = write(tmp_path / "page")
    content = bytearray(path.read_bytes())
    content[160] ^= 1  # a token, with a checksum put right
    first = struct.unpack_from("<I", content, 16)[0]
    struct.pack_into("<I", content, 12, _pure.crc32c(memoryview(content)[16:first]))
    path.write_bytes(content)
    with pytest.raises(Corrupt, match="does not follow"):
        Page(path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(write(tmp_path / "page"))
    with pytest.raises(OSError, match="symbolic links"):
        Page(tmp_path / "link")


def wrong_layers() -> dict[str, list[tuple[Any, Any]]]:
    key, value = states()[0]
    return {
        "float64": [(key.astype(np.float64), value.astype(np.float64))],
        "two types": [(key, value.astype(np.float32))],
        "bytes": [(b"abc", b"abc")],
        "no layers": [],
        "two axes": [(key[0], value[0])],
        "other heads": [(key, value[:1])],
        "other positions": [(key, value[:, :15])],
        "too few positions": [(key[:, :15], value[:, :15])],
        "no dimensions": [(key[:, :, :0], value)],
        "not contiguous": [(key.transpose(1, 0, 2), value.transpose(1, 0, 2))],
    }


@pytest.mark.parametrize("name", wrong_layers())
def test_states_that_can_not_be_a_page_are_refused_and_leave_nothing(tmp_path: Path, name: str) -> None:
    layers = wrong_layers()[name]
    with pytest.raises(InvalidInput):
        write_page(
            tmp_path / "page",
            NewPage(identity=IDENTITY, parent=PARENT, number=0, tokens=range(16), layers=layers),
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("grid", [0, 65, 100, 1 << 17])
def test_impossible_grids_are_refused(grid: int) -> None:
    with pytest.raises(InvalidInput):
        Layout("bf16", grid, (LayerShape(1, 8, 8),))


def test_room_of_another_shape_is_refused(tmp_path: Path) -> None:
    page = Page(write(tmp_path / "page"))
    keys, values = [np.zeros((2, 16, 8), np.uint16)] * 3, [np.zeros((2, 16, 4), np.uint16)] * 3
    calls: list[tuple[Any, ...]] = [
        (keys[:2], values[:2], 0, 2),
        (keys[:2], values, 0),
        (keys, values, 1),
        (values, keys, 0),
        (keys, [b"x"] * 3, 0),
    ]
    for bad in calls:
        with pytest.raises(InvalidInput, match="can't be copied there"):
            page.read_layers(*bad)


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            write(tmp_path / "page")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_of_several_pages_all_are_written_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [
        NewPage(identity=IDENTITY, parent=PARENT, number=i, tokens=range(i, i + 16), layers=states()) for i in range(9)
    ]
    staged = stage_pages(tmp_path, pages)
    assert [Page(path).number for path in staged] == list(range(9))
    for path in staged:
        path.unlink()
    original, calls = os.fsync, []

    def fail(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 5:
            raise OSError(5, "Input/output error")
        original(fd)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        stage_pages(tmp_path, pages)
    assert not list(tmp_path.iterdir())


def test_a_failed_sync_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path / "page")
    assert not list(tmp_path.iterdir())


def test_a_staged_page_is_private_and_has_no_name_yet(tmp_path: Path) -> None:
    page = NewPage(identity=IDENTITY, parent=PARENT, number=0, tokens=range(16), layers=states())
    [staged] = stage_pages(tmp_path, [page])
    assert staged.name.endswith(".tmp")
    assert staged.stat().st_mode & 0o777 == 0o600
    os.replace(staged, tmp_path / "page")
    assert Page(tmp_path / "page").key.hex() == staged.name.split(".")[0]


def golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_v1", GOLDEN / "write_v1.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("index", [0, 1])
def test_golden_files_of_version_1_are_read_and_written_alike(tmp_path: Path, index: int) -> None:
    script = golden()
    name, grid, dtype, shapes = script.FILES[index]
    layers = script.states(dtype, shapes)
    page = Page(GOLDEN / name)
    room = [(np.zeros_like(key), np.zeros_like(value)) for key, value in layers]
    page.read_layers([key for key, _ in room], [value for _, value in room], 0)
    for copies, sources in zip(room, layers, strict=True):
        assert all((copy == source).all() for copy, source in zip(copies, sources, strict=True))
    assert (page.identity, page.parent, list(page.tokens)) == (
        script.IDENTITY,
        script.parent(grid),
        script.tokens(grid),
    )
    copy = tmp_path / name
    again = NewPage(identity=page.identity, parent=page.parent, number=0, tokens=page.tokens, layers=layers)
    write_page(copy, again, durable=False)
    assert copy.read_bytes() == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("module", [_pure, None], ids=["pure", "chosen"])
@pytest.mark.parametrize("index", range(6))
def test_golden_files_of_every_codec_are_read_and_written_alike(
    tmp_path: Path, index: int, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module is not None:
        monkeypatch.setattr(_pure, "kernels", lambda: module)
    script = golden()
    name, codec, dtype = script.CODED[index]
    [(key, value)] = script.like_states(dtype)
    page = Page(GOLDEN / name)
    copies = np.zeros_like(key), np.zeros_like(value)
    page.read_layers([copies[0]], [copies[1]], 0)
    if name in script.DECODED:
        assert hashlib.sha256(copies[0].tobytes() + copies[1].tobytes()).hexdigest() == script.DECODED[name]
    else:
        assert (copies[0] == key).all()
        assert (copies[1] == value).all()
    again = NewPage(
        identity=page.identity, parent=page.parent, number=0, tokens=page.tokens, layers=[(key, value)], codec=codec
    )
    write_page(tmp_path / name, again, durable=False)
    assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()
