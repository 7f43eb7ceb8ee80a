"""One byte budget over page files and their copies in RAM: what may come in, and what goes for it.

Knows sizes and costs (eviction.py chooses by them), and that RAM has a budget of its own within that one; knows nothing
of tenants, prompts or where a page came from.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Collection

from ..database import Database
from ..errors import StoreError
from .catalog import Catalog
from .eviction import Chosen, Costs, RamCopy, choose
from .pages import Page
from .residency import Residency, settled

__all__ = ["Budget"]

logger = logging.getLogger("agentmem")

#: Of the budget, RAM copies never take more than one part in this many where nothing else is set.
RAM_PART = 4
#: Seconds, by the store's clock, after which a copy that no request asked for goes with the next request: pages of idle
#: conversations and of layouts that were left would stay otherwise, up to the whole budget. Its file stays.
IDLE_S = 600.0


class Budget:
    """``total`` bytes, shared by the files of the folder and the RAM copies of this process.

    Files and copies compete by one rule, cost per byte and time since the last use (`eviction.choose`). A copy is some
    ten times cheaper to have again than a file, so copies go first; but a copy in use displaces a file that has not
    been used for as many times longer. So that a busy working set can't delete the store bit by bit, copies have at
    most ``ram_total`` bytes (None: a quarter of the budget), and they go when files need the room. What a request maps
    counts as well, so copies make way for it before it comes. ``files`` is what the files hold as far as this process
    knows: others may have added to it since it last looked.
    """

    def __init__(
        self,
        database: Database,
        catalog: Catalog,
        *,
        total: int,
        ram_total: int | None = None,
        grid: int,
        clock: Callable[[], float],
    ) -> None:
        self.total = total
        self.ram_total = ram_total
        self.files = 0
        self.costs = Costs(grid)
        self.ram = Residency()
        self._refused: dict[bytes, RamCopy] = {}
        self._database = database
        self._catalog = catalog
        self._clock = clock

    def renew_locks(self) -> None:
        """For a forked child: a thread that held a lock does not exist there."""
        self.ram.renew_lock()
        self.costs.renew_lock()

    @property
    def share(self) -> int:
        """Bytes that RAM copies may have at most, room permitting."""
        return self.total // RAM_PART if self.ram_total is None else min(self.ram_total, self.total)

    def _limit(self) -> int:
        return min(self.share, self.total - self.files)

    def refresh(self) -> None:
        """Look how much the files hold now, and drop copies where that leaves less room."""
        self.files = self._catalog.bytes_of_files()
        self.refresh_copies()

    def refresh_copies(self) -> None:
        """Drop copies where the files leave less room."""
        self._trim(None)

    def _trim(self, new: RamCopy | None) -> bool:
        """Make room among the copies, for a new one if it is worth more than what has to go; whether there is room.

        Copies cost the same per byte, so the least recently used go; of one look-up's pages the deeper ones, because
        all begin with the first.
        """
        over = self.ram.held + (new.bytes if new else 0) - self._limit()
        if over > 0:
            copies = [*self.ram.copies(), *([new] if new else [])]
            gone = choose([], free=over, now=self._clock(), costs=self.costs, copies=copies).copies
            if new is not None and new.key in gone:
                return False
            self.ram.drop(gone)
        return True

    def make_way(self, coming: int, *, spare: Collection[bytes] = ()) -> bool:
        """Drop idle copies, then the least recently used ones, but for those of ``spare``, so that ``coming`` bytes can
        be mapped within the RAM's budget; whether they can. What others are reading leaves the memory only when they
        are done.
        """
        now = self._clock()
        copies = [copy for copy in self.ram.copies() if copy.key not in spare]
        self.ram.drop(copy.key for copy in copies if now - copy.used > IDLE_S and not copy.pinned)
        over = self.ram.mapped + coming - self.share
        if over > 0:
            copies = [copy for copy in self.ram.copies() if copy.key not in spare]
            self.ram.drop(choose([], free=over, now=now, costs=self.costs, copies=copies).copies)
        return self.ram.mapped + coming <= self.share

    def admit(self, page: Page, *, pinned: bool, used: float, displace: bool = False) -> bool:
        """Keep a good page in RAM if it is worth what has to go for it; whether it is there now.

        Files go for it only with ``displace``: else, because a request may be waiting, it is noted that they should,
        and `displace_for_refused` lets them go when pages are written anyway.
        """
        if self.ram.holds(page):
            return True
        new = RamCopy(page.name, page.number, len(page.data), used, pinned)
        if new.bytes > self.share or not settled(page):
            return False
        over = self.files + min(self.ram.held + new.bytes, self.share) - self.total
        if over > 0:
            if displace:
                self._displace(over, new)
            elif sum(copy.bytes for copy in list(self._refused.values())) < self.share:
                self._refused[page.name] = new
        return self._trim(new) and self.ram.keep(page, new, limit=self._limit)

    def _displace(self, free: int, new: RamCopy) -> None:
        """Delete files that are worth less than the new copy, if that frees enough; else nothing."""
        try:
            with self._database.write() as connection:
                chosen = self._choose(connection, free, copies=[*self.ram.copies(), new])
                if new.key not in chosen.copies:
                    self._let_go(connection, chosen)
        except (OSError, StoreError) as error:
            logger.warning("no room can be made for a KV page in RAM: %s", error)

    def displace_for_refused(self, connection: sqlite3.Connection, *, spare: Collection[bytes]) -> None:
        """Delete files that are worth less than the copies for which there was no room, so that the next time there is.

        Never those of ``spare``. Part of the caller's transaction.
        """
        found, self._refused = self._refused, {}
        refused = {name: found[name] for name in self._catalog.rows(found)}
        copies = [copy for copy in self.ram.copies() if copy.key not in refused]
        wanted = sum(copy.bytes for copy in (*copies, *refused.values()))
        free = self._catalog.bytes_of_files() + min(wanted, self.share) - self.total
        if refused and free > 0:
            chosen = self._choose(connection, free, copies=[*copies, *refused.values()], spare=spare)
            self._let_go(connection, chosen)

    def make_room(self, connection: sqlite3.Connection, size: int, *, spare: Collection[bytes]) -> int:
        """Make room for ``size`` bytes of new files, never at the cost of ``spare``; how many may come.

        Part of the caller's transaction, so that no moment has more than the budget in named files.
        """
        held = self._catalog.bytes_of_files()
        # Said first: a copy that comes in from now on counts with them.
        self.files = held + size
        over = self.files + self.ram.held - self.total
        if over > 0:
            self._let_go(connection, self._choose(connection, over, spare=spare), coming=size)
        return self.total - self._catalog.bytes_of_files()

    def evict(self, connection: sqlite3.Connection, free: int | None) -> int:
        """Delete files and drop copies of ``free`` bytes (default: what is above the budget); how many files went."""
        if free is not None:
            chosen = self._choose(connection, free, copies=[])
        else:
            over = self._catalog.bytes_of_files() + self.ram.held - self.total
            chosen = self._choose(connection, over)
        self._let_go(connection, chosen)
        return len(chosen.files)

    def _choose(
        self,
        connection: sqlite3.Connection,
        free: int,
        *,
        copies: Collection[RamCopy] | None = None,
        spare: Collection[bytes] = (),
    ) -> Chosen:
        self._catalog.flush(connection)
        return choose(
            list(self._catalog.rows().values()),
            free=free,
            now=self._clock(),
            costs=self.costs,
            copies=self.ram.copies() if copies is None else copies,
            spare=spare,
        )

    def _let_go(self, connection: sqlite3.Connection, chosen: Chosen, *, coming: int = 0) -> None:
        self.ram.drop([*chosen.copies, *chosen.files])
        self._catalog.remove(connection, chosen.files)
        self.files = self._catalog.bytes_of_files() + coming
