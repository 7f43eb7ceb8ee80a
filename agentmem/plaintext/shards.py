"""One tenant's vectors: what the table ``vectors`` holds, and how it is held for searching, in RAM and in a base.

Knows how a shard is read, opened from files, kept free of what changed, and compared with the database. Knows nothing
of queries or of when files are written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agentmem.database import Database

from . import ivf
from .catalog import changes_since
from .exact import Exact, Owners

if TYPE_CHECKING:
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.int64]
    Parts = npt.NDArray[np.int32]

__all__ = ["Shard", "Stored", "pieces"]

log = logging.getLogger("agentmem")

#: Vectors read in one statement.
CHUNK = 8192


def pieces(seqs: Rows) -> Iterator[Rows]:
    """Row numbers in runs of `CHUNK`: what a statement holds of the database's lock is bounded."""
    for first in range(0, len(seqs), CHUNK):
        yield seqs[first : first + CHUNK]


class Shard:
    """The vectors of one tenant: a base in files, if there is one, and all others in RAM."""

    def __init__(self, dimension: int) -> None:
        self.exact = Exact(dimension)
        self.base: ivf.Base | None = None
        self.manifest: dict[str, Any] = {}
        self.touched: set[int] = set()  # records of the base that changed since it was made
        self.owners = Owners()

    def remove(self, seqs: Rows) -> None:
        """Have these records' vectors not be found any more."""
        self.exact.remove(seqs)
        if self.base is not None and len(self.base):
            self.base.remove(seqs)
            self.touched.update(seqs[seqs <= self.base.seq[-1]].tolist())

    def count(self) -> int:
        """How many vectors can be found."""
        return len(self.exact) + (0 if self.base is None else int(np.count_nonzero(~self.base.gone)))

    def wants_base(self, exact: int, share: int) -> bool:
        """Whether more is compared one by one than ``exact`` and than one part of ``share`` of the base."""
        held = 0 if self.base is None else len(self.base)
        return len(self.exact) > max(exact, held // share)

    def agrees(self, stored: Stored, tenant: str) -> bool:
        """Whether this is what the database has of the tenant: the same passages, the same numbers as far as in RAM."""
        seen = 0
        for some in pieces(stored.of(tenant)):
            seq, part, vectors = stored.read(some)
            held = self.exact.held(self.exact.rows(some))
            known = np.zeros(len(seq), bool)
            if self.base is not None:
                rows = self.base.rows(some)
                pairs = set(zip(self.base.seq[rows].tolist(), self.base.part[rows].tolist(), strict=True))
                known = np.array([pair in pairs for pair in zip(seq.tolist(), part.tolist(), strict=True)], bool)
                if np.count_nonzero(known) != len(rows):
                    return False
            new = ~known
            same = np.array_equal(seq[new], held[0]) and np.array_equal(part[new], held[1])
            if not same or not np.array_equal(vectors[new], held[2]):
                return False
            seen += len(seq)
        return seen == self.count()


class Stored:
    """The vectors of one embedding space as the database has them."""

    def __init__(self, database: Database, space: int, dimension: int) -> None:
        self._database, self._space, self._dimension = database, space, dimension

    def read(self, seqs: Rows) -> tuple[Rows, Parts, Vectors]:
        """(seq, part, vector) of all passages of these records, in the order of ``seqs``."""
        return self._arrays(
            self._database.query(
                "SELECT seq, part, vector, checksum FROM json_each(?) AS wanted CROSS JOIN vectors "
                "ON space = ? AND seq = wanted.value ORDER BY wanted.key, part",
                (json.dumps(seqs.tolist()), self._space),
            )
        )

    def _arrays(self, rows: list[Any]) -> tuple[Rows, Parts, Vectors]:
        size = 4 * self._dimension
        good = [
            row for row in rows if isinstance(row[2], bytes) and len(row[2]) == size and zlib.crc32(row[2]) == row[3]
        ]
        if len(good) < len(rows):
            log.warning("%d vectors are damaged and left out of the index: run verify()", len(rows) - len(good))
        vectors = np.frombuffer(b"".join([row[2] for row in good]), "<f4").reshape(-1, self._dimension)
        return np.array([row[0] for row in good], np.int64), np.array([row[1] for row in good], np.int32), vectors

    def of(self, tenant: str, after: int = 0) -> Rows:
        """The records of a tenant that have vectors, those behind ``after``, ascending."""
        rows = self._database.query(
            "SELECT DISTINCT seq FROM vectors JOIN records USING (seq) WHERE space = ? AND seq > ? AND tenant = ?",
            (self._space, after, tenant),
        )
        return np.sort(np.fromiter((row[0] for row in rows), np.int64, len(rows)))

    def name(self, tenant: str) -> str:
        """A tenant's name never becomes a path: it is hashed."""
        return hashlib.sha256(json.dumps([self._space, tenant]).encode()).hexdigest()[:32]

    def origin(self, change: tuple[int, int]) -> dict[str, Any]:
        """What a manifest says of where its base comes from."""
        digest = self._database.query("SELECT digest FROM spaces WHERE id = ?", (self._space,))[0][0]
        return {"digest": digest, "dimension": self._dimension, "change": change[0], "nonce": change[1]}

    def _opened(self, tenant: str, folder: Path | None) -> Shard | None:
        """A shard with the base of the tenant's files, caught up with the database; None if there is none that fits."""
        if folder is None or not folder.is_dir() or not ivf.faiss_works():
            return None
        name = self.name(tenant)
        try:
            manifest = ivf.read_manifest(folder, name)
            if manifest is None:
                return None
            change = (int(manifest["change"]), int(manifest["nonce"]))
            if {**manifest, **self.origin(change)} != manifest:
                raise ValueError("it belongs to another embedder")
            changes = changes_since(self._database, change)
            if changes is None:
                raise ValueError("it belongs to another history of the database, or to one too long ago")
            shard = Shard(self._dimension)
            shard.base, shard.manifest = ivf.open_base(folder, manifest, self._dimension), manifest
            shard.touched.update(manifest["gone"])
            shard.remove(np.unique(np.array([row[2] for row in changes if row[1] == tenant], np.int64)))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            log.warning("an index file is not used (%s): it will be made anew from the database", error)
            return None
        return shard

    def shard(self, tenant: str, folder: Path | None) -> Shard:
        """The tenant's vectors as of now: with a base from ``folder``, if there is one that fits, or all in RAM."""
        shard = self._opened(tenant, folder)
        after = 0
        if shard is None:
            shard = Shard(self._dimension)
        elif shard.base is not None:
            after = int(shard.base.seq[-1])
            for some in pieces(np.array(sorted(shard.touched), np.int64)):
                shard.exact.add(*self.read(some))
        for some in pieces(self.of(tenant, after)):
            shard.exact.add(*self.read(some))
        return shard
