"""The C extension against its numpy twin: the same bytes, the same errors, at every instruction set."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from agentmem import _pure

native = pytest.importorskip("agentmem._native", reason="built without a C compiler")

IDS = (b"i" * 32, b"k" * 32, b"p" * 32)


@pytest.fixture(params=native.cpu_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.cpu_level()
    native.set_cpu_level(request.param)
    yield request.param
    native.set_cpu_level(before)


def states(shapes: list[tuple[int, int, int]], positions: int, dtype: Any) -> tuple[list[Any], list[Any]]:
    random = np.random.default_rng(1)
    item = np.dtype(dtype).itemsize
    arrays = [  # any bits, also those of no number
        [
            np.frombuffer(random.bytes(heads * positions * dim * item), dtype).reshape(heads, positions, dim)
            for dim in dims
        ]
        for heads, *dims in shapes
    ]
    return [pair[0] for pair in arrays], [pair[1] for pair in arrays]


def write(module: ModuleType, path: Path, number: int, grid: int, keys: list[Any], values: list[Any], at: int) -> bytes:
    tokens = np.arange(grid, dtype=np.int32)
    fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR)
    try:
        length = module.page_write(fd, number, grid, 5, *IDS, tokens, keys, values, at)
    finally:
        os.close(fd)
    content = path.read_bytes()
    assert len(content) == length
    return content


# ---- CRC32C


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c_gives_the_values_of_rfc_3720(data: bytes, crc: int, level: str) -> None:
    assert native.crc32c(data) == _pure.crc32c(data) == crc


@pytest.mark.parametrize(
    "length", [1, 3, 4, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256, 767, 768, 769, 8183, 8184, 8192, 16384, 100_003]
)
def test_every_level_computes_the_checksum_of_the_twin(length: int, level: str) -> None:
    data = np.random.default_rng(length).bytes(length + 3)
    for start in (0, 1, 3):
        part = memoryview(data)[start : start + length]
        assert native.crc32c(part) == _pure.crc32c(part)
        assert native.crc32c(part, 0xDEADBEEF) == _pure.crc32c(part, 0xDEADBEEF)
        assert native.crc32c(part[length // 3 :], native.crc32c(part[: length // 3])) == native.crc32c(part)


def test_the_level_in_use_is_named_and_an_unknown_one_refused() -> None:
    assert native.cpu_level() in native.cpu_levels()
    assert "scalar" in native.cpu_levels()
    for module in (native, _pure):
        with pytest.raises(ValueError, match="no level avx9000"):
            module.set_cpu_level("avx9000")
    _pure.set_cpu_level(_pure.cpu_level())


# ---- pages

SHAPES = [[(1, 8, 8)], [(3, 64, 64)] * 4, [(2, 16, 8), (1, 3, 2)], [(1, 1, 1)], [(9, 5, 7)]]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("grid", [1, 7, 16, 64, 128])
@pytest.mark.parametrize(("number", "dtype"), [(1, np.float32), (2, np.float16), (3, np.uint16)])
def test_both_write_the_same_bytes_and_read_each_others_pages(
    tmp_path: Path, shapes: list[tuple[int, int, int]], grid: int, number: int, dtype: Any
) -> None:
    at = 5
    keys, values = states(shapes, grid + 9, dtype)
    pages = [write(module, tmp_path / "page", number, grid, keys, values, at) for module in (native, _pure)]
    assert pages[0] == pages[1]
    layers = tuple(shapes)
    assert len(pages[0]) == native.page_size(number, grid, layers) == _pure.page_size(number, grid, layers)
    tokens = np.arange(grid, dtype=np.int32).tobytes()
    for module in (native, _pure):
        assert module.page_parse(pages[0]) == (number, grid, 5, *IDS, tokens, layers)
        module.page_verify(pages[0])
        for check in (True, False):
            copies = [[np.full_like(array, 7) for array in side] for side in (keys, values)]
            module.page_read(pages[0], *copies, 2, check)
            for copy, source in zip((*copies[0], *copies[1]), (*keys, *values), strict=True):
                assert copy[:, 2 : 2 + grid].tobytes() == source[:, at : at + grid].tobytes()
                assert (copy[:, :2] == 7).all()
                assert (copy[:, 2 + grid :] == 7).all()


def test_heads_may_lie_apart_in_memory(tmp_path: Path) -> None:
    whole = np.random.default_rng(2).integers(0, 99, (2, 4, 40, 8)).astype(np.uint16)
    keys, values = [whole[0, ::2, 3:37]], [whole[1, ::2, 3:37]]
    pages = [write(module, tmp_path / "page", 3, 16, keys, values, 4) for module in (native, _pure)]
    assert pages[0] == pages[1]
    for module in (native, _pure):
        room = np.zeros((2, 4, 20, 8), np.uint16)
        module.page_read(pages[0], [room[0, ::2]], [room[1, 1::2]], 4)
        assert (room[0, ::2, 4:] == keys[0][:, 4:20]).all()
        assert (room[1, 1::2, 4:] == values[0][:, 4:20]).all()
        assert not room[0, 1::2].any()


def bad_arguments() -> dict[str, tuple[Any, ...]]:
    good = np.zeros((2, 16, 4), np.uint16)
    return {
        "two axes": ([good[0]], [good], 0),
        "no layers": ([], [], 0),
        "a value is missing": ([good, good], [good], 0),
        "too few positions": ([good[:, :15]], [good], 0),
        "before the start": ([good], [good], -1),
        "behind the end": ([good], [good], 1),
        "far behind the end": ([good], [good], 1 << 62),
        "at the last position that there is": ([good], [good], sys.maxsize),
        "not aligned": ([np.zeros(257, np.uint8)[1:].view(np.uint16).reshape(2, 16, 4)], [good], 0),
        "other item size": ([good.astype(np.float32)], [good], 0),
        "other heads": ([good[:1]], [good], 0),
        "positions apart": ([np.zeros((2, 32, 4), np.uint16)[:, ::2]], [good], 0),
        "dimensions apart": ([np.zeros((2, 16, 8), np.uint16)[:, :, ::2]], [good], 0),
        "transposed": ([np.zeros((16, 2, 4), np.uint16).transpose(1, 0, 2)], [good], 0),
    }


@pytest.mark.parametrize("name", bad_arguments())
@pytest.mark.parametrize("module", [native, _pure], ids=["native", "pure"])
def test_tensors_that_do_not_fit_are_refused_before_anything_happens(
    module: ModuleType, name: str, tmp_path: Path
) -> None:
    keys, values, at = bad_arguments()[name]
    good = np.zeros((2, 16, 4), np.uint16)
    page = write(module, tmp_path / "good", 3, 16, [good], [good], 0)
    before = [array.copy() for array in (*keys, *values)]
    with pytest.raises(ValueError):  # noqa: PT011 (the sentences differ)
        module.page_read(page, keys, values, at)
    with pytest.raises(ValueError):  # noqa: PT011
        write(module, tmp_path / "bad", 3, 16, keys, values, at)
    assert (tmp_path / "bad").stat().st_size == 0
    assert all((array == copy).all() for array, copy in zip((*keys, *values), before, strict=True))


@pytest.mark.parametrize("module", [native, _pure], ids=["native", "pure"])
def test_numbers_that_no_header_holds_are_refused_and_not_cut(module: ModuleType, tmp_path: Path) -> None:
    good = np.zeros((2, 16, 4), np.uint16)
    calls: list[Callable[[], object]] = [
        lambda: module.page_size((1 << 32) + 1, 64, ((1, 8, 8),)),
        lambda: module.page_size(1, (1 << 32) + 64, ((1, 8, 8),)),
        lambda: module.page_size(1, 64, (((1 << 32) + 1, 8, 8),)),
        lambda: module.page_size(1, 64, ((1, -8, 8),)),
        lambda: module.page_encode(3, 1 << 32, 16, [good], [good], 0, False),
    ]
    for call in calls:
        with pytest.raises(ValueError):  # noqa: PT011 (the sentences differ)
            call()
    with (tmp_path / "page").open("wb") as file, pytest.raises(ValueError, match="no number"):
        module.page_write(file.fileno(), 3, 16, (1 << 32) + 5, *IDS, bytes(64), [good], [good], 0)
    with pytest.raises((TypeError, ValueError)):
        module.page_size(1, 64, (8,))


@pytest.mark.parametrize("module", [native, _pure], ids=["native", "pure"])
def test_a_page_is_not_read_into_its_own_bytes(module: ModuleType, tmp_path: Path) -> None:
    good = np.full((2, 16, 4), 7, np.uint16)
    page = bytearray(write(module, tmp_path / "page", 3, 16, [good, good], [good, good], 0))
    before = bytes(page)
    inside = np.frombuffer(page, np.uint16)[-128:].reshape(2, 16, 4)
    room = np.zeros_like(good)
    for tensor in (inside, inside[::-1]):
        with pytest.raises(ValueError, match="its own bytes"):
            module.page_read(page, [room, room], [room, tensor], 0)
    assert bytes(page) == before


CHANGED = """
import threading, numpy as np
from agentmem import _native
states = [np.ones((1, 64, 8), np.uint16)] * 400
with open({path!r}, "w+b") as file:
    ids = b"i" * 32, b"k" * 32, b"p" * 32
    _native.page_write(file.fileno(), 3, 64, 0, *ids, np.arange(64, dtype=np.int32), states, states, 0)
    file.seek(0)
    page = bytearray(file.read())
