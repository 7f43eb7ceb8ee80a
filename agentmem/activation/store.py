"""The store of KV pages of one memory folder: which pages are handed out, kept, and deleted.

Knows look-ups, tiers and lineage; knows nothing of models, prompts or what a record says. A page's rows are committed
before its file gets its name, so whatever is visible has its lineage. A page with no row or no file is a miss; a file
that fails any check is put aside and is a miss. Usable from many threads and processes: pages never change and are
named by content.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import re
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ..database import Database
from ..errors import Corrupt, Incompatible, InvalidInput, StoreError
from ..types import Value
from . import archive, audit, swapping, trained
from .budget import Budget
from .catalog import Catalog, marks, parts
from .cipher import ForeignKey, PageCipher
from .eviction import PageRow, ancestors, choose, descendants
from .identity import chain, root
from .pages import CODECS, LOSSY, Codec, Encoded, Page, Stamp
from .sealing import PageWriter
from .swapping import Swapped, advise
from .tenant import TenantPages

__all__ = ["PageEntry", "PageStore"]

logger = logging.getLogger("agentmem")

_KEY = re.compile(r"[0-9a-f]{64}")
#: A page opened at fewer bytes per second than this was not in the system's memory.
_CACHED_RATE = 3e9
#: Seconds after which the turn that a page was computed in is over, stored or not, in whichever process.
UNDER_WAY_S = 3600.0
#: `PageStore.bytes` hides the type's name from the annotations of its class.
Key = bytes


class PageEntry(Value):
    """One stored page. ``tokens`` is its length in tokens, ``bytes`` its file's, ``records`` the ids of the records it
    was made from, ``codec`` how its states are stored (a block that this codec does not take is stored raw). ``parent``
    is the key of the page before it; no page has a first one's."""

    key: str
    parent: str
    identity: str
    number: int
    tokens: int
    bytes: int
    codec: str
    created: float
    used: float
    uses: int
    pinned: bool
    records: tuple[str, ...]


