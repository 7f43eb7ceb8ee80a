"""Attention in place against attention in float64 over the decoded states, and level against level bit for bit."""

from __future__ import annotations

import itertools
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from agentmem import _pure

native = pytest.importorskip("agentmem._native", reason="built without a C compiler")

Array = npt.NDArray[Any]

F32, F16, BF16 = 1, 2, 3
RAW, LOSSLESS, INT8, K8V4, INT4 = 0, 1, 3, 4, 5
STORED = {F32: np.float32, F16: np.float16, BF16: np.uint16}
#: Largest error of the output, in parts of the largest value: what coding queries and weights in 16 bits adds, and the
#: rounding of the output to its dtype.
BOUND = {F32: 2e-4, F16: 1e-3, BF16: 6e-3}


def to_dtype(dtype: int, values: Array) -> Array:
    if dtype == BF16:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return values.astype(STORED[dtype])


def to_float(dtype: int, values: Array) -> Array:
    if dtype == BF16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


class Part(NamedTuple):
    """Tokens first .. first + tokens of a page, appended in a segment that is turned by ``shift`` (None: as before)."""

    codec: int
    grid: int = 64
    first: int = 0
    tokens: int = -1
    shift: float | None = None


class Call(NamedTuple):
    dtype: int = F32
    kv_heads: int = 2
    group: int = 3
    key_dim: int = 64
    value_dim: int = 64
    queries: int = 1
    length: int = 5
    window: int = 0
    parts: tuple[Part, ...] = ()
    pairs: int = 8
    #: Of each query, how many segments it sees; None: the argument is left out.
    seen: tuple[int, ...] | None = None


def angles(call: Call, shift: float) -> tuple[Array, Array]:
    turned = shift * 0.3 ** np.arange(call.pairs)
    return np.cos(turned).astype(np.float32), np.sin(turned).astype(np.float32)


