"""The states of live conversations behind their last whole page, kept in RAM from one turn to the next.

Pages hold whole steps of the token grid; without these the rest of a prompt is computed again in each turn. Knows token
ids, rows of states and ids of records; knows nothing of prompts, of files or of the model. Kept only where a trial said
that a state does not depend on what was computed with it (_local_in_place.py), so that a hit changes no bit.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

__all__ = ["Kept", "Tails"]

#: Conversations whose tail is kept; a tail is less than a page (6 MB with the default model).
MOST = 8

Rows = list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]


@dataclass(frozen=True)
class Kept:
    """States of ``tokens[start:]`` behind those of ``tokens[:start]``: per layer (K, V), each [KV heads, n, dim]; how
    many seconds computing them took, and the ids of the records that stand in any of the tokens."""

    identity: bytes
    tenant: str
    tokens: tuple[int, ...]
    start: int
    rows: Rows
    seconds: float
    records: frozenset[str] = frozenset()


class Tails:
    """The tails that were kept, the one used last at the end. Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[Kept] = []
        self._drops = 0
        _OPEN.add(self)

    @property
    def drops(self) -> int:
        """How often all were let go of: a request says with it how old its prompt is."""
        return self._drops

    def find(self, identity: bytes, tenant: str, tokens: Sequence[int], start: int) -> tuple[Kept, int] | None:
        """What continues ``tokens[:start]`` the longest as ``tokens`` go on, and by how many tokens it does."""
        best: tuple[Kept, int] | None = None
        with self._lock:
            kept = list(self._kept)
        for tail in kept:
            if (tail.identity, tail.tenant, tail.start) != (identity, tenant, start):
                continue
            if tail.tokens[:start] != tuple(tokens[:start]):
                continue
            pairs = zip(tail.tokens[start:], itertools.islice(tokens, start, None), strict=False)
            count = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if count and (best is None or count > best[1]):
                best = tail, count
        if best is not None:
            with self._lock:  # it goes last of all; it may have been let go of meanwhile
                self._kept.sort(key=lambda tail: tail is best[0])
        return best

    def keep(self, tail: Kept, since: int) -> None:
        """Keep this one; those that it continues, and the oldest beyond `MOST`, go. Not if all were let go of since
        ``drops`` was ``since``: what was forgotten then may be in it."""
        with self._lock:
            if since == self._drops:
                others = [old for old in self._kept if not _continues(tail, old)]
                self._kept = [*others[1 - MOST :], tail]

    def sweep(self, forgotten: Callable[[Collection[str]], Collection[str]]) -> None:
        """Let go of those made from records that were forgotten, also by another process; ``forgotten`` says which of
        some ids those are."""
        with self._lock:
            kept = list(self._kept)
        records: set[str] = set().union(*(tail.records for tail in kept))
        gone = forgotten(records) if records else ()
        if gone:
            with self._lock:
                self._kept = [tail for tail in self._kept if tail.records.isdisjoint(gone)]

    def drop(self) -> int:
        """Let go of all of them; returns how many those were."""
        with self._lock:
            self._drops += 1
            count, self._kept = len(self._kept), []
        return count

    def renew_lock(self) -> None:
        """For a forked child: the thread that held the lock may not exist there."""
        self._lock = threading.Lock()


_OPEN: weakref.WeakSet[Tails] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for tails in list(_OPEN):
        tails.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _continues(tail: Kept, old: Kept) -> bool:
    same = (old.identity, old.tenant) == (tail.identity, tail.tenant)
    return same and old.tokens == tail.tokens[: len(old.tokens)]
