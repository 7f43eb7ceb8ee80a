"""Attention in place: any shape, codec, cut, segment and window has the twin's bits at every level."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem import _pure

native = pytest.importorskip("agentmem._native", reason="built without a C compiler")

STORED = {1: np.float32, 2: np.float16, 3: np.uint16}
CODECS = (0, 3, 4, 5)


def values(random: np.random.Generator, dtype: int, *shape: int) -> Any:
    floats = random.normal(size=shape).astype(np.float32) * np.float32(10 ** random.uniform(-3, 1.5))
    return (floats.view(np.uint32) >> 16).astype(np.uint16) if dtype == 3 else floats.astype(STORED[dtype])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_all_levels_and_threads_give_the_bits_of_the_twin(data: st.DataObject) -> None:
    draw = data.draw
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype, heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    key_dim, value_dim = draw(st.integers(1, 256)), draw(st.integers(1, 256))
    n, length, spare = draw(st.integers(1, 70)), draw(st.integers(0, 140)), draw(st.integers(0, 3))
    layers = [(heads, key_dim, value_dim)]
    prefixes = [native.Prefix(dtype, layers), _pure.Prefix(dtype, layers)]
    segments = 1
    for _ in range(draw(st.integers(0, 4))):
        grid = draw(st.sampled_from([1, 7, 16, 64, 128, 192]))
        pair = ([values(random, dtype, heads, grid, key_dim)], [values(random, dtype, heads, grid, value_dim)])
        table, body = native.page_encode(dtype, draw(st.sampled_from(CODECS)), grid, *pair, 0, False)
        first = 64 * draw(st.integers(0, (grid - 1) // 64))
        count = draw(st.integers(1, grid - first))
        turned = draw(st.booleans())
        segments += turned
        angles = random.uniform(-10, 10, draw(st.integers(0, key_dim // 2)))
        for prefix in prefixes:
            if turned:
                prefix.begin_segment(*(turn(angles).astype(np.float32).tobytes() for turn in (np.cos, np.sin)))
            prefix.append_encoded(grid, table, body, first, count)
    assert (prefixes[0].tokens, prefixes[0].bytes) == (prefixes[1].tokens, prefixes[1].bytes)
    window = draw(st.sampled_from([0, 1, 33, 200])) if segments == 1 else 0
    query = values(random, dtype, heads * group, n, key_dim)
    key, value = values(random, dtype, heads, n, key_dim), values(random, dtype, heads, n, value_dim)
    tails = [values(random, dtype, heads, length + n + spare, dim) for dim in (key_dim, value_dim)]

    def attended(prefix: Any, threads: int) -> Any:
        out = np.empty((n, heads * group, value_dim), STORED[dtype])
        prefix.attend(0, query, key, value, *tails, length, out, key_dim**-0.5, window, threads)
        return out.view(np.uint32 if dtype == 1 else np.uint16)

    expected, before = attended(prefixes[1], 1), native.cpu_level()
    try:
        for level in native.cpu_levels():
            native.set_cpu_level(level)
            for threads in (1, 3):
                assert np.array_equal(attended(prefixes[0], threads), expected), (level, threads)
    finally:
        native.set_cpu_level(before)
