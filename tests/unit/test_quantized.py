"""The quantised codecs: C at every instruction set against numpy, levels mixed, errors within half a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agentmem._pure import quantized

native = pytest.importorskip("agentmem._native", reason="built without a C compiler")

INT8, K8V4, INT4 = CODECS = (3, 4, 5)
F32, F16, BF16 = DTYPES = (1, 2, 3)
ROWS = (1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64)
DIMS = (1, 5, 16, 63, 64, 65, 80, 128, 256)
LARGEST = 65504.0
BF16_LARGEST = 65280.0  # the largest bfloat16 within the range of float16


@pytest.fixture(autouse=True)
def _level_restored() -> Iterator[None]:
    before = native.cpu_level()
    yield
    native.set_cpu_level(before)


def stored(dtype: int, values: Any) -> Any:
    """The values in a dtype; bf16 cut off, as uint16."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == BF16:
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16) if dtype == F16 else values


def floats(dtype: int, array: Any) -> Any:
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == BF16 else array.astype(np.float32)


def some_values(random: Any, rows: int, dim: int) -> Any:
    """Ordinary values, of very different channels, tiny, huge, zeros of both signs, or constant ones."""
    normal = random.standard_normal((rows, dim))
    return (
        normal,
        np.clip(normal * np.exp(random.uniform(-20, 10, (1, dim))), -LARGEST, LARGEST),
        normal * 1e-6,
        np.clip(normal * 40_000, -LARGEST, LARGEST),
        np.where(random.random((rows, dim)) < 0.5, -0.0, normal.round()),
        np.full((rows, dim), normal[0, 0]),
    )[random.integers(6)]


def taken(codec: int, dtype: int, key: Any, value: Any) -> bool:
    """Blocks that padding would make larger are not encoded at all."""
    raw: int = key.nbytes + value.nbytes
    return quantized.size(codec, dtype, len(key), key.shape[1], value.shape[1]) < raw


def room_like(array: Any, offset: int = 0) -> Any:
    """As many zeros, ``offset`` bytes behind a cache line: on one, decoding may store past the caches."""
    memory = np.zeros(array.nbytes + 64 + offset, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)


def decoded(module: Any, codec: int, dtype: int, data: Any, key: Any, value: Any, offset: int = 0) -> tuple[Any, Any]:
    room = room_like(key, offset), room_like(value, offset)
    (module.decode if module is quantized else module.block_decode)(codec, dtype, data, *room)
    return room


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_gives_the_bytes_and_the_bits_of_the_twin(codec: int, dtype: int) -> None:
    random = np.random.default_rng(codec * 10 + dtype)
    levels, seen = native.cpu_levels(), 0
    for rows in ROWS:
        for key_dim in DIMS:
            key = stored(dtype, some_values(random, rows, key_dim))
            value = stored(dtype, some_values(random, rows, int(random.choice(DIMS))))
            expected = quantized.encode(codec, dtype, key, value)
            assert expected is not None
            assert len(expected) == quantized.size(codec, dtype, rows, key_dim, value.shape[1])
            if not taken(codec, dtype, key, value):
                assert native.block_encode(codec, dtype, key, value) is None
                continue
            bits = [array.tobytes() for array in decoded(quantized, codec, dtype, expected, key, value)]
            for i, level in enumerate(levels):
                native.set_cpu_level(level)
                data = native.block_encode(codec, dtype, key, value)
                assert data == expected
                native.set_cpu_level(levels[i - 1])
                assert [array.tobytes() for array in decoded(native, codec, dtype, data, key, value)] == bits
            seen += 1
    assert seen > 60


def steps(codec: int, keys: Any, values: Any) -> tuple[Any, Any]:
    """The step between codes for each value, taken from the values alone, before scales are rounded to f16."""

    def spread(array: Any, axis: int, levels: int) -> Any:
        return np.broadcast_to((array.max(axis, keepdims=True) - array.min(axis, keepdims=True)) / levels, array.shape)

    key = np.concatenate([spread(keys[i : i + 32], 0, 15) for i in range(0, len(keys), 32)])
    value = np.concatenate([spread(values[:, i : i + 64], 1, 15) for i in range(0, values.shape[1], 64)], 1)
    if codec != INT4:
        key = spread(keys, 0, 255)
    if codec == INT8:
        value = np.broadcast_to(np.abs(values).max(1, keepdims=True) / 127, values.shape)
    return key, value


