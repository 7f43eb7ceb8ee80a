"""The lossless codecs: every instruction set against the scalar one and the numpy twin, and what no encoder writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from agentmem._pure import lossless

native = pytest.importorskip("agentmem._native", reason="built without a C compiler")

LOSSLESS, DENSE = 1, 2
F32, BF16 = 1, 3
ROWS = (1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64)
DIMS = (1, 5, 16, 63, 64, 65, 80, 128, 256)
Block = tuple[Any, Any]

codecs = pytest.mark.parametrize("codec", [LOSSLESS, DENSE], ids=["lossless", "dense"])
dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])


@pytest.fixture(autouse=True)
def level_as_before() -> Iterator[None]:
    before = native.cpu_level()
    yield
    native.set_cpu_level(before)


def bits_of(values: Any, dtype: int) -> Any:
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return words.copy() if dtype == F32 else (words >> 16).astype(np.uint16)


def states(rows: int, dims: tuple[int, int], dtype: int, seed: int = 0) -> Block:
    """Like a model's: channels of a scale and a mean of their own, and a few values that are special."""
    random = np.random.default_rng([seed, rows, *dims])
    parts = []
    for dim in dims:
        scale, mean = np.exp2(random.normal(0, 1.5, dim)), random.choice([0.0, 0.0, 2.0, -4.0], dim)
        values = (random.standard_normal((rows, dim)) + mean) * scale
        rare = random.random((rows, dim)) < 0.003
        values[rare] = random.choice([0.0, -0.0, 1e-42, -1e-30, 3e38, np.inf, -np.inf, np.nan], int(rare.sum()))
        part = bits_of(values, dtype)
        part[random.random((rows, dim)) < 0.0005] = 0xFFC12345 if dtype == F32 else 0x7FA1  # NaNs with payloads
        parts.append(part)
    return parts[0], parts[1]


def encode(codec: int, dtype: int, block: Block, level: str) -> bytes | None:
    native.set_cpu_level(level)
    encoded: bytes | None = native.block_encode(codec, dtype, *block)
    return encoded


def decode(codec: int, dtype: int, data: bytes, block: Block, level: str) -> Block:
    native.set_cpu_level(level)
    key, value = np.full_like(block[0], 0x55), np.full_like(block[1], 0x55)
    native.block_decode(codec, dtype, data, key, value)
    return key, value


def equal(one: Block, other: Block) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def check(codec: int, dtype: int, block: Block, *, twin: bool = True) -> bytes | None:
    """All levels write the same bytes and read each other's back, as does the twin."""
    levels = native.cpu_levels()
    most = lossless.size(codec, dtype, len(block[0]), block[0].shape[1], block[1].shape[1])
    encoded = encode(codec, dtype, block, "scalar")
    assert all(encode(codec, dtype, block, level) == encoded for level in levels)
    if twin:
        taken = most < block[0].nbytes + block[1].nbytes
        assert (lossless.encode(codec, dtype, *block) if taken else None) == encoded
    if encoded is not None:
        assert len(encoded) < block[0].nbytes + block[1].nbytes
        assert len(encoded) <= most
        assert all(equal(decode(codec, dtype, encoded, block, level), block) for level in levels)
        if twin:
            key, value = np.zeros_like(block[0]), np.zeros_like(block[1])
            lossless.decode(codec, dtype, encoded, key, value)
            assert equal((key, value), block)
    return encoded


@codecs
@dtypes
@pytest.mark.parametrize("rows", ROWS)
def test_every_level_and_the_twin_agree_at_awkward_lengths(codec: int, dtype: int, rows: int) -> None:
    for at, dim in enumerate(DIMS):
        other = DIMS[(at * 4 + rows) % len(DIMS)]
        check(codec, dtype, states(rows, (dim, other), dtype), twin=rows < 34 or dim < 80)


@codecs
@dtypes
def test_a_block_like_a_models_gets_smaller(codec: int, dtype: int) -> None:
    block = states(64, (64, 64), dtype)
    encoded = check(codec, dtype, block)
    assert encoded is not None
    least = {(LOSSLESS, BF16): 1.30, (LOSSLESS, F32): 1.13, (DENSE, BF16): 1.42, (DENSE, F32): 1.17}
    assert 2 * block[0].nbytes / len(encoded) >= least[codec, dtype]


def constant(word: int) -> Callable[[Any, tuple[int, int]], Any]:
    return lambda random, shape: np.full(shape, word, np.uint16)


def with_outliers(random: Any, shape: tuple[int, int]) -> Any:
    part = bits_of(random.standard_normal(shape), BF16)
    part[::16, ::9] = 0x7F80  # infinity is the largest exponent, far above all others
    return part


def of_many_octaves(random: Any, shape: tuple[int, int]) -> Any:
    return bits_of(random.standard_normal(shape) * np.exp2(random.uniform(-40, 40, shape[1])), BF16)