layers = 160 + 4 * 64
table = layers + 16 * 400
at = table - 16
room = [np.zeros((1, 64, 8), np.uint16) for _ in states]
stop = threading.Event()

def change() -> None:
    while not stop.is_set():
        for place, value in ((at, 1000), (table + 24 * 398 + 7, 127), (table + 24 * 399 + 15, 127), (at + 4, 4000)):
            old = page[place : place + 2]
            page[place : place + 2] = value.to_bytes(2, "little")
            page[place : place + 2] = old

threads = [threading.Thread(target=change) for _ in range(2)]
for thread in threads:
    thread.start()
rules = set()
for turn in range(3000):
    try:
        _native.page_read(page, room, room, 0, turn % 2 == 0)
        _native.page_verify(page)
    except ValueError as error:
        rules.add(error.args[0])
stop.set()
for thread in threads:
    thread.join()
print(sorted(rules))
"""


@pytest.mark.slow
def test_bytes_that_change_while_they_are_read_end_no_process(tmp_path: Path) -> None:
    code = CHANGED.format(path=str(tmp_path / "page"))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() != "[]", "what changed is told by whichever rule meets it first"


SMALL_STACK = """
import threading, numpy as np
from agentmem import _native
threading.stack_size(160 * 1024)
random = np.random.default_rng(0)
states = random.normal(size=(1, 64, 1024)).astype(np.float32)
made = []

