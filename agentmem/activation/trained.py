"""Trained prefixes as pages: states that were learnt to stand for the head of a prompt, kept beside computed ones.

Knows how they are named, found and listed; knows nothing of models, of how they are trained or of when one is good
enough (the caller keeps only those). Budget, lineage, `forget`, quarantine, encryption and the tenant's salt are those
of every page. What is found is exactly what was kept, whole, or nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..database import Database
from ..errors import InvalidInput, StoreError
from .identity import digest, token_bytes
from .pages import Page
from .tenant import TenantPages

if TYPE_CHECKING:
    from .store import PageStore

__all__ = ["StoredPrefix", "TrainedPages", "base_of", "names", "prune"]

logger = logging.getLogger("agentmem")

#: All rows of the table ``meta`` that name a trained prefix begin so.
_NAME = "trained prefix "


@dataclass(frozen=True)
class StoredPrefix:
    """A trained prefix that is kept: ``tokens`` positions for a head of ``stands_for`` tokens, made from ``records``.

    ``digest`` is of its states and of what they stand for, under which model. ``pages`` hold them, in order; the last
    one may be filled up with more. ``report`` is what its keeper noted.
    """

    digest: str
    tokens: int
    stands_for: int
    records: tuple[str, ...]
    report: dict[str, Any]
    pages: tuple[Page, ...] = ()

    @property
    def bytes(self) -> int:
        """Of its states as they are held."""
        return sum(len(page.data) for page in self.pages)


class TrainedPages:
    """One tenant's trained prefixes (`agentmem.provider.PrefixPages`); ``pages`` is its view with a grid of `GRID`."""

    #: Positions of a page. Few, so that a prefix can have the length that it needs; they are copied, not read in place.
    GRID = 16

    def __init__(self, pages: TenantPages, store: PageStore, database: Database, tenant: str) -> None:
        self._pages = pages
        self._store = store
        self._database = database
        # The same words that the tenant's pages are salted with, so that no tenant's rows are read for another.
        self._prefix = f"{_NAME}{hashlib.sha256(tenant.encode()).hexdigest()[:32]} "

    @property
    def lossy(self) -> bool:
        """Whether what is kept are other bits than what was given: then judge what `settled` returns."""
        return self._pages.lossy

    def settled(self, layers: Sequence[tuple[Any, Any]]) -> list[Any]:
        """Encode the states, which are writable, for `keep`; the arrays then hold what will be found again."""
        length = layers[0][0].shape[1]
        _check(length, self.GRID)
        return [self._pages.encode(layers, at) for at in range(0, length, self.GRID)]

    def keep(
        self,
        base: bytes,
        head: Sequence[int],
        layers: Sequence[tuple[Any, Any]],
        *,
        encoded: Sequence[Any],
        records: Sequence[str],
        report: Mapping[str, Any],
        seconds: float,
        owner: str,
    ) -> StoredPrefix | None:
        """Keep states that stand for ``head`` under the model ``base``; None where they could not be kept (logged).

        ``layers[i]`` is (K, V) of layer i, [KV heads, positions, dim], in whole pages of `GRID`; ``encoded`` is what
        `settled` gave for them. They are pinned: unlike computed states they can't be had again in a moment. What was
        kept for the same ``owner``, an opaque string, goes. Those of a forgotten record are not kept. Raises
        `InvalidInput` for states that make no whole pages.
        """
        length = layers[0][0].shape[1]
        _check(length, self.GRID)
        stands = _stands(head)
        content = hashlib.sha256()
        for part in (side for pair in layers for side in pair):
            content.update(memoryview(part).cast("B") if part.flags.c_contiguous else part.tobytes())
        own = digest({"trained": base, "stands for": stands, "content": content.digest(), "tokens": length})
        count = length // self.GRID
        self._pages.seal(
            own,
            [0] * length,
            0,
            layers,
            [tuple(records)] * count,
            encoded=encoded if self._pages.lossy else None,
            seconds=seconds,
        )
        pages = self._found(own, length)
        if not pages:
            logger.warning("a trained prefix of %d positions could not be kept: see the log above", length)
            return None
        row = {
            "base": base.hex(),
            "head": stands.hex(),
            "tokens": length,
            "stands_for": len(head),
            "records": list(records),
            "created": time.time(),
            "owner": owner,
            "report": dict(report),
        }
        with self._database.write() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (self._prefix + own.hex(), json.dumps(row)))
        self._store.pin([page.name.hex() for page in pages])
        for name, other in self._rows():
            if other["owner"] == owner and other["base"] == row["base"] and name != own.hex():
                self.drop(name)
        return _stored(own.hex(), row, pages)

    def find(self, base: bytes, tokens: Sequence[int]) -> StoredPrefix | None:
        """The trained prefix of the longest head that ``tokens`` begin with, under the model ``base``. Never raises."""
        rows = [(name, row) for name, row in self._rows() if row["base"] == base.hex()]
        rows.sort(key=lambda named: -named[1]["stands_for"])
        heads: dict[int, str] = {}
        for name, row in rows:
            length = row["stands_for"]
            if length > len(tokens):
                continue
            if length not in heads:
                heads[length] = _stands(tokens[:length]).hex()
            if heads[length] == row["head"] and (pages := self._found(bytes.fromhex(name), row["tokens"])):
                return _stored(name, row, pages)
        return None

    def entries(self) -> list[StoredPrefix]:
        """All of this tenant that are whole, newest first."""
        kept: list[StoredPrefix] = []
        for name, row in self._rows():
            pages = self._found(bytes.fromhex(name), row["tokens"])
            if pages:
                kept.append(_stored(name, row, pages))
        return kept

    def drop(self, name: str) -> list[str]:
        """Delete the prefix with this digest; the keys of its pages. Nothing where there is none."""
        row = dict(self._rows()).get(name)
        if row is None:
            return []
        gone = self._store.delete([page.name.hex() for page in self._found(bytes.fromhex(name), row["tokens"])])
        with self._database.write() as connection:
            connection.execute("DELETE FROM meta WHERE key = ?", (self._prefix + name,))
        return gone

    def _found(self, own: bytes, length: int) -> tuple[Page, ...]:
        pages = tuple(self._pages.longest(own, [0] * length))
        return pages if len(pages) == length // self.GRID else ()

    def _rows(self) -> list[tuple[str, dict[str, Any]]]:
        """(digest, row) of this tenant's, newest first."""
        try:
            found = self._database.query(
                "SELECT key, value FROM meta WHERE key > ? AND key < ?", (self._prefix, self._prefix + "~")
            )
            rows = [(row["key"][len(self._prefix) :], json.loads(row["value"])) for row in found]
            return sorted(rows, key=lambda named: -named[1]["created"])
        except (StoreError, ValueError) as error:
            logger.warning("trained prefixes can't be looked up: %s", error)
            return []


