"""Token vectors in 2 bits: any bytes are refused or scored, the same at every level; any rows are encoded the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agentmem._pure import late as pure

native = pytest.importorskip("agentmem._native", reason="built without a C compiler")

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def outcome(kernels: Any, query: Any, data: bytes, starts: Any) -> bytes | str:
    out = np.empty((len(starts), len(query)), np.float32)
    try:
        kernels.maxsim(query, data, starts, out)
    except ValueError as error:
        return str(error)
    return out.tobytes()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_hostile_bytes_get_one_answer_at_every_level(data: st.DataObject) -> None:
    draw = data.draw
    dimensions, queries = draw(st.integers(1, 200)), draw(st.integers(1, 20))
    query = draw(hnp.arrays(np.float32, (queries, dimensions), elements=FLOATS))
    count = draw(st.integers(0, 40))
    body = draw(st.binary(min_size=count * (2 + pure.row_bytes(dimensions)), max_size=count * 300 + 50))
    claimed = draw(st.sampled_from([count, count, count, count + 1, 65_536, 2**32 - 1]))
    version = draw(st.sampled_from([1, 1, 1, 1, 2]))
    blob = pure.HEADER.pack(version, draw(st.sampled_from([0, 0, 0, 1])), dimensions, claimed) + body
    starts = np.array(draw(st.sampled_from([[0], [0, 0], [0, 1], [-1], [len(blob)]])), np.int64)
    expected = outcome(pure, query, blob, starts)
    before = native.cpu_level()
    try:
        for level in native.cpu_levels():
            native.set_cpu_level(level)
            assert outcome(native, query, blob, starts) == expected
    finally:
        native.set_cpu_level(before)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 300), st.integers(0, 5), st.data())
def test_any_rows_become_the_bytes_of_the_twin(dimensions: int, count: int, data: st.DataObject) -> None:
    rows = data.draw(hnp.arrays(np.float32, (count, dimensions), elements=FLOATS))
    made: list[list[Any]] = []
    for kernels in (native, pure):
        made.append([np.empty(count, np.uint16), np.empty((count, pure.row_bytes(dimensions)), np.uint8)])
        kernels.tokens_encode(rows, *made[-1])
    assert all(np.array_equal(ours, twin) for ours, twin in zip(*made, strict=True))
