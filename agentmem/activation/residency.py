"""The pages that this process keeps in RAM: mapped (or decrypted) and known to be good, by name.

Knows files' stamps and bytes; decides nothing about how much may stay (budget.py does). A copy is handed out only while
its file is still the one that was checked. Counts also what is no copy (any more) but is still being read.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .eviction import RamCopy
from .pages import Page, Stamp

__all__ = ["Residency", "settled"]

#: A file that changed this shortly before it was checked may change again without a new time stamp. Time stamps of
#: local file systems move every 10 ms at least.
SETTLED_NS = 100_000_000
#: Seconds after which a mapped copy is checked again at its next use: that goes along with copying and is nearly free.
RECHECK_S = 600.0


def settled(page: Page) -> bool:
    """Whether a later change of this page's file would show in its stamp."""
    return page.encrypted or time.time_ns() - max(page.stamp.modified, page.stamp.changed) > SETTLED_NS


class Residency:
    """Good pages in RAM. Usable from many threads; no lock is held while files are looked at."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: dict[bytes, tuple[Page, RamCopy]] = {}
        self._since: dict[bytes, float] = {}
        self._held = 0
        self._mapped: dict[int, tuple[weakref.ref[Any], int]] = {}

    def renew_lock(self) -> None:
        """For a forked child: the thread that held the lock may not exist there."""
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes of all copies."""
        return self._held

    @property
    def mapped(self) -> int:
        """Bytes of all pages in this process's memory: the copies, and what requests read beside them."""
        return sum(size for _, size in self._mapped.copy().values())

    def watch(self, page: Page) -> None:
        """Count this newly opened page in ``mapped`` until nobody holds its bytes any more, copy or not."""
        # Without the lock: whoever lets go last may hold it, or be the garbage collector. One dict operation each.
        mapped = self._mapped
        gone = weakref.ref(page.data, lambda reference: mapped.pop(id(reference), None))
        mapped[id(gone)] = gone, len(page.data)

    def copies(self) -> list[RamCopy]:
        """All copies."""
        with self._lock:
            return [copy for _, copy in self._pages.values()]

    def get(self, name: bytes, path: Path, *, used: float) -> Page | None:
        """A handle of its own on this page, if it is here and its file did not change; notes the use."""
        with self._lock:
            found = self._pages.get(name)
        if found is None:
            return None
        page, copy = found
        if _stamp(path) != page.stamp or self._due(name, page):
            self.drop([name])
            return None
        with self._lock:
            if self._pages.get(name) is found:
                self._pages[name] = page, replace(copy, used=used)
        handle = page.share()
        handle.seconds = 0.0  # this time nothing had to be read or checked
        return handle

    def _due(self, name: bytes, page: Page) -> bool:
        """Whether a mapping is to be checked again: the system may have let go of it and read the disk anew since."""
        return not page.encrypted and time.monotonic() - self._since.get(name, 0.0) > RECHECK_S

    def holds(self, page: Page) -> bool:
        """Whether this very page, of this very file, is here."""
        with self._lock:
            return self._is_here(page)

    def _is_here(self, page: Page) -> bool:
        return page.name in self._pages and self._pages[page.name][0].stamp == page.stamp

    def keep(self, page: Page, copy: RamCopy, *, limit: Callable[[], int]) -> bool:
        """Keep this good page unless it would take the copies above ``limit()`` bytes; whether it is here now."""
        with self._lock:
            if self._is_here(page):
                return True
            if self._held + copy.bytes > limit() or len(self._pages) >= _most_mappings():
                return False
            mine = page.share()
            mine.on_check = None
            self._take(page.name)
            self._pages[page.name] = mine, copy
            self._since[page.name] = time.monotonic()
            self._held += copy.bytes
        return True

    def pin(self, names: Iterable[bytes], pinned: bool) -> None:
        """Note that these pages are pinned now, or not any more."""
        with self._lock:
            for name in names:
                if name in self._pages:
                    page, copy = self._pages[name]
                    self._pages[name] = page, replace(copy, pinned=pinned)

    def drop(self, names: Iterable[bytes]) -> None:
        """Give these copies up. Whoever still reads one of them can finish: the memory goes with the last handle."""
        with self._lock:
            for name in names:
                self._take(name)

    def _take(self, name: bytes) -> None:
        if name in self._pages:
            self._held -= self._pages.pop(name)[1].bytes
            self._since.pop(name, None)

    def sweep(self, path: Callable[[bytes], Path]) -> None:
        """Give up all copies whose file is gone or another one."""
        with self._lock:
            held = [(name, page.stamp) for name, (page, _) in self._pages.items()]
        self.drop([name for name, stamp in held if _stamp(path(name)) != stamp])

    def clear(self) -> None:
        """Give up all copies."""
        with self._lock:
            self._pages.clear()
            self._since.clear()
            self._held = 0


def _stamp(path: Path) -> Stamp | None:
    with contextlib.suppress(OSError):
        return Stamp.of(os.stat(path, follow_symlinks=False))
    return None


def _most_mappings() -> int:
    """Before Python 3.13 every mapping holds a file descriptor: a quarter of what the process may have."""
    if sys.version_info >= (3, 13):
        return 1 << 30
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft // 4
