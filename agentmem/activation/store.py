"""The store of KV pages of one memory folder: which pages are handed out, kept, and deleted.

Knows budgets, tenants and lineage; knows nothing of models, prompts or what a record says. A page's rows are committed
before its file gets its name, so whatever is visible has its lineage. A page with no row or no file is a miss; a file
that fails any check is put aside and is a miss. Usable from many threads and processes: pages never change and are
named by content.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..database import Database
from ..errors import Corrupt, Incompatible, InvalidInput, StoreError
from ..types import Value
from . import archive
from .catalog import FILE, Catalog, marks, parts
from .eviction import choose, descendants
from .identity import chain, root
from .pages import Layout, NewPage, Page, stage_pages

__all__ = ["PageEntry", "PageStore", "TenantPages"]

logger = logging.getLogger("agentmem")

_KEY = re.compile(r"[0-9a-f]{64}")
#: `PageStore.bytes` hides the type's name from the annotations of its class.
Key = bytes


class PageEntry(Value):
    """One stored page. ``tokens`` is its length in tokens, ``records`` the ids of the records it was made from."""

    key: str
    identity: str
    number: int
    tokens: int
    bytes: int
    created: float
    used: float
    uses: int
    pinned: bool
    records: tuple[str, ...]


class TenantPages:
    """The pages of one tenant, as a provider sees them (`agentmem.provider.Pages`)."""

    def __init__(self, store: PageStore, salt: bytes, *, writable: bool) -> None:
        self._store = store
        self._salt = salt
        self._writable = writable

    @property
    def grid(self) -> int:
        """Tokens per page."""
        return self._store.grid

    def longest(self, identity: bytes, tokens: Sequence[int]) -> list[Page]:
        """The verified pages of the longest stored prefix of ``tokens``, in order from position 0; may be empty.

        Costs one query, and one pass over the bytes of the pages. Never raises for a page that is missing or damaged.
        """
        return self._store.longest(self._salt, identity, tokens)

    def seal(
        self,
        identity: bytes,
        tokens: Sequence[int],
        first: int,
        layers: Sequence[tuple[Any, Any]],
        records: Sequence[tuple[str, ...]],
    ) -> int:
        """Keep the full pages ``first ..`` of ``tokens``; returns how many were written.

        ``layers[i]`` is (K, V) of layer i, [kv_heads, positions, head_dim], holding positions ``first * grid ..``;
        ``records[j]`` are the records that page ``first + j`` was made from. A page made from a forgotten record,
        and all after it, are not kept. A full disk or a read-only folder is logged and gives 0. Raises `InvalidInput`
        for arrays that can't be a page.
        """
        if not self._writable:
            return 0
        return self._store.seal(self._salt, identity, tokens, first=first, layers=layers, records=records)


class PageStore:
    """All KV pages of a folder, under one byte budget.

    ``grid`` is in tokens, ``budget_bytes`` in bytes of page files. Opening it removes what a killed process
    left behind.
    """

    def __init__(
        self,
        database: Database,
        folder: Path,
        *,
        grid: int = 256,
        budget_bytes: int = 8 << 30,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not (1 <= grid <= 64 or (grid % 64 == 0 and grid <= 65536)):
            raise InvalidInput(f"a page of {grid} tokens is not possible: give a multiple of 64, up to 65536")
        self.grid = grid
        self.budget_bytes = budget_bytes
        self._database = database
        self._folder = Path(folder)
        self._catalog = Catalog(database, self._folder)
        self._clock = clock
        self._closed = False
        # Where that fails every write will say so in the log, and the chat goes on without stored pages.
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._catalog.tidy()

    # ---- what providers ask

    def view(self, salt: Key, *, writable: bool = True) -> TenantPages:
        """The pages under one tenant's salt. Another salt's pages can be neither found nor probed through it."""
        return TenantPages(self, salt, writable=writable)

    def longest(self, salt: Key, identity: Key, tokens: Sequence[int]) -> list[Page]:
        """See `TenantPages.longest`."""
        keys = chain(identity, salt, tokens, self.grid)
        pages: list[Page] = []
        if self._closed or not keys:
            return pages
        try:
            rows = self._catalog.rows(keys)
        except StoreError as error:
            logger.warning("KV pages can't be looked up, computing anew: %s", error)
            return pages
        parent = root(identity, salt, self.grid)
        for number, key in enumerate(keys):
            if key not in rows:
                break
            page = self._mapped(key)
            if page is None:
                break
            expected = (key, parent, identity, number, tuple(tokens[number * self.grid : (number + 1) * self.grid]))
            found = (page.key, page.parent, page.identity, page.number, page.tokens)
            if found != expected or page.layout != (pages[0] if pages else page).layout:
                self._catalog.put_aside(key, "it holds another page than its name says")
                break
            pages.append(page)
            parent = key
        self._catalog.touch((page.key for page in pages), self._clock())
        return pages

    def _mapped(self, key: Key) -> Page | None:
        try:
            page = Page(self._catalog.path(key))
            page.verify()
        except FileNotFoundError:
            self._catalog.tidy()
        except (Corrupt, Incompatible) as error:
            self._catalog.put_aside(key, str(error))
        except OSError as error:
            logger.warning("KV page %s can't be opened, computing anew: %s", key.hex()[:12], error)
        else:
            return page
        return None

    def seal(
        self,
        salt: Key,
        identity: Key,
        tokens: Sequence[int],
        *,
        first: int,
        layers: Sequence[tuple[Any, Any]],
        records: Sequence[tuple[str, ...]],
    ) -> int:
        """See `TenantPages.seal`."""
        keys = [root(identity, salt, self.grid), *chain(identity, salt, tokens, self.grid)]
        count = len(keys) - 1 - first
        if first < 0:
            raise InvalidInput(f"the first page to keep can't be {first}")
        if self._closed or count <= 0:
            return 0
        layout = Layout.of(layers, self.grid)
        positions = min(shape[1] for pair in layers for part in pair if (shape := memoryview(part).shape))
        if len(records) < count or positions < count * self.grid:
            raise InvalidInput(
                f"{count} pages of {self.grid} tokens are to be kept, but there are {positions} positions and the "
                f"records of {len(records)} pages"
            )
        # Pages that would have to be evicted at once to make room for their own ancestors are not written at all.
        count = min(count, self.budget_bytes // layout.page_bytes - first)
        wanted = {keys[first + 1 + i]: tuple(records[i]) for i in range(count)}
        staged: dict[Key, Path] = {}
        try:
            with self._catalog.locked(exclusive=False) as held:
                if not held:
                    logger.warning("KV pages are not kept: another process holds %s", self._folder)
                    return 0
                count = min(count, self._unforgotten(list(wanted.values())))
                rows = self._catalog.rows(wanted)
                new = {
                    keys[first + 1 + i]: NewPage(
                        identity=identity,
                        parent=keys[first + i],
                        number=first + i,
                        tokens=tokens[(first + i) * self.grid : (first + i + 1) * self.grid],
                        layers=layers,
                        at=i * self.grid,
                    )
                    for i in range(count)
                    if keys[first + 1 + i] not in rows or not self._catalog.path(keys[first + 1 + i]).exists()
                }
                staged.update(zip(new, stage_pages(self._folder, list(new.values())), strict=True))
                if count <= 0:
                    return 0
                committed = self._commit(
                    identity,
                    keys[first : first + count + 1],
                    first=first,
                    records=wanted,
                    staged=staged,
                    size=layout.page_bytes,
                )
                written = self._catalog.publish({key: staged[key] for key in committed if key in staged})
        except (OSError, StoreError) as error:
            logger.warning("KV pages could not be kept (%s); the chat goes on without them", error)
            return 0
        finally:
            for temporary in staged.values():
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
        if written:
            self._keep_budget()
        return written

    def _unforgotten(self, records: Sequence[tuple[str, ...]]) -> int:
        """How many of these pages come before the first that was made from a forgotten record."""
        ids = {record for page in records for record in page}
        forgotten = {
            row["record"]
            for part in parts(sorted(ids))
            for row in self._database.query(f"SELECT record FROM tombstones WHERE record IN ({marks(part)})", part)
        }
        for i, page in enumerate(records):
            if forgotten.intersection(page):
                return i
        return len(records)

    def _commit(
        self,
        identity: Key,
        keys: Sequence[Key],
        *,
        first: int,
        records: dict[Key, tuple[str, ...]],
        staged: dict[Key, Path],
        size: int,
    ) -> list[Key]:
        """Rows and lineage of the pages ``keys[1:]`` behind ``keys[0]``, in one transaction; which got them."""
        now = self._clock()
        with self._database.write() as connection:
            # Asked again under the write lock: a record may have been forgotten, a parent evicted, while we wrote.
            count = min(len(keys) - 1, self._unforgotten([records[key] for key in keys[1:]]))
            rows = self._catalog.rows(keys)
            done: list[Key] = []
            for i in range(count):
                parent, key = keys[i], keys[i + 1]
                if first + i > 0 and parent not in rows and parent not in done:
                    break
                if key not in rows and key not in staged:
                    break
                connection.execute(
                    "INSERT OR IGNORE INTO pages (key, identity, parent, number, bytes, created, used, uses, pinned) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, 0, 0)",
                    (key, identity, parent, first + i, size, now, now),
                )
                connection.executemany(
                    "INSERT OR IGNORE INTO lineage (kind, key, record) VALUES ('page', ?, ?)",
                    [(key.hex(), record) for record in records[key]],
                )
                done.append(key)
            self._catalog.flush(connection)
        return done

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
                identity=row.identity.hex(),
                number=row.number,
                tokens=self.grid,
                bytes=row.bytes,
                created=row.created,
                used=row.used,
                uses=row.uses,
                pinned=row.pinned,
                records=tuple(records.get(row.key.hex(), ())),
            )
            for row in sorted(self._catalog.rows().values(), key=lambda row: (row.created, row.number, row.key))
        ]

    def bytes(self) -> int:
        """Bytes of all stored pages."""
        return int(self._database.query("SELECT COALESCE(SUM(bytes), 0) AS total FROM pages")[0]["total"])

    def pin(self, keys: Sequence[str], pinned: bool = True) -> None:
        """Keep these pages whatever the budget says, and with them all pages before them; or let them go again."""
        packed = _unhex(keys)
        with self._database.write() as connection:
            connection.executemany("UPDATE pages SET pinned = ? WHERE key = ?", [(int(pinned), key) for key in packed])

    def evict(self, keys: Sequence[str] | None = None, *, bytes: int | None = None) -> int:
        """Delete pages to make room; returns how many. Pinned pages and the pages before them stay.

        With ``keys`` these and all behind them, with ``bytes`` as many as free that much (least use per rebuild cost
        first), with neither as many as the budget asks for.
        """
        chosen = None if keys is None else _unhex(keys)
        with self._database.write() as connection:
            self._catalog.flush(connection)
            rows = self._catalog.rows()
            if chosen is None:
                free = sum(row.bytes for row in rows.values()) - self.budget_bytes if bytes is None else bytes
                gone = choose(list(rows.values()), free=free, now=self._clock(), grid=self.grid)
            else:
                below = [key for key in descendants(rows.values(), chosen) if key in rows]
                among = [rows[key] for key in below]
                everything = sum(row.bytes for row in among)
                gone = choose(among, free=everything, now=self._clock(), grid=self.grid)
            self._catalog.remove(connection, gone)
        return len(gone)

    def _keep_budget(self) -> None:
        try:
            if self.bytes() > self.budget_bytes:
                self.evict()
        except (OSError, StoreError) as error:
            logger.warning("KV pages over the budget could not be removed: %s", error)

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
            try:
                self._catalog.remove(connection, gone, durable=True)
            except OSError as error:
                raise StoreError(f"a KV page in {self._folder} can't be deleted ({error}): try again") from error
        return [key.hex() for key in gone]

    def save(self, path: str | os.PathLike[str]) -> int:
        """Copy all sound pages and their lineage into the new folder ``path``, whole or not at all; returns how many.

        Raises `InvalidInput` if the folder exists and isn't empty, `Full` if it doesn't fit.
        """
        return archive.save(self.entries(), self._folder, Path(path))

    def restore(self, path: str | os.PathLike[str]) -> int:
        """Bring pages back that `save` wrote; returns how many are new here.

        Every file is checked in full. Skipped are damaged pages, pages made from a record that was forgotten or is
        unknown here, all pages behind those, and what the budget has no room for. Raises `NotFound` if nothing was
        saved there, `Corrupt` or `Incompatible` for its list of pages.
        """
        saved = archive.load(Path(path))
        restored = 0
        for entry, file in saved:
            key, parent = bytes.fromhex(entry.key), bytes.fromhex(entry.parent)
            if self.bytes() + entry.bytes > self.budget_bytes:
                logger.warning("no room in the budget of %d bytes for all saved KV pages", self.budget_bytes)
                break
            with self._catalog.locked(exclusive=False) as held:
                if not held:
                    raise StoreError(f"another process holds {self._folder}: try again")
                if key in self._catalog.rows([key]) and self._catalog.path(key).exists():
                    continue
                temporary = archive.fetch(entry, file, self._folder)
                if temporary is None:
                    continue
                try:
                    restored += self._adopt(entry, key, parent, temporary)
                finally:
                    temporary.unlink(missing_ok=True)
        return restored

    def _adopt(self, entry: archive.Saved, key: Key, parent: Key, temporary: Path) -> int:
        now = self._clock()
        with self._database.write() as connection:
            known = {
                row["id"]
                for part in parts(entry.records)
                for row in self._database.query(
                    f"SELECT id FROM records WHERE id IN ({marks(part)}) AND id NOT IN (SELECT record FROM tombstones)",
                    part,
                )
            }
            if known != set(entry.records) or (entry.number > 0 and parent not in self._catalog.rows([parent])):
                return 0
            connection.execute(
                "INSERT OR IGNORE INTO pages (key, identity, parent, number, bytes, created, used, uses, pinned) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?)",
                (key, bytes.fromhex(entry.identity), parent, entry.number, entry.bytes, now, now, int(entry.pinned)),
            )
            connection.executemany(
                "INSERT OR IGNORE INTO lineage (kind, key, record) VALUES ('page', ?, ?)",
                [(entry.key, record) for record in entry.records],
            )
        return self._catalog.publish({key: temporary})

    def verify(self) -> list[str]:
        """Check every byte of every page; a sentence for each file that is damaged, missing or has no row.

        Damaged files are put aside as a use of them would do; nothing else is changed.
        """
        problems: list[str] = []
        rows = self._catalog.rows()
        for key, row in rows.items():
            name = self._catalog.path(key).name
            try:
                page = Page(self._catalog.path(key))
                page.verify()
                if (page.key, page.parent, page.identity, page.number) != (key, row.parent, row.identity, row.number):
                    raise Corrupt(f"{name} holds another page than its name says")
            except FileNotFoundError:
                # Deleted since we asked, or really missing?
                if key in self._catalog.rows([key]):
                    problems.append(f"pages/{name} is missing")
            except (Corrupt, Incompatible) as error:
                problems.append(f"pages/{error}")
                self._catalog.put_aside(key, str(error))
            except OSError as error:
                problems.append(f"pages/{name} can't be opened ({error.strerror})")
        for entry in self._catalog.listing():
            match = FILE.fullmatch(entry)
            if match is None:
                problems.append(f"pages/{entry} is not a file of this store")
            elif match[2] == ".page":
                key = bytes.fromhex(match[1])
                # Asked again: it may have been added or deleted since we began.
                if key not in rows and key not in self._catalog.rows([key]):
                    problems.append(f"pages/{entry} belongs to no stored page")
        return sorted(problems)

    def close(self) -> None:
        """Note the last uses; afterwards every look-up is a miss and nothing is kept."""
        if not self._closed:
            with contextlib.suppress(StoreError):
                self._catalog.flush_now()
            self._closed = True


def _unhex(keys: Sequence[str]) -> list[Key]:
    for key in keys:
        if not _KEY.fullmatch(key):
            raise InvalidInput(f"{key!r} is not the key of a KV page: 64 hex digits, as entries() gives them")
    return [bytes.fromhex(key) for key in keys]
