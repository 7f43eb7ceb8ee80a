"""Which pages go first when room is short, and which go along with another.

Pure functions over rows and costs; knows nothing of files. Pages form trees: a page is of no use without its parent, so
only a page without stored children may be deleted. A page may also have a copy in RAM: that may always go.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Chosen", "Costs", "PageRow", "RamCopy", "ancestors", "choose", "descendants"]

#: Tokens of prefix at which one more token costs twice as much to compute as at the start (linear layers plus attention
#: over all before it; measured on the default model: 2,827 tokens/s over 512 tokens, 1,409 over 8,192).
DOUBLING_TOKENS = 4096
#: Where nothing was measured yet: seconds to compute a token at the start of a prompt, and bytes loaded per second.
TOKEN_S = 1 / 2827
LOAD_RATE = 1e9
#: Weight of the newest measurement in the running mean.
_NEWEST = 0.5


@dataclass(frozen=True)
class PageRow:
    """What the database knows of a page. Times are in seconds of the store's clock."""

    key: bytes
    identity: bytes
    parent: bytes
    number: int
    bytes: int
    created: float
    used: float
    uses: int
    pinned: bool
    codec: str
    #: Tokens; 0 stands for the store's own grid.
    grid: int = 0


@dataclass(frozen=True)
class RamCopy:
    """A page that is held in RAM: bytes there, last use in seconds of the store's clock."""

    key: bytes
    number: int
    bytes: int
    used: float
    pinned: bool


@dataclass(frozen=True)
class Chosen:
    """What is to go: files (children before parents) and copies in RAM, by key."""

    files: list[bytes] = field(default_factory=list)
    copies: list[bytes] = field(default_factory=list)


class Costs:
    """Seconds to have a page again: to load its file, or to compute it. Running means of what was measured.

    A page costs more to compute the deeper it lies: a token costs ``1 + position / 4096`` times one at the start.
    """

    def __init__(self, grid: int) -> None:
        self._grid = grid
        self._lock = threading.Lock()
        self._token_s: dict[bytes, float] = {}
        self._load_rate = 0.0

    def renew_lock(self) -> None:
        """For a forked child: the thread that held the lock may not exist there."""
        self._lock = threading.Lock()

    @property
    def load_rate(self) -> float:
        """Bytes per second at which files come into RAM, checked."""
        return self._load_rate or LOAD_RATE

    def loaded(self, size: int, seconds: float) -> None:
        """``size`` bytes came from a file into RAM, checked, in so many seconds."""
        if size > 0 and seconds > 0 and math.isfinite(seconds):
            with self._lock:
                self._load_rate = _mean(self._load_rate, size / seconds)

    def computed(self, identity: bytes, first: int, count: int, seconds: float, *, grid: int = 0) -> None:
        """Pages ``first`` .. ``first + count`` under this identity were computed in so many seconds; ``grid`` as in
        `PageRow`."""
        units = sum(self._units(number, grid or self._grid) for number in range(first, first + count))
        if units > 0 and seconds > 0 and math.isfinite(seconds):
            with self._lock:
                self._token_s[identity] = _mean(self._token_s.get(identity, 0.0), seconds / units)

    def compute_s(self, row: PageRow) -> float:
        """Seconds to compute this page, its prefix given."""
        return self._token_s.get(row.identity, TOKEN_S) * self._units(row.number, row.grid or self._grid)

    def load_s(self, size: int) -> float:
        """Seconds to bring a file of this size into RAM, checked."""
        return size / self.load_rate

    def _units(self, number: int, grid: int) -> float:
        return grid * (1.0 + number * grid / DOUBLING_TOKENS)


def _mean(known: float, new: float) -> float:
    return new if known == 0.0 else (1 - _NEWEST) * known + _NEWEST * new


def ancestors(rows: Mapping[bytes, PageRow], keys: Iterable[bytes]) -> list[bytes]:
    """Those of ``keys`` that have a row, and all pages before them, each once."""
    found: dict[bytes, None] = {}
    for key in keys:
        one = key
        while one in rows and one not in found:
            found[one] = None
            one = rows[one].parent
    return list(found)


def descendants(rows: Iterable[PageRow], keys: Iterable[bytes]) -> list[bytes]:
    """``keys`` and all pages below them, each once, parents before children."""
    children: dict[bytes, list[bytes]] = {}
    for row in rows:
        children.setdefault(row.parent, []).append(row.key)
    found: dict[bytes, None] = {}
    waiting = list(dict.fromkeys(keys))
    for key in waiting:
        if key not in found:
            found[key] = None
            waiting.extend(children.get(key, ()))
    return list(found)


def choose(
    rows: Sequence[PageRow],
    *,
    free: int,
    now: float,
    costs: Costs,
    copies: Collection[RamCopy] = (),
    spare: Collection[bytes] = (),
) -> Chosen:
    """What goes, in this order, until ``free`` bytes are free or nothing is left that may go.

    A file costs what it takes to compute the page, a copy in RAM what it takes to load it. First goes what has the
    least cost per byte and second since its last use (the size-aware form of least recent use: N. Young's Landlord /
    P. Cao and S. Irani's GreedyDual-Size with real costs). Ties go to the deeper page. Pinned pages and all before them
    keep their files, as do those of ``spare``; copies of pinned pages count as just used. A file takes its copy along.
    """
    by_key: Mapping[bytes, PageRow] = {row.key: row for row in rows}
    in_ram = {copy.key: copy for copy in copies}
    children: dict[bytes, int] = {}
    for row in rows:
        children[row.parent] = children.get(row.parent, 0) + 1

    def rank(cost: float, size: int, used: float) -> float:
        # A clock that was set back must not make a page immortal or a division by zero.
        return cost / max(size, 1) / max(now - used, 1e-3)

    def file(row: PageRow) -> tuple[float, int, bytes, bool]:
        return rank(costs.compute_s(row), row.bytes, row.used), -row.number, row.key, True

    def copied(copy: RamCopy) -> tuple[float, int, bytes, bool]:
        used = now if copy.pinned else copy.used
        return rank(costs.load_s(copy.bytes), copy.bytes, used), -copy.number, copy.key, False

    def may_go(row: PageRow) -> bool:
        return not row.pinned and row.key not in spare and not children.get(row.key)

    heap = [file(row) for row in rows if may_go(row)] + [copied(copy) for copy in copies]
    heapq.heapify(heap)
    chosen = Chosen()
    while free > 0 and heap:
        *_, key, on_disk = heapq.heappop(heap)
        copy = in_ram.pop(key, None)
        if copy is not None:
            chosen.copies.append(key)
            free -= copy.bytes
        if not on_disk:
            continue
        row = by_key[key]
        chosen.files.append(key)
        free -= row.bytes
        children[row.parent] -= 1
        parent = by_key.get(row.parent)
        if parent is not None and may_go(parent):
            heapq.heappush(heap, file(parent))
    return chosen