@st.composite
def blocks(draw: st.DrawFn) -> tuple[int, int, Any, Any]:
    codec, dtype, rows = draw(st.sampled_from(CODECS)), draw(st.sampled_from(DTYPES)), draw(st.integers(40, 64))
    bound = BF16_LARGEST if dtype == BF16 else LARGEST
    elements = st.floats(-bound, bound, width=32)
    arrays = (draw(hnp.arrays(np.float32, (rows, draw(st.integers(16, 70))), elements=elements)) for _ in "kv")
    return codec, dtype, *(stored(dtype, array) for array in arrays)


@settings(max_examples=60, deadline=None)
@given(blocks())
def test_no_value_is_off_by_more_than_half_a_step(block: tuple[int, int, Any, Any]) -> None:
    codec, dtype, key, value = block
    data = native.block_encode(codec, dtype, key, value)
    assert data == quantized.encode(codec, dtype, key, value)
    results = decoded(native, codec, dtype, data, key, value)
    for before, after, step in zip(
        (key, value), results, steps(codec, floats(dtype, key), floats(dtype, value)), strict=True
    ):
        original = floats(dtype, before).astype(np.float64)
        # Minima are rounded down to f16, scales up: by a part in 1,024 or the smallest f16. Then the dtype rounds.
        largest = np.abs(original).max()
        scale = (step + largest * 2**-10 / 15 + 2**-24) * (1 + 2**-10) + 2**-24
        epsilon = {F32: 2**-23, F16: 2**-11, BF16: 2**-8}[dtype]
        allowed = scale * 0.5001 + (largest + scale) * epsilon + 2**-24
        assert (np.abs(floats(dtype, after) - original) <= allowed).all()


@pytest.mark.parametrize("codec", CODECS)
def test_a_block_takes_its_share_of_bf16(codec: int) -> None:
    for dim in (64, 128):
        share = quantized.size(codec, BF16, 64, dim, dim) / (64 * dim * 4)
        assert share + 0.002 <= {INT8: 0.53, K8V4: 0.42, INT4: 0.32}[codec]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_f16_scales_cannot_hold_is_not_taken(codec: int, dtype: int) -> None:
    plain = stored(dtype, np.ones((64, 80)))
    beyond = [np.nan, -np.nan, np.inf, -np.inf] + ([65_536.0, -65_536.0] if dtype != F16 else [])
    for bad in beyond:
        for place in ((0, 0), (63, 79), (40, 64)):
            broken = np.ones((64, 80), np.float32)
            broken[place] = bad
            for pair in ((stored(dtype, broken), plain), (plain, stored(dtype, broken))):
                assert quantized.encode(codec, dtype, *pair) is None
                for level in native.cpu_levels():
                    native.set_cpu_level(level)
                    assert native.block_encode(codec, dtype, *pair) is None
    edge = np.ones((64, 80), np.float32)
    edge[3, 3], edge[5, 70] = (BF16_LARGEST, -BF16_LARGEST) if dtype == BF16 else (LARGEST, -LARGEST)
    assert native.block_encode(codec, dtype, stored(dtype, edge), plain) is not None


