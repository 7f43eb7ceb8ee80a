"""KV pages into RAM ahead of their use, and out of it, by hand.

Knows which go first and when to stop; how a page is opened and checked is the store's, what may stay in RAM is
budget.py's.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import Corrupt, Incompatible
from ..types import Value
from .budget import Budget
from .catalog import Catalog
from .eviction import PageRow
from .pages import Page

__all__ = ["Swapped", "advise", "swap_in", "swap_out"]


class Swapped(Value):
    """What a swap did: ``pages`` that are in RAM now, or left it, their ``bytes``, and the ``seconds`` it took."""

    pages: int
    bytes: int
    seconds: float


def swap_out(rows: Sequence[PageRow], catalog: Catalog, budget: Budget, *, everything: bool) -> Swapped:
    """See `PageStore.swap_out`; with ``everything`` also copies whose rows are gone."""
    started = time.perf_counter()
    budget.ram.drop([copy.key for copy in budget.ram.copies()] if everything else [row.key for row in rows])
    for row in rows:
        advise(catalog.path(row.key), "POSIX_FADV_DONTNEED")
    return Swapped(pages=len(rows), bytes=sum(row.bytes for row in rows), seconds=time.perf_counter() - started)


def swap_in(
    chosen: Sequence[PageRow],
    catalog: Catalog,
    budget: Budget,
    *,
    opened: Callable[[PageRow], Page | None],
    now: float,
) -> Swapped:
    """See `PageStore.swap_in`; ``opened`` gives a page whose header is sound, or None."""
    started = time.perf_counter()
    rows, room = [], budget.share
    for row in sorted(chosen, key=lambda row: (-row.used, row.number)):
        room -= row.bytes
        if room < 0:
            break
        rows.append(row)
    for row in rows:  # all at once: the disk reads on while the first are checked
        advise(catalog.path(row.key), "POSIX_FADV_WILLNEED")
    budget.refresh()
    there: list[int] = []
    wanted = {row.key for row in rows}
    here = {copy.key for copy in budget.ram.copies()}
    for row in rows:
        if row.key not in here and not budget.make_way(row.bytes, spare=wanted):
            continue
        with contextlib.suppress(Corrupt, Incompatible):
            page = opened(row)
            if page is None:
                continue
            if not page.verified:
                page.verify()
            if budget.admit(page, pinned=row.pinned, used=now, displace=True):
                there.append(row.bytes)
    return Swapped(pages=len(there), bytes=sum(there), seconds=time.perf_counter() - started)


def advise(path: Path, advice: str) -> None:
    """Tell the system about the use of a file's bytes, where it listens."""
    if hasattr(os, advice):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                os.posix_fadvise(descriptor, 0, 0, getattr(os, advice))
            finally:
                os.close(descriptor)