class Case:
    """The states of a call: pages as they are encoded, and what they decode to."""

    def __init__(self, call: Call, seed: int = 0) -> None:
        self.call = call
        random = np.random.default_rng(seed)
        heads = call.kv_heads * call.group
        self.layers = [(call.kv_heads, call.key_dim, call.value_dim)] * 2
        offset = random.normal(size=(2, call.kv_heads, 1, call.key_dim)) * 2  # channels that stay large, as rotary ones

        def states(tokens: int) -> tuple[list[Array], list[Array]]:
            keys = random.normal(size=(2, call.kv_heads, tokens, call.key_dim)) + offset
            values = random.normal(size=(2, call.kv_heads, tokens, call.value_dim))
            return [to_dtype(call.dtype, k) for k in keys], [to_dtype(call.dtype, v) for v in values]

        self.encoded: list[tuple[bytes, Any]] = []
        self.keys: list[list[Array]] = []
        self.values: list[list[Array]] = []
        for part in call.parts:
            keys, values = states(part.grid)
            self.encoded.append(native.page_encode(call.dtype, part.codec, part.grid, keys, values, 0, True))
            stop = part.grid if part.tokens < 0 else part.first + part.tokens
            self.keys.append([k[:, part.first : stop] for k in keys])
            self.values.append([v[:, part.first : stop] for v in values])
        self.query = to_dtype(call.dtype, random.normal(size=(heads, call.queries, call.key_dim)))
        (self.key, _), (self.value, _) = states(call.queries)
        (self.old_key, _), (self.old_value, _) = states(call.length)

    def prefix(self, module: ModuleType) -> Any:
        prefix = module.Prefix(self.call.dtype, self.layers)
        for part, (table, body) in zip(self.call.parts, self.encoded, strict=True):
            if part.shift is not None:
                prefix.begin_segment(*angles(self.call, part.shift))
            prefix.append_encoded(part.grid, table, body, part.first, part.tokens)
        return prefix

    def tails(self, capacity: int) -> tuple[Array, Array]:
        tails = []
        for old in (self.old_key, self.old_value):
            tail = np.full((old.shape[0], capacity, old.shape[2]), 7, STORED[self.call.dtype])
            tail[:, : self.call.length] = old
            tails.append(tail)
        return tails[0], tails[1]

    def attend(self, module: ModuleType, threads: int = 1, layer: int = 0, prefix: Any = None) -> Array:
        call = self.call
        tail_keys, tail_values = self.tails(call.length + call.queries + 3)
        out = np.full((call.queries, self.query.shape[0], call.value_dim), 7, STORED[call.dtype])
        prefix = self.prefix(module) if prefix is None else prefix
        prefix.attend(
            layer, self.query, self.key, self.value, tail_keys, tail_values, call.length, out, self.scale, call.window,
            threads, *([] if call.seen is None else [np.array(call.seen, np.uint32)]),
        )  # fmt: skip
        end = call.length + call.queries
        assert np.array_equal(tail_keys[:, call.length : end], self.key)
        assert np.array_equal(tail_values[:, call.length : end], self.value)
        assert (tail_keys[:, end:] == 7).all()
        return out

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.call.key_dim)

    def expected(self) -> tuple[Array, float]:
        """softmax(scale * q k^T) v in float64 over what the pages decode to, and the largest value."""
        call = self.call
        shift, shifts, segment, segments = 0.0, [], 0, []
        for part in call.parts:
            shift, segment = (shift, segment) if part.shift is None else (part.shift, segment + 1)
            shifts.append(shift)
            segments.append(segment)
        query = to_float(call.dtype, self.query)
        out = np.empty((call.queries, query.shape[0], call.value_dim))
        lengths = [keys[0].shape[1] for keys in self.keys]
        positions = np.arange(sum(lengths) + call.length + call.queries)
        of = np.concatenate([np.repeat(segments, lengths), np.zeros(call.length + call.queries)])
        for head in range(query.shape[0]):
            kv = head // call.group
            scores = []
            for keys, turn in zip(self.keys, shifts, strict=True):
                turned = query[head].copy()
                cosine, sine = (a.astype(np.float64) for a in angles(call, turn))
                a, b = query[head][:, : call.pairs], query[head][:, call.pairs : 2 * call.pairs]
                turned[:, : call.pairs] = a * cosine + b * sine
                turned[:, call.pairs : 2 * call.pairs] = b * cosine - a * sine
                scores.append(turned @ to_float(call.dtype, keys[0][kv]).T)
            tail = np.concatenate([self.old_key[kv], self.key[kv]])
            scores.append(query[head] @ to_float(call.dtype, tail).T)
            values = [v[0][kv] for v in self.values] + [self.old_value[kv], self.value[kv]]
            logits = np.concatenate(scores, 1) * self.scale
            own = np.arange(call.queries)[:, None] + sum(lengths) + call.length
            seen = positions <= own
            if call.window:
                seen &= positions > own - call.window
            if call.seen is not None:
                seen &= of < np.array(call.seen)[:, None]
            logits = np.where(seen, logits, -np.inf)
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[:, head] = weights @ to_float(call.dtype, np.concatenate(values))
        return out, max(1.0, float(np.abs(out).max()))

    def check(self, module: ModuleType, threads: int = 1) -> Array:
        out = self.attend(module, threads)
        expected, largest = self.expected()
        assert np.abs(to_float(self.call.dtype, out) - expected).max() <= BOUND[self.call.dtype] * largest
        return out


@pytest.fixture(params=native.cpu_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.cpu_level()
    native.set_cpu_level(request.param)
    yield request.param
    native.set_cpu_level(before)


MIXED = (Part(INT8, 128), Part(RAW, 64, 0, 33), Part(K8V4), Part(INT4, 128, 64, 50), Part(INT8, 16, 0, 7))


@pytest.mark.parametrize("codec", [RAW, INT8, K8V4, INT4])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_attention_over_each_codec_is_that_of_float64(codec: int, dtype: int, level: str) -> None:
    Case(Call(dtype, parts=(Part(codec, 256), Part(codec, 128, 64, 37)))).check(native)


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(80, 80), (96, 96), (128, 64), (256, 256), (1, 3), (37, 101), (192, 128)]
)
def test_heads_of_every_width_are_attended_to(key_dim: int, value_dim: int, level: str) -> None:
    parts = tuple(Part(codec, 64, 0, 61) for codec in (RAW, INT8, K8V4, INT4))
    Case(Call(key_dim=key_dim, value_dim=value_dim, parts=parts, pairs=0)).check(native)