@pytest.mark.parametrize("codec", CODECS)
def test_constants_and_multiples_of_an_f16_come_back_exactly(codec: int) -> None:
    key: Any = np.repeat(np.linspace(-3, 3, 64).astype(np.float16).astype(np.float32)[None], 64, 0)
    value: Any = np.repeat(np.linspace(0, 1, 64).astype(np.float16).astype(np.float32)[:, None], 64, 1)
    if codec == INT8:  # symmetric: the largest is 127 steps
        value = np.round(value * 64) * 127 / 64
    keys, values = decoded(native, codec, F32, native.block_encode(codec, F32, key, value), key, value)
    assert np.array_equal(keys, key)
    assert np.array_equal(values, value)
    zero = np.zeros((64, 64), np.float32)
    data = native.block_encode(codec, F32, zero, -zero)
    assert not any(data)  # equal values, equal bytes: no minus zero is kept


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bytes_decode_to_the_same_on_every_level_or_are_refused(codec: int, dtype: int) -> None:
    random = np.random.default_rng(5)
    refused = 0
    for rows, dim in ((64, 64), (33, 80), (17, 65)):
        key = value = stored(dtype, np.zeros((rows, dim)))
        length = quantized.size(codec, dtype, rows, dim, dim)
        codes = length - 2 * sum(map(math.prod, quantized._shapes(codec, rows, dim, dim)[2:])) * 2
        for finite in (True, False):
            noise = np.frombuffer(random.bytes(length), np.uint8).copy()
            if finite:
                noise[codes:][1::2] &= 0xBF  # f16 with another exponent than that of infinity
            outcomes = set()
            for module in (*native.cpu_levels(), quantized):
                if module is not quantized:
                    native.set_cpu_level(module)
                try:
                    arrays = decoded(module if module is quantized else native, codec, dtype, noise, key, value)
                    outcomes.add(b"".join(array.tobytes() for array in arrays))
                except ValueError:
                    outcomes.add(b"")
            assert len(outcomes) == 1
            refused += outcomes == {b""}
            assert not finite or outcomes != {b""}
        for wrong in (0, 1, length - 1, length + 1):
            with pytest.raises(ValueError, match=r"block|encoding"):
                native.block_decode(codec, dtype, bytes(wrong), key.copy(), value.copy())
            with pytest.raises(ValueError, match="no block"):
                quantized.decode(codec, dtype, bytes(wrong), key.copy(), value.copy())
    assert refused == 3  # some scale of noise is an infinity or NaN


def test_the_bytes_lie_as_drawn() -> None:
    """Codes found by hand at the places that attention will read them from."""
    random = np.random.default_rng(6)
    key, value = (random.standard_normal((64, 64)).astype(np.float32) for _ in "kv")
    data = np.frombuffer(native.block_encode(INT8, F32, key, value), np.uint8)
    keys: Any = data[:4096].reshape(4, 16, 16, 4)
    values: Any = data[4096:8192].view(np.int8).reshape(4, 16, 16, 4)
    scale, minimum, per_token = data[8192:].view(np.float16).reshape(3, 64).astype(np.float32)
    for token, channel in ((0, 0), (17, 5), (63, 63), (30, 40)):
        code = keys[token // 16, channel // 4, token % 16, channel % 4]
        assert code == round(float((key[token, channel] - minimum[channel]) / scale[channel]))
        code = values[channel // 16, token // 4, channel % 16, token % 4]
        assert code == round(float(value[token, channel] / per_token[token]))
    data = np.frombuffer(native.block_encode(INT4, F32, key, value), np.uint8)
    keys, values = data[:2048].reshape(2, 16, 16, 4), data[2048:4096].reshape(2, 16, 16, 4)
    scales = data[4096:].view(np.float16).astype(np.float32)
    for token, channel in ((0, 0), (17, 5), (63, 63), (30, 40)):
        at = token // 32 * 64 + channel
        code = keys[token // 32, channel // 4, token % 16, channel % 4] >> 4 * (token % 32 // 16) & 15
        assert code == round(float((key[token, channel] - scales[128 + at]) / scales[at]))
        code = values[channel // 32, token // 4, channel % 16, token % 4] >> 4 * (channel % 32 // 16) & 15
        assert code == round(float((value[token, channel] - scales[320 + token]) / scales[256 + token]))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("level", native.cpu_levels())
def test_where_the_room_begins_changes_nothing(codec: int, level: str) -> None:
    random = np.random.default_rng(codec)
    for dims in ((64, 64), (128, 192), (256, 64), (64, 63)):
        for _ in range(6):
            key, value = (stored(BF16, some_values(random, 64, dim)) for dim in dims)
            native.set_cpu_level(level)
            data = native.block_encode(codec, BF16, key, value)
            if data is None:
                continue
            wanted = decoded(quantized, codec, BF16, data, key, value)
            for offset in (0, 2, 16, 32):
                got = decoded(native, codec, BF16, data, key, value, offset)
                assert np.array_equal(got[0], wanted[0])
                assert np.array_equal(got[1], wanted[1])