def just_above_zero(random: Any, shape: tuple[int, int]) -> Any:
    return random.integers(0, 9 << 7, shape).astype(np.uint16)  # exponents 0 to 8: the lowest top is 14


def half_padded(random: Any, shape: tuple[int, int]) -> Any:
    part = bits_of(random.standard_normal(shape), BF16)
    part[:, shape[1] // 2 :] = 0
    return part


@codecs
@pytest.mark.parametrize(
    ("fill", "fits"),
    [
        (constant(0), True),
        (constant(0x8000), True),
        (constant(0xFFFF), True),
        (with_outliers, True),
        (just_above_zero, None),
        (half_padded, True),
        (of_many_octaves, None),
        (lambda random, shape: random.integers(0, 1 << 16, shape).astype(np.uint16), False),
    ],
    ids=["zeros", "minus zeros", "NaNs", "outliers", "subnormals", "padding", "octaves", "noise"],
)
def test_unusual_values_come_back_or_are_not_taken(codec: int, fill: Any, fits: bool | None) -> None:
    random = np.random.default_rng(5)
    for shape in ((64, 64), (33, 80), (9, 65)):
        encoded = check(codec, BF16, (fill(random, shape), fill(random, shape)))
        assert fits is None or (encoded is not None) == fits


@codecs
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_values_come_back(codec: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([F32, BF16]))
    word = np.uint32 if dtype == F32 else np.uint16
    rows = data.draw(st.integers(1, 64))
    dims = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    spread = data.draw(st.sampled_from([1, 9, 200])) << (23 if dtype == F32 else 7)
    values = st.integers(0, spread)
    key, value = (data.draw(arrays.arrays(word, (rows, dim), elements=values)) for dim in dims)
    check(codec, dtype, (key, value))


# ---- what no encoder writes


@pytest.fixture(scope="module", params=[LOSSLESS, DENSE], ids=["lossless", "dense"])
def sample(request: pytest.FixtureRequest) -> tuple[int, Block, bytes]:
    block = states(9, (16, 21), BF16, seed=3)
    encoded = native.block_encode(request.param, BF16, *block)
    assert encoded is not None
    return request.param, block, encoded


def outcomes(codec: int, data: bytes, block: Block) -> set[tuple[bytes, bytes] | None]:
    """Of all levels and the twin: the values, or None for a refusal."""
    found: set[tuple[bytes, bytes] | None] = set()
    for level in native.cpu_levels():
        try:
            key, value = decode(codec, BF16, data, block, level)
            found.add((key.tobytes(), value.tobytes()))
        except ValueError:
            found.add(None)
    key, value = np.zeros_like(block[0]), np.zeros_like(block[1])
    try:
        lossless.decode(codec, BF16, data, key, value)
        found.add((key.tobytes(), value.tobytes()))
    except ValueError:
        found.add(None)
    return found


def test_every_truncation_and_every_longer_encoding_is_refused(sample: tuple[int, Block, bytes]) -> None:
    codec, block, encoded = sample
    for wrong in (*(encoded[:end] for end in range(len(encoded))), encoded + b"\0", encoded + encoded):
        assert outcomes(codec, wrong, block) == {None}, len(wrong)


def test_every_flipped_bit_is_refused_or_gives_other_values(sample: tuple[int, Block, bytes]) -> None:
    codec, block, encoded = sample
    same = tuple(part.tobytes() for part in block)
    for bit in range(8 * len(encoded)):
        damaged = bytearray(encoded)
        damaged[bit // 8] ^= 1 << bit % 8
        found = outcomes(codec, bytes(damaged), block)
        assert len(found) == 1, bit  # all levels agree
        assert same not in found, bit


def test_what_a_decoder_accepts_the_fast_encoder_writes() -> None:
    random, accepted = np.random.default_rng(7), 0
    block = states(9, (16, 21), BF16, seed=3)
    encoded = native.block_encode(LOSSLESS, BF16, *block)
    for _ in range(3000):
        damaged = bytearray(encoded)
        for at in random.integers(0, len(damaged), random.integers(1, 4)):
            damaged[at] = random.integers(256)
        try:
            values = decode(LOSSLESS, BF16, bytes(damaged), block, native.cpu_levels()[0])
        except ValueError:
            continue
        accepted += 1
        assert native.block_encode(LOSSLESS, BF16, *values) == damaged
    assert accepted > 500


@codecs
def test_random_bytes_are_refused_by_all_or_by_none(codec: int) -> None:
    random = np.random.default_rng(11)
    block = states(8, (16, 16), BF16)
    for length in (1, 100, 129, 383, 386, 390, 400, 420, 447, 510):
        for _ in range(10):
            assert len(outcomes(codec, random.bytes(length), block)) == 1


@codecs
def test_half_precision_is_not_taken(codec: int) -> None:
    half = np.ones((64, 64), np.float16)
    assert native.block_encode(codec, 2, half, half) is None
    with pytest.raises(ValueError, match="encod"):
        native.block_decode(codec, 2, b"\0" * 100, half.copy(), half.copy())