@pytest.mark.parametrize(("group", "queries"), [(1, 1), (2, 5), (4, 1), (5, 3), (7, 17), (9, 70), (1, 70)])
def test_every_number_of_queries_and_heads_is_causal(group: int, queries: int, level: str) -> None:
    Case(Call(kv_heads=2, group=group, queries=queries, length=60, parts=MIXED)).check(native)


@pytest.mark.parametrize("window", [1, 5, 64, 100, 10_000])
@pytest.mark.parametrize("queries", [1, 70])
def test_a_window_hides_what_lies_before_it(window: int, queries: int, level: str) -> None:
    Case(Call(queries=queries, window=window, parts=MIXED)).check(native)


def test_segments_turn_their_queries(level: str) -> None:
    parts = (Part(INT8), Part(INT8, 64, 0, 20, shift=40.0), Part(K8V4, 64, shift=-3.0), Part(RAW, shift=700.0))
    Case(Call(queries=3, parts=(*parts, Part(INT4), Part(INT8, shift=0.0)))).check(native)


SEGMENTS = (Part(INT8), Part(INT8, 64, 0, 20, shift=40.0), Part(K8V4, 64, shift=-3.0), Part(RAW), Part(INT4, shift=7.0))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("seen", [(1, 2, 2, 3, 4, 4), (4, 1, 3, 1, 2, 4), (9, 9, 9, 9, 9, 1)])
def test_a_query_sees_only_its_first_segments(seen: tuple[int, ...], group: int, level: str) -> None:
    case = Case(Call(queries=6, length=3, group=group, parts=SEGMENTS, seen=seen))
    assert np.array_equal(case.check(native, 3), case.attend(_pure))


def test_a_query_that_sees_all_segments_has_the_bits_of_one_that_is_not_limited(level: str) -> None:
    call = Call(queries=70, length=3, parts=SEGMENTS)
    assert np.array_equal(Case(call).attend(native), Case(call._replace(seen=(4,) * 70)).attend(native))


@pytest.mark.parametrize("module", [native, _pure])
@pytest.mark.parametrize("seen", [(), (1,), (1, 1, 1), (1, 0)])
def test_segments_seen_that_are_not_one_for_each_query_are_refused(seen: tuple[int, ...], module: ModuleType) -> None:
    with pytest.raises(ValueError, match="seen has a u32 for each query"):
        Case(Call(queries=2, parts=SEGMENTS, seen=seen)).attend(module)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("codec", [RAW, INT8, INT4])
def test_no_number_is_the_same_no_number_everywhere(codec: int, dtype: int, level: str) -> None:
    case = Case(Call(dtype, queries=3, parts=(Part(codec),)))
    item = {F32: np.uint32, F16: np.uint16, BF16: np.uint16}[dtype]
    case.query.view(item)[0, 1, 5] = {F32: 0xFFC01234, F16: 0xFE12, BF16: 0xFFC3}[dtype]
    got, expected = case.attend(native).view(item), case.attend(_pure).view(item)
    assert np.array_equal(got, expected)
    assert (got[1, 0] == {F32: 0x7FC00000, F16: 0x7E00, BF16: 0x7FC0}[dtype]).all()


def test_no_prefix_at_all_is_plain_causal_attention(level: str) -> None:
    Case(Call(queries=130, length=0)).check(native)
    Case(Call(queries=1, length=0, kv_heads=1, group=1)).check(native)


TWINS = [
    Call(BF16, parts=MIXED, queries=3, length=70),
    Call(F16, parts=MIXED, queries=9, group=9, window=130),
    Call(F32, kv_heads=1, parts=(Part(INT8, 1024), Part(RAW, 256), Part(INT4), Part(K8V4)), key_dim=80, value_dim=96),
    Call(BF16, kv_heads=16, group=1, parts=MIXED, key_dim=37, value_dim=130, queries=2),
    Call(BF16, parts=(Part(RAW), Part(INT8, shift=30.0), Part(INT4, 64, 0, 3, shift=-9.0)), queries=65),
    Call(F32, key_dim=256, value_dim=256, parts=(Part(INT8), Part(INT4))),
    Call(F16, key_dim=9, value_dim=20, parts=(Part(RAW, 32), Part(INT8, 32)), pairs=4),
]


