"""Keeping new pages: written aside, entered with their lineage in one transaction, and only then given their names.

Knows the order of these steps and what may break between them; knows nothing of look-ups or of which pages are worth
keeping (budget.py does).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..database import Database
from ..errors import InvalidInput, StoreError
from .budget import Budget
from .catalog import Catalog
from .cipher import PageCipher
from .eviction import PageRow
from .identity import chain, root
from .pages import LOSSY, Codec, Encoded, Layout, NewPage, stage_pages

__all__ = ["PageWriter"]

logger = logging.getLogger("agentmem")


@dataclass(frozen=True)
class _Plan:
    """The pages that one seal may add: ``keys[0]`` is the parent of the first, ``names`` what the store calls them."""

    identity: bytes
    first: int
    grid: int
    keys: list[bytes]
    names: list[bytes]
    records: dict[bytes, tuple[str, ...]]
    codec: Codec


class PageWriter:
    """Writes the pages of one folder."""

    def __init__(
        self,
        database: Database,
        catalog: Catalog,
        budget: Budget,
        *,
        grid: int,
        codec: Codec,
        cipher: PageCipher | None,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._catalog = catalog
        self._budget = budget
        self._grid = grid
        self._codec: Codec = codec
        self._cipher = cipher
        self._clock = clock

    def seal(
        self,
        salt: bytes,
        identity: bytes,
        tokens: Sequence[int],
        *,
        grid: int,
        first: int,
        layers: Sequence[tuple[Any, Any]],
        records: Sequence[tuple[str, ...]],
        encoded: Sequence[Encoded | None] | None = None,
        seconds: float | None = None,
    ) -> int:
        """See `TenantPages.seal`; how many pages were written."""
        if first < 0:
            raise InvalidInput(f"the first page to keep can't be {first}")
        keys = [root(identity, salt, grid), *chain(identity, salt, tokens, grid)][first:]
        count = len(keys) - 1
        if count <= 0:
            return 0
        ready = self._ready(encoded, count, grid)
        layout = ready[0].layout if ready else Layout.of(layers, grid)
        positions = count * grid if ready else min(_positions(layers))
        if len(records) < count or positions < count * grid:
            raise InvalidInput(
                f"{count} pages of {grid} tokens are to be kept, but there are {positions} positions and the "
                f"records of {len(records)} pages"
            )
        if seconds is not None:
            self._budget.costs.computed(identity, first, count, seconds, grid=self._noted(grid))
        # Pages that would have to be evicted at once to make room for their own ancestors are not written at all.
        count = min(count, self._budget.total // self._least_bytes(layout, ready) - first)
        if count <= 0:
            return 0
        names = keys if self._cipher is None else [self._cipher.name(key) for key in keys]
        wanted = dict(zip(names[1:], (tuple(ids) for ids in records), strict=False))
        plan = _Plan(identity, first, grid, keys[: count + 1], names[: count + 1], wanted, self._codec)
        staged: dict[bytes, Path] = {}
        try:
            with self._catalog.locked(exclusive=False) as held:
                if not held:
                    logger.warning("KV pages are not kept: another process holds %s", self._catalog.folder)
                    return 0
                new = self._new(plan, tokens, layers, ready)
                files = stage_pages(self._catalog.folder, list(new.values()), cipher=self._cipher)
                staged.update(zip(new, files, strict=True))
                committed = self._commit(plan, {name: file.stat().st_size for name, file in staged.items()})
                return self._catalog.publish({name: staged[name] for name in committed if name in staged})
        except (OSError, StoreError) as error:
            logger.warning("KV pages could not be kept (%s); the chat goes on without them", error)
            return 0
        finally:
            for temporary in staged.values():
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)

    def _ready(self, encoded: Sequence[Encoded | None] | None, count: int, grid: int) -> list[Encoded]:
        """The pages as the caller had them encoded; none for a codec that changes nothing, if the caller had not."""
        ready = [page for page in encoded or () if isinstance(page, Encoded)]
        if self._codec not in LOSSY and not ready:
            return []
        if len(ready) < count:
            raise InvalidInput(
                f"{count} pages are to be kept with the codec {self._codec}, but {len(ready)} of them are encoded: "
                "give what encode() returned for each, so that the live run went on with what is stored"
            )
        for page in ready:
            if page.codec != self._codec or page.layout != ready[0].layout or page.layout.grid != grid:
                raise InvalidInput(f"a page of another store can't be kept ({page.codec}, {page.layout.grid} tokens)")
        return ready

    def _noted(self, grid: int) -> int:
        """As `PageRow` holds it."""
        return 0 if grid == self._grid else grid

    def _least_bytes(self, layout: Layout, ready: Sequence[Encoded]) -> int:
        """No page of this layout has fewer bytes in its file."""
        if ready:
            return min(len(page.body) for page in ready)
        # What the exact codecs gain is in the file's own size, known once it is written; more than half it never is.
        return layout.page_bytes if self._codec == "raw" else layout.page_bytes // 2

    def _new(
        self, plan: _Plan, tokens: Sequence[int], layers: Sequence[tuple[Any, Any]], ready: Sequence[Encoded]
    ) -> dict[bytes, NewPage]:
        """What is to be written: the pages that are not stored yet, up to the first of a forgotten record."""
        count = self._unforgotten([plan.records[name] for name in plan.names[1:]])
        rows = self._catalog.rows(plan.names[1:])
        grid = plan.grid
        new: dict[bytes, NewPage] = {}
        for i, name in enumerate(plan.names[1 : count + 1]):
            number = plan.first + i
            if name in rows and self._catalog.path(name).exists():
                continue
            new[name] = NewPage(
                identity=plan.identity,
                parent=plan.keys[i],
                number=number,
                tokens=tokens[number * grid : (number + 1) * grid],
                layers=layers,
                at=i * grid,
                codec=plan.codec,
                encoded=ready[i] if ready else None,
            )
        return new

    def _unforgotten(self, records: Sequence[tuple[str, ...]]) -> int:
        """How many of these pages come before the first that was made from a forgotten record."""
        forgotten = self._catalog.forgotten(record for page in records for record in page)
        for i, page in enumerate(records):
            if forgotten.intersection(page):
                return i
        return len(records)

    def _commit(self, plan: _Plan, sizes: dict[bytes, int]) -> list[bytes]:
        """Rows and lineage, in one transaction that also makes the room; which pages got them."""
        now = self._clock()
        with self._database.write() as connection:
            # Asked again under the write lock: a record may have been forgotten, a parent evicted, while we wrote.
            count = self._unforgotten([plan.records[name] for name in plan.names[1:]])
            rows = self._catalog.rows(plan.names)
            growth = {
                name: sizes[name] - (rows[name].bytes if name in rows else 0)
                for name in plan.names[1 : count + 1]
                if name in sizes
            }
            room = self._budget.make_room(connection, sum(growth.values()), spare=set(plan.names))
            done: list[bytes] = []
            for i in range(count):
                parent, name = plan.names[i], plan.names[i + 1]
                if plan.first + i > 0 and parent not in rows and parent not in done:
                    break
                if (name not in rows and name not in sizes) or growth.get(name, 0) > room:
                    break
                room -= growth.get(name, 0)
                row = PageRow(
                    key=name,
                    identity=plan.identity,
                    parent=parent,
                    number=plan.first + i,
                    bytes=sizes[name] if name in sizes else rows[name].bytes,
                    created=now,
                    used=now,
                    uses=0,
                    pinned=False,
                    codec=plan.codec,
                    grid=self._noted(plan.grid),
                )
                self._catalog.insert(connection, row, plan.records[name], replace=name in sizes)
                done.append(name)
            self._catalog.flush(connection)
            self._budget.files = self._catalog.bytes_of_files()
            self._budget.displace_for_refused(connection, spare=set(plan.names))
        return done


def _positions(layers: Sequence[tuple[Any, Any]]) -> list[int]:
    return [shape[1] for pair in layers for part in pair if (shape := memoryview(part).shape)]
