"""BM25 over a view's rows: each row as a document of its own, with its two neighbours, and its whole session as one.

Knows arrays of numbers, not words: a term is its postings. Counts, lengths and rarities are those of the allowed rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bools = npt.NDArray[np.bool_]
    Integers = npt.NDArray[np.int32]
    Counts = npt.NDArray[np.int64]
    Numbers = npt.NDArray[np.float32]
    Rows = tuple[Bools, Integers, Integers, Integers, Integers]
    Totals = tuple[int, int, int, int]

__all__ = ["bm25_lengths", "bm25_scores"]

#: How soon more occurrences of a word stop to count, and how much a document's length does (Robertson and Zaragoza,
#: "The Probabilistic Relevance Framework: BM25 and Beyond", 2009; the values are those of FTS5).
K1, B = 1.2, 0.75


def bm25_lengths(rows: Rows, sessions: Counts, /) -> Totals:
    """Fill ``sessions`` (int64 [documents]) with the lengths of the sessions' allowed rows.

    ``rows`` is (allowed bool, length, previous, next, document int32), each [n]: places of neighbours, -1 for none.
    Returns how many rows are allowed, their length in all, the length in all of their windows (each row with its
    allowed neighbours), and how many sessions have an allowed row.
    """
    import numpy as np

    allowed, length, *beside, document = rows
    places = np.flatnonzero(allowed)
    own = length[places].astype(np.int64)
    windows = int(own.sum())
    for neighbour in beside:
        near = neighbour[places]
        near = near[near >= 0]
        windows += int(length[near[allowed[near]]].sum(dtype=np.int64))
    sessions[:] = 0
    np.add.at(sessions, document[places], own)
    seen = np.zeros(len(sessions), bool)
    seen[document[places]] = True
    return len(places), int(own.sum()), windows, int(np.count_nonzero(seen))


def bm25_scores(
    terms: tuple[Counts, Integers, Integers],
    rows: Rows,
    lengths: tuple[Counts, Totals],
    scores: tuple[Numbers, Numbers, Numbers],
    /,
) -> list[tuple[float, float, float]]:
    """Add the terms' scores to (turn, window, session), float32 [n], [n] and [documents].

    ``terms`` is (starts int64, places int32, times int32): term t is in the rows ``places[starts[t]:starts[t + 1]]``
    (ascending), ``times`` often. ``lengths`` is what `bm25_lengths` filled and returned for the same rows. Returns of
    each term the rarity (idf) among rows, windows and sessions.
    """
    import numpy as np

    (starts, places, times), (allowed, length, *beside, document) = terms, rows
    (sessions, totals), (turn, window, session) = lengths, scores
    count, total, windows, documents = totals
    rarities = []
    near_times = np.zeros(len(allowed), np.int64)
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        here, often = places[first:last], times[first:last].astype(np.int64)
        mine = allowed[here]
        here, often = here[mine], often[mine]
        near_times[here] = often
        touched = [here]
        for neighbour in beside:
            near = neighbour[here]
            held = near >= 0
            held[held] = allowed[near[held]]
            near_times[near[held]] += often[held]
            touched.append(near[held])
        around = np.unique(np.concatenate(touched))
        whole, group = np.unique(document[here], return_inverse=True)
        times_whole = np.bincount(group, often, len(whole))
        span = length[around].astype(np.int64)
        for neighbour in beside:
            near = neighbour[around]
            held = near >= 0
            held[held] = allowed[near[held]]
            span[held] += length[near[held]]
        rarity = (_rarity(count, len(here)), _rarity(count, len(around)), _rarity(documents, len(whole)))
        rarities.append(rarity)
        # A document's length over the usual one; where nothing has a length, none is said to be long.
        turn_size = length[here] / (total / count) if total else np.ones(len(here))
        window_size = span / (windows / count) if windows else np.ones(len(around))
        session_size = sessions[whole] / (total / documents) if total else np.ones(len(whole))
        _add(turn, here, often, turn_size, rarity[0])
        _add(window, around, near_times[around], window_size, rarity[1])
        _add(session, whole, times_whole, session_size, rarity[2])
        near_times[around] = 0
    return rarities


def _rarity(count: int, having: int) -> float:
    return math.log1p((count - having + 0.5) / (having + 0.5))


def _add(to: Numbers, at: Any, often: Any, size: Any, rarity: float) -> None:
    """What a term adds to the scores of the documents ``at``, rounded to float32 each time."""
    import numpy as np

    often = often.astype(np.float64)
    part = rarity * (often * (K1 + 1)) / (often + K1 * ((1 - B) + B * size))
    to[at] = (to[at].astype(np.float64) + part).astype(np.float32)