@pytest.mark.parametrize("call", TWINS)
def test_every_level_and_thread_count_gives_the_bits_of_the_twin(call: Call, level: str) -> None:
    case = Case(call)
    expected = case.attend(_pure)
    case.check(_pure)
    for threads in (1, 2, 5):
        assert np.array_equal(case.attend(native, threads), expected)
    assert np.array_equal(case.attend(native, 1, layer=1), case.attend(_pure, 1, layer=1))


@pytest.mark.parametrize("codec", [RAW, INT8, INT4])
def test_a_prefill_of_many_rows_has_the_bits_of_the_twin(codec: int, level: str) -> None:
    case = Case(Call(BF16, kv_heads=1, group=9, queries=20, length=44, parts=(Part(codec, 1280),)))
    assert np.array_equal(case.attend(native, 3), case.attend(_pure))


def test_strided_queries_and_values_are_read_where_they_lie(level: str) -> None:
    case = Case(Call(BF16, queries=6, parts=MIXED))
    expected = case.attend(native)
    case.query = np.ascontiguousarray(case.query.transpose(1, 0, 2)).transpose(1, 0, 2)
    case.key, case.value = (
        np.ascontiguousarray(a.transpose(1, 0, 2)).transpose(1, 0, 2) for a in (case.key, case.value)
    )
    assert not case.query.flags.c_contiguous
    assert np.array_equal(case.attend(native), expected)
    assert np.array_equal(case.attend(_pure), expected)


def test_largest_and_smallest_numbers_stay_finite_and_equal(level: str) -> None:
    case = Case(Call(F32, parts=(Part(INT8), Part(K8V4), Part(INT4), Part(RAW)), queries=3))
    for size in (0.0, 1e-42, 1e-20, 1e4):
        case.query = np.full_like(case.query, size)
        expected = case.attend(_pure)
        assert np.isfinite(expected).all()
        assert np.array_equal(case.attend(native, 2), expected)


def test_what_is_no_number_gives_none(level: str) -> None:
    case = Case(Call(F16, parts=MIXED, queries=2))
    case.query[1, 1, 5] = np.nan
    for module in (native, _pure):
        bad = np.isnan(case.attend(module).astype(np.float32))
        assert bad[1, 1].all()
        assert bad.sum() == bad[1, 1].size


# ---- Pages in files


def page_file(path: Path, case: Case, part: int) -> None:
    grid, (table, body) = case.call.parts[part].grid, case.encoded[part]
    tokens = np.zeros(grid, np.int32)
    with path.open("wb") as file:
        ids = (b"i" * 32, b"k" * 32, b"p" * 32)
        native.page_write_encoded(
            file.fileno(), case.call.dtype, grid, 0, *ids, tokens, tuple(case.layers), table, body
        )


def test_a_mapped_page_is_attended_to_like_an_encoded_one(tmp_path: Path) -> None:
    case = Case(Call(BF16, parts=(Part(INT8, 256, 64, 100),)))
    page_file(tmp_path / "page", case, 0)
    for module in (native, _pure):
        prefix = module.Prefix(BF16, case.layers)
        with (tmp_path / "page").open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        prefix.append_page(mapped, 64, 100)
        with pytest.raises(BufferError):
            mapped.close()  # the prefix reads it
        assert prefix.tokens == 100
        blocks = 2 * 2 * case.call.kv_heads  # layers and blocks
        assert prefix.bytes == blocks * 8576 == case.prefix(module).bytes
        assert np.array_equal(case.attend(module, prefix=prefix), case.attend(module))
        del prefix
        mapped.close()


def test_a_dropped_segment_lets_go_of_its_buffers_and_its_tokens() -> None:
    parts = (Part(INT8), Part(RAW, shift=9.0), Part(INT4, shift=2.0))
    case, first = Case(Call(parts=parts)), Case(Call(parts=parts[:1]))
    for module in (native, _pure):
        prefix = case.prefix(module)
        assert prefix.tokens == 192
        with pytest.raises(BufferError):
            case.encoded[2][1].clear()
        prefix.truncate_segments(1)
        assert (prefix.tokens, prefix.bytes) == (64, 2 * case.call.kv_heads * 8576)
        copy = bytearray(case.encoded[2][1])
        case.encoded[2] = (case.encoded[2][0], copy)
        first.query, first.key, first.value = case.query, case.key, case.value
        first.old_key, first.old_value = case.old_key, case.old_value
        assert np.array_equal(case.attend(module, prefix=prefix), first.attend(module))
        prefix.begin_segment(*angles(case.call, 9.0))
        prefix.append_encoded(64, *case.encoded[1])
        prefix.append_encoded(64, *case.encoded[1])
        assert prefix.tokens == 192
        for wrong in (0, 3):
            with pytest.raises(ValueError, match="segments can't be kept"):
                prefix.truncate_segments(wrong)