def base_of(content: bytes, dtype: str) -> bytes:
    """What a trained prefix is kept under: the digest of a model's files without any LoRA, and the dtype of its states.

    Neither device nor threads nor versions are in it, as they are in the identity of computed states: these are weights
    that were learnt, and serve wherever the model does."""
    return digest({"base": content, "dtype": dtype})


def names(database: Database) -> set[str]:
    """The digests of all trained prefixes, of any tenant: the identities of their pages."""
    rows = database.query("SELECT substr(key, -64) AS name FROM meta WHERE key > ? AND key < ?", (_NAME, _NAME + "~"))
    return {row["name"] for row in rows}


def prune(connection: sqlite3.Connection) -> None:
    """Remove what is noted of prefixes, of any tenant, whose pages are gone."""
    connection.execute(
        "DELETE FROM meta WHERE key > ? AND key < ?"
        " AND substr(key, -64) NOT IN (SELECT lower(hex(identity)) FROM pages)",
        (_NAME, _NAME + "~"),
    )


def _check(length: int, grid: int) -> None:
    if length < grid or length % grid:
        raise InvalidInput(f"a trained prefix of {length} positions can't be kept: give a multiple of {grid}")


def _stands(head: Sequence[int]) -> bytes:
    return hashlib.sha256(b"agentmem head 1\0" + token_bytes(head)).digest()


def _stored(name: str, row: Mapping[str, Any], pages: tuple[Page, ...]) -> StoredPrefix:
    return StoredPrefix(
        digest=name,
        tokens=row["tokens"],
        stands_for=row["stands_for"],
        records=tuple(row["records"]),
        report=row["report"],
        pages=pages,
    )