def encode() -> None:
    for codec in (1, 2, 3, 4, 5):
        table, body = _native.page_encode(1, codec, 64, [states], [states.copy()], 0, True)
        made.append(len(body))

for _ in range(4):
    thread = threading.Thread(target=encode)
    thread.start()
    thread.join()
print(len(made))
"""


def test_encoding_needs_no_large_stack() -> None:
    run = subprocess.run([sys.executable, "-c", SMALL_STACK], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "20\n"), run.stderr[-2000:]


@pytest.mark.parametrize("name", native.cpu_levels())
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    code = "from agentmem import _native; print(_native.cpu_level())"
    environment = {**os.environ, "AGENTMEM_CPU_LEVEL": name}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == f"{name}\n"
    environment["AGENTMEM_CPU_LEVEL"] = "avx9000"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ImportError: AGENTMEM_CPU_LEVEL is avx9000" in run.stderr


def test_every_feature_that_a_level_is_built_for_is_asked_for() -> None:
    sources = Path(__file__).parents[2] / "native"
    detection = (sources / "cpu.c").read_text()
    built = re.findall(r"target\((.*?)\)\)\)", (sources / "cpu.h").read_text(), re.DOTALL)
    parts = [part for text in built for part in re.findall(r'"(.*?)"', text)]
    features = {feature for part in parts for feature in part.strip(",").split(",")}
    assert {"sse4.2", "avx2", "lzcnt", "vpclmulqdq"} <= features
    assert not [name for name in features if f'supports("{name}")' not in detection and f"_{name}" not in detection]


@pytest.mark.parametrize("module", [native, _pure], ids=["native", "pure"])
def test_read_only_room_and_wrong_digests_are_refused(module: ModuleType, tmp_path: Path) -> None:
    good = np.zeros((2, 16, 4), np.uint16)
    page = write(module, tmp_path / "good", 3, 16, [good], [good], 0)
    frozen = good.copy()
    frozen.flags.writeable = False
    with pytest.raises((BufferError, ValueError)):
        module.page_read(page, [frozen], [good], 0)
    with (tmp_path / "bad").open("wb") as file, pytest.raises(ValueError, match="32 bytes each"):
        module.page_write(file.fileno(), 3, 16, 0, b"i", *IDS[1:], bytes(64), [good], [good], 0)


@pytest.mark.parametrize("module", [native, _pure], ids=["native", "pure"])
@pytest.mark.parametrize(
    ("dtype", "grid", "layers", "rule"),
    [
        (9, 16, ((1, 1, 1),), "dtype"),
        (3, 0, ((1, 1, 1),), "grid"),
        (3, 65, ((1, 1, 1),), "grid"),
        (3, 1 << 20, ((1, 1, 1),), "grid"),
        (3, 64, (), "layers"),
        (3, 64, ((1, 1, 1),) * 1025, "layers"),
        (3, 64, ((1025, 1, 1),), "shape"),
        (3, 64, ((1, 65537, 1),), "shape"),
        (3, 64, ((1, 1, 0),), "shape"),
        (3, 65536, ((1024, 65536, 65536),) * 1024, "header length"),
    ],
)
def test_an_impossible_layout_names_its_rule(
    module: ModuleType, dtype: int, grid: int, layers: tuple[tuple[int, int, int], ...], rule: str
) -> None:
    with pytest.raises(module.PageError) as caught:
        module.page_size(dtype, grid, layers)
    assert caught.value.args[0] == rule
    assert caught.value.args[1] == _pure.RULES[rule]


@pytest.mark.parametrize("module", [native, _pure], ids=["native", "pure"])
def test_a_full_disk_is_an_os_error(module: ModuleType, tmp_path: Path) -> None:
    states_ = np.zeros((2, 64, 64), np.float32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            write(module, tmp_path / "page", 1, 64, [states_], [states_], 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_part_of_a_mapping_that_can_not_be_read_is_an_error_and_no_signal(tmp_path: Path) -> None:
    import mmap

    path = tmp_path / "page"
    path.write_bytes(bytes(1 << 16))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        native.prefault(data)
        os.truncate(path, 4096)
        if sys.platform == "linux":
            with pytest.raises(OSError, match="Bad address"):
                native.prefault(data)


def test_threads_read_one_page_at_once(tmp_path: Path) -> None:
    keys, values = states([(3, 64, 64)] * 8, 64, np.uint16)
    page = write(native, tmp_path / "page", 3, 64, keys, values, 0)
    failures: list[str] = []

    def read() -> None:
        for _ in range(20):
            room = [[np.zeros_like(array) for array in side] for side in (keys, values)]
            native.page_read(page, *room, 0)
            native.page_verify(page)
            if not all((a == b).all() for a, b in zip((*room[0], *room[1]), (*keys, *values), strict=True)):
                failures.append("other bytes")

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- the choice between the two

CHOOSE = """
import logging, sys
records = []
logging.getLogger("agentmem").addHandler(type("H", (logging.Handler,), {"emit": lambda self, r: records.append(r)})())
if sys.argv[1] == "blocked":
    sys.modules["agentmem._native"] = None
from agentmem import _pure
assert "numpy" not in sys.modules
chosen = {_pure.kernels().__name__ for _ in range(3)}
print(*chosen, len(records), _pure.kernels().crc32c(b"123456789"))
"""


@pytest.mark.parametrize(
    ("argument", "pure", "expected"),
    [
        ("", "", "agentmem._native 0"),
        ("", "0", "agentmem._native 0"),
        ("", "1", "agentmem._pure 1"),
        ("blocked", "", "agentmem._pure 1"),
    ],
)
def test_the_twin_stands_in_with_one_warning(argument: str, pure: str, expected: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CHOOSE, argument],
        env={**os.environ, "AGENTMEM_PURE": pure},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == f"{expected} {0xE3069283}"