def test_hostile_pages_and_tables_are_refused_and_change_nothing(tmp_path: Path) -> None:
    case = Case(Call(parts=(Part(INT8),)))
    page_file(tmp_path / "page", case, 0)
    page, (table, body) = (tmp_path / "page").read_bytes(), case.encoded[0]
    infinite = bytearray(body)
    infinite[8192:8194] = b"\x00\x7c"  # the first K scale
    negative = bytearray(body)
    negative[8449] |= 0x80  # the first V scale
    entries = np.frombuffer(table, np.dtype([("size", "<u8"), ("crc", "<u4"), ("codec", "<u4")])).copy()

    def changed(field: str, value: int) -> bytes:
        other = entries.copy()
        other[field][-1] = value
        return other.tobytes()

    for module in (native, _pure):
        prefix = case.prefix(module)
        before = case.attend(module, prefix=prefix)
        attempts: list[tuple[str, Callable[[Any], None]]] = [
            ("short", lambda p: p.append_page(page[:100])),
            ("length", lambda p: p.append_page(page[:-64])),
            ("header checksum", lambda p: p.append_page(page[:40] + b"\1" + page[41:])),
            ("extent", lambda p: p.append_encoded(64, table[:-16], body)),
            ("extent", lambda p: p.append_encoded(64, table[:-1], body)),
            ("extent", lambda p: p.append_encoded(64, table, body[:-64])),
            ("extent", lambda p: p.append_encoded(64, changed("size", 2**63), body)),
            ("codec", lambda p: p.append_encoded(64, changed("codec", 99), body)),
            ("grid", lambda p: p.append_encoded(65, table, body)),
            ("encoding", lambda p: p.append_encoded(64, table, infinite)),
            ("encoding", lambda p: p.append_encoded(64, table, negative)),
        ]
        for rule, append in attempts:
            with pytest.raises(ValueError, match=rule) as caught:
                append(prefix)
            assert caught.value.args[0] == rule
        for first, count in ((1, -1), (64, -1), (-64, -1), (0, 65), (0, 0)):
            with pytest.raises(ValueError, match="no such tokens"):
                prefix.append_page(page, first, count)
        assert np.array_equal(case.attend(module, prefix=prefix), before)


def test_other_layouts_and_lossless_pages_are_refused(tmp_path: Path) -> None:
    case = Case(Call(BF16, parts=(Part(LOSSLESS),)))
    page_file(tmp_path / "page", case, 0)
    page = (tmp_path / "page").read_bytes()
    for module in (native, _pure):
        with pytest.raises(ValueError, match="lossless"):
            module.Prefix(BF16, case.layers).append_page(page)
        for dtype, layers in ((F16, case.layers), (BF16, case.layers[:1]), (BF16, [(2, 64, 60)] * 2)):
            with pytest.raises(ValueError, match="other shapes"):
                module.Prefix(dtype, layers).append_page(page)
        for dtype, layers in ((4, case.layers), (BF16, []), (BF16, [(1, 257, 64)]), (BF16, [(0, 64, 64)])):
            with pytest.raises(ValueError, match=r"layers|data type|dimensions"):
                module.Prefix(dtype, layers)


# ---- Arguments