class PageStore:
    """All KV pages of a folder, under one byte budget.

    ``grid`` is in tokens; ``budget_bytes`` is for the page files and what is kept of them in RAM (budget.py says who
    yields to whom), of which ``ram_budget_bytes`` (default: a quarter) may be in this process's RAM. New pages are
    stored with ``codec``; ``raw``, ``lossless`` and ``dense`` give the same bits and so share pages, each lossy codec
    has pages of its own. With ``cipher`` pages are encrypted, and only those under its page key are found. Opening a
    store removes what a killed process left behind.
    """

    def __init__(
        self,
        database: Database,
        folder: Path,
        *,
        grid: int = 256,
        budget_bytes: int = 8 << 30,
        ram_budget_bytes: int | None = None,
        codec: Codec = "raw",
        cipher: PageCipher | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not (1 <= grid <= 64 or (grid % 64 == 0 and grid <= 65536)):
            raise InvalidInput(f"a page of {grid} tokens is not possible: give a multiple of 64, up to 65536")
        if codec not in CODECS:
            raise InvalidInput(f"page codec {codec!r} is none of {', '.join(CODECS)}")
        self.grid = grid
        self.codec: Codec = codec
        self._database = database
        self._folder = Path(folder)
        self._cipher = cipher
        self._clock = clock
        self._closed = False
        self._folder_changed = 0
        self._catalog = Catalog(database, self._folder)
        self._budget = Budget(
            database, self._catalog, total=budget_bytes, ram_total=ram_budget_bytes, grid=grid, clock=clock
        )
        self._writer = PageWriter(
            database, self._catalog, self._budget, grid=grid, codec=codec, cipher=cipher, clock=clock
        )
        # Where that fails every write will say so in the log, and the chat goes on without stored pages.
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._catalog.tidy()
        self.drop_unstored()
        _OPEN.add(self)

    @property
    def budget_bytes(self) -> int:
        """Bytes that files and RAM copies may have together."""
        return self._budget.total

    @budget_bytes.setter
    def budget_bytes(self, value: int) -> None:
        self._budget.total = value

    # ---- what providers ask

    def view(self, salt: Key, *, writable: bool = True, grid: int | None = None) -> TenantPages:
        """The pages under one tenant's salt. Another salt's pages can be neither found nor probed through it.

        ``grid`` are the tokens of a page, where they are not the store's: pages of another grid are other pages.
        """
        if self.codec in LOSSY:
            # Other bits than the exact codecs': other pages.
            salt = hashlib.sha256(b"agentmem codec 1\0" + self.codec.encode() + b"\0" + salt).digest()
        return TenantPages(self, salt, writable=writable, grid=grid or self.grid)

    def longest(self, salt: Key, identity: Key, tokens: Sequence[int], grid: int) -> list[Page]:
        """See `TenantPages.longest`."""
        keys = chain(identity, salt, tokens, grid)
        pages: list[Page] = []
        if self._closed or not keys:
            return pages
        names = keys if self._cipher is None else [self._cipher.name(key) for key in keys]
        try:
            self._notice_deletions()
            rows = self._catalog.rows(names)
            self._budget.refresh()
        except StoreError as error:
            logger.warning("KV pages can't be looked up, computing anew: %s", error)
            return pages
        self._budget.ram.drop([name for name in names if name not in rows])
        wanted = set(itertools.takewhile(rows.__contains__, names))
        here = {copy.key for copy in self._budget.ram.copies()}
        # Before anything is mapped: what this prompt doesn't need goes, so that the RAM holds one or the other.
        self._budget.make_way(sum(rows[name].bytes for name in wanted if name not in here), spare=wanted)
        now = self._clock()
        parent = root(identity, salt, grid)
        for number, (key, name) in enumerate(zip(keys, names, strict=True)):
            if name not in rows:
                break
            try:
                page = self._opened(rows[name], now)
            except ForeignKey as error:  # a name of ours, and a file that is not
                self._catalog.put_aside(name, str(error))
                break
            if page is None:
                break
            if number == 0 and page.seconds > len(page.data) / _CACHED_RATE:
                # It came from the disk, and so will the others: the disk reads on while the first are looked at.
                for other in names[1 : len(rows)]:
                    advise(self._catalog.path(other), "POSIX_FADV_WILLNEED")
            expected = (key, parent, identity, number, tuple(tokens[number * grid : (number + 1) * grid]))
            found = (page.key, page.parent, page.identity, page.number, page.tokens)
            if found != expected or page.name != name or page.layout != (pages[0] if pages else page).layout:
                self._put_aside(page, name, "it holds another page than its name says")
                break
            pages.append(page)
            parent = key
        self._catalog.touch((page.name for page in pages), now)
        return pages

    def _opened(self, row: PageRow, now: float) -> Page | None:
        """This page from RAM or from its file, its header checked; None where it is missing or not sound.

        Raises `ForeignKey` where it is encrypted and can't be read here, which says nothing against it.
        """
        path = self._catalog.path(row.key)
        page = self._budget.ram.get(row.key, path, used=now)
        proved = functools.partial(self._proved, pinned=row.pinned, used=now)
        try:
            if page is None:
                page = Page(path, self._cipher)
                self._budget.ram.watch(page)
                if page.verified:
                    proved(page, None)
        except FileNotFoundError:
            self._catalog.tidy()
            return None
        except ForeignKey:
            raise
        except (Corrupt, Incompatible) as error:
            self._catalog.put_aside(row.key, str(error))
            return None
        except OSError as error:
            logger.warning("KV page %s can't be opened, computing anew: %s", row.key.hex()[:12], error)
            return None
        page.on_check = proved
        return page

    def _proved(self, page: Page, error: Exception | None, *, pinned: bool, used: float) -> None:
        """All of a page's states were checked for the first time: it stays in RAM, or it is put aside."""
        if error is not None:
            self._put_aside(page, page.name, str(error))
        elif not self._closed:
            self._budget.costs.loaded(len(page.data), page.seconds)
            self._budget.admit(page, pinned=pinned, used=used)

    def _put_aside(self, page: Page, name: Key, why: str) -> None:
        self._budget.ram.drop([name])
        try:
            now = Stamp.of(os.stat(self._catalog.path(name), follow_symlinks=False))
        except OSError:
            return
        # Somebody else may have put it aside and computed it anew meanwhile: that is another file.
        if (now.device, now.inode) == (page.stamp.device, page.stamp.inode):
            self._catalog.put_aside(name, why)

    def _notice_deletions(self) -> None:
        """Copies of files that anybody deleted leave the RAM, at the latest with the next look-up."""
        with contextlib.suppress(OSError):
            changed = os.stat(self._folder).st_mtime_ns
            if changed != self._folder_changed:
                self._folder_changed = changed
                self._budget.ram.sweep(self._catalog.path)

    def seal(
        self,
        salt: Key,
        identity: Key,
        tokens: Sequence[int],
        *,
        grid: int,
        first: int,
        layers: Sequence[tuple[Any, Any]],
        records: Sequence[tuple[str, ...]],
        encoded: Sequence[Encoded | None] | None = None,
        seconds: float | None = None,
    ) -> int:
        """See `TenantPages.seal`."""
        if self._closed:
            return 0
        return self._writer.seal(
            salt,
            identity,
            tokens,
            grid=grid,
            first=first,
            layers=layers,
            records=records,
            encoded=encoded,
            seconds=seconds,
        )

    def forgotten(self, records: Collection[str]) -> Collection[str]:
        """See `TenantPages.forgotten`."""
        try:
            return self._catalog.forgotten(records)
        except StoreError as error:
            logger.warning("whether records were forgotten can't be asked, they are taken to be: %s", error)
            return records

    # ---- what users ask

    def entries(self) -> list[PageEntry]:
        """All stored pages, oldest chain first, each chain in order."""
        self._catalog.flush_now()
        records: dict[str, list[str]] = {}
        for row in self._database.query("SELECT key, record FROM lineage WHERE kind = 'page' ORDER BY key, record"):
            records.setdefault(row["key"], []).append(row["record"])
        return [
            PageEntry(
                key=row.key.hex(),
                parent=row.parent.hex(),
                identity=row.identity.hex(),
                number=row.number,
                tokens=row.grid or self.grid,
                bytes=row.bytes,
                codec=row.codec,
                created=row.created,
                used=row.used,
                uses=row.uses,
                pinned=row.pinned,
                records=tuple(records.get(row.key.hex(), ())),
            )
            for row in sorted(self._catalog.rows().values(), key=lambda row: (row.created, row.number, row.key))
        ]

    def bytes(self) -> int:
        """Bytes of the files of all stored pages."""
        return self._catalog.bytes_of_files()

    def bytes_in_ram(self) -> int:
        """Bytes of the pages that this process keeps in RAM, beside those that a request is reading."""
        return self._budget.ram.held

    def bytes_mapped(self) -> int:
        """Bytes of the pages that are in this process's memory now, those included that requests are reading."""
        return self._budget.ram.mapped

    def pin(self, keys: Sequence[str], pinned: bool = True) -> None:
        """Keep these pages whatever the budget says, and with them all pages before them; or let them go again."""
        packed = _unhex(keys)
        with self._database.write() as connection:
            connection.executemany("UPDATE pages SET pinned = ? WHERE key = ?", [(int(pinned), key) for key in packed])
        self._budget.ram.pin(packed, pinned)

    def evict(self, keys: Sequence[str] | None = None, *, bytes: int | None = None) -> int:
        """Delete pages to make room; returns how many. Pinned pages and the pages before them stay.

        With ``keys`` these and all behind them, with ``bytes`` as many as free that much (least use per rebuild cost
        first), with neither as many as the budget asks for.
        """
        chosen = None if keys is None else _unhex(keys)
        try:
            with self._database.write() as connection:
                self._catalog.flush(connection)
                if chosen is None:
                    return self._budget.evict(connection, bytes)
                rows = self._catalog.rows()
                among = [rows[key] for key in descendants(rows.values(), chosen) if key in rows]
                everything = sum(row.bytes for row in among)
                gone = choose(among, free=everything, now=self._clock(), costs=self._budget.costs).files
                self._budget.ram.drop(gone)
                self._catalog.remove(connection, gone)
        except OSError as error:
            raise StoreError(f"a KV page in {self._folder} can't be deleted ({error.strerror}): try again") from error
        return len(gone)

    def swap_out(self, keys: Sequence[str] | None = None) -> Swapped:
        """Let these pages (default: all) leave the RAM, this process's and the system's; their files stay.

        A request that reads one of them can finish: its memory goes afterwards.
        """
        return swapping.swap_out(self._chosen(keys), self._catalog, self._budget, everything=keys is None)

    def swap_in(self, keys: Sequence[str] | None = None) -> Swapped:
        """Bring these pages and those before them (default: all) into RAM, checked, the last used first, as far as the
        budget lets them.

        The next request reads them without waiting for the disk and without checking them again. Damaged ones are put
        aside, those under another page key are passed over, and where running requests need the RAM it ends early. Says
        what of all these is in RAM afterwards.
        """
        now, chosen = self._clock(), self._chosen(keys, whole=True)
        return swapping.swap_in(chosen, self._catalog, self._budget, opened=lambda row: self._opened(row, now), now=now)

    def _chosen(self, keys: Sequence[str] | None, *, whole: bool = False) -> list[PageRow]:
        self._catalog.flush_now()
        rows = self._catalog.rows()
        chosen = rows if keys is None else ancestors(rows, _unhex(keys)) if whole else dict.fromkeys(_unhex(keys))
        return [rows[key] for key in chosen if key in rows]

    def made_from(self, record_ids: Sequence[str]) -> list[str]:
        """Keys of all pages made from these records, with all pages behind those: what forgetting them must delete."""
        found: dict[Key, None] = {}
        for part in parts(list(dict.fromkeys(record_ids))):
            for row in self._database.query(
                f"SELECT DISTINCT key FROM lineage WHERE kind = 'page' AND record IN ({marks(part)}) ORDER BY key",
                part,
            ):
                found[bytes.fromhex(row["key"])] = None
        if not found:
            return []
        return [key.hex() for key in descendants(self._catalog.rows().values(), found)]

    def delete(self, keys: Sequence[str]) -> list[str]:
        """Delete these pages, pinned or not, and all behind them: files, then rows and lineage. Returns the keys.

        When it returns the files are gone from the disk's directory. Raises `StoreError` if a file can't be deleted;
        the rows then stay, so that it can be tried again.
        """
        asked = _unhex(keys)
        if not asked:
            return []
        with self._database.write() as connection:
            gone = descendants(self._catalog.rows().values(), asked)
            self._budget.ram.drop(gone)
            try:
                self._catalog.remove(connection, gone, durable=True)
                trained.prune(connection)
            except OSError as error:
                raise StoreError(f"a KV page in {self._folder} can't be deleted ({error}): try again") from error
        return [key.hex() for key in gone]

    def drop_unstored(self) -> int:
        """Delete pages that name a record which is not there, and all behind them; returns how many.

        Those are left by turns that ended before they were stored: no `forget` of what they say would find them. Pages
        of the last hour stay, a turn under way may store its records yet. Never raises: what fails is logged.
        """
        try:
            found = self._catalog.unstored(self._clock() - UNDER_WAY_S)
            return len(self.delete([key.hex() for key in found]))
        except StoreError as error:
            logger.warning("KV pages of turns that were never stored can't be deleted: %s", error)
            return 0

    def save(self, path: str | os.PathLike[str]) -> int:
        """Copy all sound pages and their lineage into the new folder ``path``, whole or not at all; returns how many.

        Encrypted pages stay encrypted. Trained prefixes are left out, with a warning that says how many: what they
        stand for is named by this folder's secret. Nothing deletes a saved page but you: see `saved_with`. Raises
        `InvalidInput` if the folder exists and isn't empty, `Full` if it doesn't fit.
        """
        archive.note(self._database, Path(path))
        learnt, pages = trained.names(self._database), self.entries()
        computed = [entry for entry in pages if entry.identity not in learnt]
        saved = archive.save(computed, self._catalog, Path(path), self._cipher)
        if left := {entry.identity for entry in pages} & learnt:
            logger.warning("%d trained prefixes are not saved: distil them again where the pages go", len(left))
        return saved

    def saved_with(self, record_ids: Sequence[str]) -> list[str]:
        """The folders written by `save` that hold pages made from these records, as far as they are where they were."""
        return archive.holding(self._database, record_ids)

    def restore(self, path: str | os.PathLike[str]) -> int:
        """Bring pages back that `save` wrote; returns how many are new here.

        Every file is checked in full (encrypted under another page key: as far as that is possible). Skipped are
        damaged pages, pages made from a record that was forgotten or is unknown here, all pages behind those, and what
        the budget has no room for. Raises `NotFound` if nothing was saved there, `Corrupt` or `Incompatible` for its
        list of pages.
        """
        return archive.restore(
            Path(path), self._database, self._catalog, self._budget, cipher=self._cipher, now=self._clock()
        )

    def verify(self) -> list[str]:
        """Check every byte of every page; a sentence for each file that is damaged, missing or has no row.

        Damaged files are put aside as a use of them would do; nothing else is changed. Pages under another page key are
        passed over.
        """
        return audit.verify(self._catalog, self._cipher)

    def close(self) -> None:
        """Note the last uses; afterwards every look-up is a miss and nothing is kept."""
        if not self._closed:
            self._catalog.flush_now()
            self._closed = True
            self._budget.ram.clear()
            _OPEN.discard(self)

    def renew_locks(self) -> None:
        """For a forked child: a thread that held a lock does not exist there."""
        self._catalog.renew_lock()
        self._budget.renew_locks()


_OPEN: weakref.WeakSet[PageStore] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for store in list(_OPEN):
        store.renew_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _unhex(keys: Sequence[str]) -> list[Key]:
    for key in keys:
        if not _KEY.fullmatch(key):
            raise InvalidInput(f"{key!r} is not the key of a KV page: 64 hex digits, as entries() gives them")
    return [bytes.fromhex(key) for key in keys]
