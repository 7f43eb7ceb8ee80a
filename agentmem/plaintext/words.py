"""Words as evidence: BM25 of a record alone, with its neighbours and with its whole session, over the rows allowed.

Knows the arithmetic's inputs and what they mean; the postings come from postings.py. What is not allowed has no say:
not in a word's rarity, nor in the usual length, nor as a neighbour.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from agentmem._pure import kernels

from . import postings
from .catalog import View

if TYPE_CHECKING:
    import numpy.typing as npt

    Bools = npt.NDArray[np.bool_]
    Numbers = npt.NDArray[np.float32]
    Places = npt.NDArray[np.int32]

__all__ = ["Lexical", "Words"]

#: BM25's limit of a term's score over its idf (k1 + 1).
SATURATION = 2.2


@dataclass(frozen=True, eq=False)
class Lexical:
    """What a query's words say of a view's rows. ``turn``, ``window``: float32 [n], 0 where nothing is said."""

    stems: list[str]
    turn: Numbers
    window: Numbers
    by_document: Numbers
    idf: dict[str, float]
    evidence: float
    _document: Places
    _allowed: Bools
    _postings: list[tuple[Places, Places]]

    @cached_property
    def session(self) -> Numbers:
        """The score of each row's session, float32 [n]. `session_at` is quicker for some rows."""
        return np.where(self._allowed, self.by_document[self._document], np.float32(0))

    def session_at(self, places: Places) -> Numbers:
        """The score of these rows' sessions, float32."""
        return self.by_document[self._document[places]]

    def best(self, k: int) -> Places:
        """The ``k`` rows with the best windows and the ``k`` best by themselves, as one set, ascending."""
        found = np.flatnonzero(self.window).astype(np.int32)
        if len(found) <= k:
            return found
        chosen = []
        for scores in (self.window[found], self.turn[found]):
            chosen.append(found[np.argpartition(scores, len(found) - k)[len(found) - k :]])
        return np.unique(np.concatenate(chosen))

    def times(self, places: Places) -> npt.NDArray[np.int32]:
        """How often each stem occurs in these rows: int32 [stems, places]."""
        found = np.zeros((len(self.stems), len(places)), np.int32)
        for row, (here, often) in zip(found, self._postings, strict=True):
            if len(here):
                at = np.minimum(np.searchsorted(here, places), len(here) - 1)
                np.copyto(row, often[at], where=here[at] == places)
        return found


class Words:
    """Scores of a query's words. Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lengths: tuple[Bools, Any, tuple[int, int, int, int]] | None = None

    def stems(self, query: str) -> list[str]:
        """The stems of the query's words as FTS5 stores them, without stop words, each once, `postings.MOST_TERMS`."""
        return postings.stems(query)

    def score(self, view: View, stems: Sequence[str], allowed: Bools) -> Lexical:
        """BM25 (k1 1.2, b 0.75) of the rows that are ``allowed`` (bool [n]) for the ``stems``.

        ``evidence`` is what the best row has of the score that a row with all the words would have, 0 to 1.
        """
        held = view.postings.get(stems, view.seq)
        sessions, totals = self._lengths_of(view, allowed)
        turn, window = np.zeros(view.n, np.float32), np.zeros(view.n, np.float32)
        session = np.zeros(view.documents, np.float32)
        starts = np.zeros(len(held) + 1, np.int64)
        np.cumsum([len(places) for places, _ in held], out=starts[1:])
        rarities = kernels().bm25_scores(
            (
                starts,
                np.concatenate([_NONE, *(places for places, _ in held)]),
                np.concatenate([_NONE, *(times for _, times in held)]),
            ),
            (allowed, view.length, view.previous, view.next, view.document),
            (sessions, totals),
            (turn, window, session),
        )
        possible = SATURATION * sum(rarity[0] for rarity in rarities)
        return Lexical(
            stems=list(stems),
            turn=turn,
            window=window,
            by_document=session,
            idf={stem: rarity[0] for stem, rarity in zip(stems, rarities, strict=True)},
            evidence=float(turn.max(initial=0.0)) / possible if possible else 0.0,
            _document=view.document,
            _allowed=allowed,
            _postings=held,
        )

    def _lengths_of(self, view: View, allowed: Bools) -> tuple[Any, tuple[int, int, int, int]]:
        """The lengths under this mask: those of the last one are kept, since most searches are of one scope."""
        with self._lock:
            if self._lengths is not None and self._lengths[0] is allowed:
                return self._lengths[1:]
        sessions = np.zeros(view.documents, np.int64)
        totals = kernels().bm25_lengths((allowed, view.length, view.previous, view.next, view.document), sessions)
        if not allowed.flags.writeable:  # else it may be another set of rows by the next call
            with self._lock:
                self._lengths = allowed, sessions, totals
        return sessions, totals


_NONE = np.empty(0, np.int32)