WRONG: list[tuple[str, dict[str, Any]]] = [
    ("no layer", {"layer": 2}),
    ("no layer", {"layer": -1}),
    ("query must be", {"query": np.zeros((6, 2, 63), np.float32)}),
    ("query must be", {"query": np.zeros((6, 2, 64), np.float64)}),
    ("query must be", {"query": np.zeros((6, 2, 128), np.float32)[:, :, ::2]}),
    ("query must be", {"query": np.zeros((6, 64), np.float32)}),
    ("multiple", {"query": np.zeros((5, 2, 64), np.float32)}),
    ("multiple", {"query": np.zeros((6, 0, 64), np.float32)}),
    ("key must be", {"key": np.zeros((2, 3, 64), np.float32)}),
    ("value must be", {"value": np.zeros((1, 2, 64), np.float32)}),
    ("tail_keys must be", {"tail_keys": np.zeros((2, 20, 64), np.float32)[:, ::2]}),
    ("tail_values must be", {"tail_values": np.zeros((2, 9, 64), np.float32)}),
    ("out must be", {"out": np.zeros((6, 2, 64), np.float32)}),
    ("no room", {"length": 9}),
    ("no room", {"length": -1}),
    ("threads", {"threads": 0}),
    ("window", {"window": -1}),
]


@pytest.mark.parametrize(("message", "wrong"), WRONG)
def test_what_does_not_fit_is_refused_by_name(message: str, wrong: dict[str, Any]) -> None:
    for module in (native, _pure):
        prefix = module.Prefix(F32, [(2, 64, 64)] * 2)
        given: dict[str, Any] = {
            "layer": 0,
            "query": np.zeros((6, 2, 64), np.float32),
            "key": np.zeros((2, 2, 64), np.float32),
            "value": np.zeros((2, 2, 64), np.float32),
            "tail_keys": np.zeros((2, 10, 64), np.float32),
            "tail_values": np.zeros((2, 10, 64), np.float32),
            "length": 0,
            "out": np.zeros((2, 6, 64), np.float32),
            "scale": 1.0,
            "window": 0,
            "threads": 1,
        }
        prefix.attend(*given.values())
        with pytest.raises(ValueError, match=message):
            prefix.attend(*(given | wrong).values())
        given["out"].flags.writeable = False
        with pytest.raises((BufferError, ValueError)):
            prefix.attend(*given.values())


def test_a_window_over_segments_and_angles_that_do_not_fit_are_refused() -> None:
    for module in (native, _pure):
        prefix = module.Prefix(F32, [(2, 64, 64)])
        half = np.ones(33, np.float32)
        for wrong in ((half, half), (half[:2], half[:3]), (b"123", b"123"), (np.ones(300, np.float32),) * 2):
            with pytest.raises(ValueError, match=r"pairs|cosine"):
                prefix.begin_segment(*wrong)
        prefix.begin_segment(b"", b"")
        states = np.zeros((2, 1, 64), np.float32)
        with pytest.raises(ValueError, match="window"):
            prefix.attend(0, states, states, states, states, states, 0, np.zeros((1, 2, 64), np.float32), 1.0, 4, 1)


# ---- Threads and processes


def test_threads_share_a_prefix_and_the_workers() -> None:
    case = Case(Call(BF16, kv_heads=3, queries=1, parts=(Part(INT8, 2048), Part(INT4, 1024))))
    expected, prefix = case.attend(native), case.prefix(native)
    wrong: list[object] = []

    def run() -> None:
        try:
            for threads in itertools.islice(itertools.cycle((1, 2, 3)), 30):
                if not np.array_equal(case.attend(native, threads, prefix=prefix), expected):
                    wrong.append(threads)
        except BaseException as error:
            wrong.append(error)

    running = [threading.Thread(target=run) for _ in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong


def test_a_forked_child_makes_workers_of_its_own() -> None:
    case = Case(Call(BF16, parts=(Part(INT8, 1024), Part(INT8, 1024))))
    expected = case.attend(native, 3)
    child = os.fork()
    if child == 0:
        try:
            same = all(np.array_equal(case.attend(native, threads), expected) for threads in (1, 2, 4, 2))
        except BaseException:
            same = False
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(case.attend(native, 2), expected)


def test_pages_may_lie_at_any_address(level: str) -> None:
    case = Case(Call(F32, key_dim=33, parts=MIXED, pairs=0))
    expected = case.attend(native)
    for i, (table, body) in enumerate(case.encoded):
        moved = bytearray(len(body) + 1)
        moved[1:] = body
        case.encoded[i] = (table, memoryview(moved)[1:])
    assert np.array_equal(case.attend(native), expected)
