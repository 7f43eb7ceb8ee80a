"""The BM25 kernel and its numpy twin: the same bits, and errors for arrays that can't be scored."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from agentmem._pure import bm25 as pure

native = pytest.importorskip("agentmem._native")


def made(seed: int, count: int, terms: int) -> tuple[Any, Any]:
    """Random rows in sessions of up to eight, and postings."""
    random = np.random.default_rng(seed)
    document = np.sort(random.integers(0, max(1, count // 5), count)).astype(np.int32)
    place = np.arange(count, dtype=np.int32)
    same = np.diff(document, prepend=-1) == 0
    previous = np.where(same, place - 1, -1).astype(np.int32)
    following = np.append(np.where(same[1:], place[1:], -1), -1).astype(np.int32)[:count]
    rows = (random.random(count) < 0.8, random.integers(0, 40, count).astype(np.int32), previous, following, document)
    having = [np.flatnonzero(random.random(count) < random.random() ** 2).astype(np.int32) for _ in range(terms)]
    starts = np.cumsum([0, *map(len, having)])
    times = random.integers(1, 5, starts[-1]).astype(np.int32)
    return rows, (starts, np.concatenate([np.empty(0, np.int32), *having]), times)


def scored(kernels: ModuleType, rows: Any, terms: Any) -> tuple[Any, ...]:
    documents = int(rows[4].max(initial=-1)) + 1
    sessions = np.full(documents, 7, np.int64)
    totals = kernels.bm25_lengths(rows, sessions)
    out = tuple(np.zeros(size, np.float32) for size in (len(rows[0]), len(rows[0]), documents))
    rarities = kernels.bm25_scores(terms, rows, (sessions, totals), out)
    return (sessions.tolist(), totals, rarities, *(scores.tobytes() for scores in out))


@pytest.mark.parametrize(("count", "terms"), [(0, 2), (1, 1), (7, 3), (300, 9), (5000, 6), (50, 0)])
@pytest.mark.parametrize("seed", range(5))
def test_native_and_numpy_give_the_same_bits(seed: int, count: int, terms: int) -> None:
    rows, postings = made(seed, count, terms)
    assert scored(native, rows, postings) == scored(pure, rows, postings)


def test_rows_without_any_length_are_scored_all_the_same() -> None:
    rows, postings = made(1, 40, 3)
    rows = (rows[0], np.zeros(40, np.int32), *rows[2:])
    assert scored(native, rows, postings) == scored(pure, rows, postings)


def test_places_outside_are_left_alone() -> None:
    rows, (starts, places, times) = made(2, 40, 3)
    wild = places.copy()
    wild[::3], wild[1::5] = 2**31 - 1, -5
    rows = (rows[0], rows[1], rows[2] + 1000, rows[3] - 1000, rows[4])
    scored(native, rows, (starts, wild, times))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows, terms: (rows, (terms[0][::-1].copy(), *terms[1:])),
        lambda rows, terms: (rows, (terms[0] + 1, *terms[1:])),
        lambda rows, terms: (rows, (terms[0][:0], *terms[1:])),
        lambda rows, terms: (rows, (terms[0], terms[1].astype(np.int64), terms[2])),
        lambda rows, terms: (rows, (terms[0], terms[1], terms[2][:-1])),
        lambda rows, terms: ((rows[0][:-1], *rows[1:]), terms),
        lambda rows, terms: ((rows[0].astype(np.float32), *rows[1:]), terms),
        lambda rows, terms: ((rows[0], rows[1].reshape(2, -1), *rows[2:]), terms),
    ],
)
def test_arrays_that_do_not_fit_are_refused(spoil: Any) -> None:
    rows, terms = spoil(*made(3, 40, 3))
    with pytest.raises((ValueError, TypeError)):
        scored(native, rows, terms)


def test_results_are_only_written_where_they_may_be() -> None:
    rows, _ = made(4, 40, 3)
    sessions = np.zeros(int(rows[4].max()) + 1, np.int64)
    sessions.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        native.bm25_lengths(rows, sessions)
