"""Vectors in RAM, compared one by one: a small index as a whole, and what is newer than a large one's files.

Knows vectors by the record and the passage they are of, and where those records are in a view. Nothing is stored.
"""

from __future__ import annotations

import mmap
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from .catalog import View

    Vectors = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.int64]
    Parts = npt.NDArray[np.int32]
    Places = npt.NDArray[np.int32]
    Bools = npt.NDArray[np.bool_]

__all__ = ["Exact", "Owners", "best_of", "fresh", "grouped"]


def fresh(shape: tuple[int, ...], kind: type[np.generic]) -> Any:
    """An array of zeros in pages of its own: what is not written yet takes no RAM, and all of it goes back to the
    system with the array. From the heap, each growing array would leave a hole as large as it was before."""
    size = int(np.prod(shape))
    if not size:
        return np.empty(shape, kind)
    length = size * np.dtype(kind).itemsize
    if sys.platform == "win32":
        pages = mmap.mmap(-1, length)
    else:  # private: a forked child's writes are its own
        pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, kind, size).reshape(shape)


class Owners:
    """Where the records of growing rows are in views: what is known of a view stays true while it grows."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Places, int, bool]] = {}

    def of(self, seq: Rows, view: View) -> tuple[Places, bool]:
        """The place of each row's record in the view, int32, -1 for none; and whether row i is at place i, each."""
        places, done, straight = self._known.get(view.generation, (np.empty(0, np.int32), 0, True))
        if done == len(seq):
            return places[:done], straight
        if len(seq) > len(places):
            larger = np.empty(max(len(seq), 2 * len(places)), np.int32)
            larger[:done] = places[:done]
            places = larger
        places[done : len(seq)] = view.places(seq[done:])
        rising = straight and np.array_equal(places[done : len(seq)], np.arange(done, len(seq)))
        # A record that is newer than the view will have a place in the next one.
        newer = seq[done:] > (view.seq[-1] if view.n else 0)
        known = done + int(np.argmax(newer)) if newer.any() else len(seq)
        if len(self._known) > 8:
            self._known.clear()
        if known == len(seq) or not straight:
            self._known[view.generation] = places, known, rising
        else:
            self._known[view.generation] = places, known, np.array_equal(places[:known], np.arange(known))
        return places[: len(seq)], rising

    def seen(self, seq: Rows, gone: Bools | None, view: View, allowed: Bools) -> tuple[Places, Bools]:
        """The place of each row's record, and whether it is allowed (and not ``gone``)."""
        owner, straight = self.of(seq, view)
        if straight and len(owner) <= view.n:
            found = allowed[: len(owner)]
        else:
            found = (owner >= 0) & (owner < view.n)
            found &= allowed[np.where(found, owner, 0)] if view.n else False
        return owner, found if gone is None else found & ~gone


class Exact:
    """Growing arrays of vectors. Rows that are removed stay in place until half of all are gone."""

    def __init__(self, dimension: int) -> None:
        self._count = self._gone = 0
        self._seq = np.empty(0, np.int64)
        self._part = np.empty(0, np.int32)
        self._matrix = np.empty((0, dimension), np.float32)
        self._live = np.empty(0, np.bool_)
        self._owners = Owners()
        self._order: Rows | None = None
        self._single = True  # whether each record has one passage

    def __len__(self) -> int:
        return self._count - self._gone

    def add(self, seq: Rows, part: Parts, vectors: Vectors) -> None:
        """Vectors of records that have none here."""
        if not len(seq):
            return
        first, count = self._count, self._count + len(seq)
        if count > len(self._seq):
            room = max(count, 2 * first)
            for name in ("_seq", "_part", "_matrix", "_live"):
                old = getattr(self, name)
                new = fresh((room, *old.shape[1:]), old.dtype.type)
                new[:first] = old[:first]
                setattr(self, name, new)
        self._seq[first:count], self._part[first:count] = seq, part
        self._matrix[first:count], self._live[first:count] = vectors, True
        self._single = self._single and not part.any()
        self._order = None
        self._count = count  # last: where memory ends above, nothing was added

    def remove(self, seqs: Rows) -> None:
        """Take these records' vectors out."""
        rows = self.rows(seqs)
        self._live[rows] = False
        self._gone += len(rows)
        if self._gone > max(1024, self._count // 2):
            kept = np.flatnonzero(self._live[: self._count])
            self._seq, self._part, self._matrix = self._seq[kept], self._part[kept], self._matrix[kept]
            self._live = np.ones(len(kept), bool)
            self._count, self._gone, self._order, self._owners = len(kept), 0, None, Owners()

    def rows(self, seqs: Rows) -> Rows:
        """The rows of these records, grouped by record in the order of ``seqs``, passages ascending."""
        if not self._count or not len(seqs):
            return np.empty(0, np.int64)
        if self._order is None:
            self._order = np.lexsort((self._part[: self._count], self._seq[: self._count]))
            self._sorted = self._seq[self._order]
        first = np.searchsorted(self._sorted, seqs)
        last = np.searchsorted(self._sorted, seqs, "right")
        if not (last - first > 1).any():
            found = self._order[first[last > first]]
        else:
            pairs = zip(first.tolist(), last.tolist(), strict=True)
            found = self._order[[at for begin, end in pairs for at in range(begin, end)]]
        return found[self._live[found]]

    def held(self, rows: Rows) -> tuple[Rows, Parts, Vectors]:
        """(seq, part, vector) of rows."""
        return self._seq[rows], self._part[rows], self._matrix[rows]

    def score(self, query: Vectors, view: View, allowed: Bools) -> tuple[Places, Vectors]:
        """The allowed records (int32 places) and the scores of their best passages (float32)."""
        count = self._count
        if not count:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        gone = ~self._live[:count] if self._gone else None
        owner, found = self._owners.seen(self._seq[:count], gone, view, allowed)
        rows = np.flatnonzero(found)
        # A matrix times a vector runs at the memory's speed, but only over rows that lie together.
        few = 8 * len(rows) < count
        scores = self._matrix[rows] @ query if few else (self._matrix[:count] @ query)[rows]
        return (owner[rows], scores) if self._single else best_of(owner[rows], scores)


def best_of(places: Places, scores: Vectors) -> tuple[Places, Vectors]:
    """Each place once, with its best score."""
    once, at = np.unique(places, return_inverse=True)
    best = np.full(len(once), -np.inf, np.float32)
    np.maximum.at(best, at, scores)
    return once, best


def grouped(query: Any, seq: Rows, vectors: Vectors, wanted: Rows) -> Vectors:
    """The best score of each wanted record's vectors, float32, NaN for none. ``seq`` are among the wanted."""
    records, again = np.unique(wanted, return_inverse=True)
    best = np.full(len(records), np.nan, np.float32)
    np.fmax.at(best, np.searchsorted(records, seq), vectors @ query)
    return best[again]
