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

        self.encoded: list[tuple[bytes, bytearray]] = []
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
            threads,
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
        shift, shifts = 0.0, []
        for part in call.parts:
            shift = shift if part.shift is None else part.shift
            shifts.append(shift)
        query = to_float(call.dtype, self.query)
        out = np.empty((call.queries, query.shape[0], call.value_dim))
        lengths = [keys[0].shape[1] for keys in self.keys]
        positions = np.arange(sum(lengths) + call.length + call.queries)
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
