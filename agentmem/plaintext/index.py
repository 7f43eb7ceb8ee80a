"""The vector index of one folder and one embedding space: FAISS, derived from the table ``vectors`` and never trusted.

Knows how to stay in step with the database (it replays the table ``changes``), how to keep its files and when to throw
them away. Knows nothing of texts or scopes: what may be found comes in as a set of rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import threading
import zlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agentmem.database import Database
from agentmem.errors import Incompatible, InvalidInput, StoreError

if TYPE_CHECKING:
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.int64]

__all__ = ["VectorIndex", "open_space"]

log = logging.getLogger("agentmem")

FORMAT = 1
#: Below this many allowed rows, reading their vectors one by one beats a scan of the whole index with a filter.
FEW = 512
#: Changes after which the files are written without waiting for `VectorIndex.close`.
MANY = 20_000


def open_space(database: Database, name: str, digest: str, dimension: int) -> int:
    """The number of the embedding space with this digest, made if it is new. Two spaces are never mixed."""
    with database.write() as connection:
        connection.execute(
            "INSERT INTO spaces (name, digest, dimension) VALUES (?, ?, ?) ON CONFLICT (digest) DO NOTHING",
            (name, digest, dimension),
        )
        row = connection.execute("SELECT id, dimension FROM spaces WHERE digest = ?", (digest,)).fetchone()
    was = int(row["dimension"])
    if was != dimension:
        raise Incompatible(f"embedder {name!r} had {was} dimensions when this memory was made, now it has {dimension}")
    return int(row["id"])


class VectorIndex:
    """Nearest vectors by inner product, exact, one FAISS index per tenant, in RAM.

    Every call first catches up with what any process has committed, so a deleted vector is never returned and an added
    one is found at once. Files lie in ``folder`` (None: none are kept); a missing, damaged or stale one is rebuilt and
    that is logged. Must not be called inside a `Database.write` block: it would learn what may be undone.
    """

    def __init__(self, database: Database, folder: str | os.PathLike[str] | None, space: int, dimension: int) -> None:
        self._database = database
        self._folder = None if folder is None or database.path == ":memory:" else Path(folder)
        self._space = space
        self._dimension = dimension
        self._lock = threading.RLock()
        self._tenants: dict[str, Any] = {}
        self._change = (0, 0)  # the number and nonce of the last change that is in every loaded tenant
        self._unsaved = 0

    def search(self, vector: Vectors, k: int, allowed: Mapping[str, Rows]) -> tuple[Rows, Vectors]:
        """The best ``k`` of the ``allowed`` rows (by tenant), best first: rows int64 [n] and scores float32 [n]."""
        query = self._query(vector)
        rows, scores = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        with self._lock:
            self._catch_up()
            for tenant, some in allowed.items():
                found = self._tenant(tenant).search(query, k, np.asarray(some, np.int64))
                rows.append(found[0])
                scores.append(found[1])
            if self._unsaved >= MANY:
                self.save()
        row, score = np.concatenate(rows), np.concatenate(scores)
        best = np.argsort(-score, kind="stable")[:k]
        return row[best], score[best]

    def scores(self, vector: Vectors, rows: Mapping[str, Rows]) -> dict[int, float]:
        """The score of each of these rows (by tenant) that has a vector."""
        query = self._query(vector)
        found: dict[int, float] = {}
        with self._lock:
            self._catch_up()
            for tenant, some in rows.items():
                known, vectors = self._tenant(tenant).vectors(np.asarray(some, np.int64))
                found.update(zip(known.tolist(), (vectors @ query).tolist(), strict=True))
        return found

    def count(self, tenant: str = "") -> int:
        """How many vectors this tenant has."""
        with self._lock:
            self._catch_up()
            return int(self._tenant(tenant).count)

    def save(self) -> None:
        """Write the files of the tenants in use. A full disk or a locked database is logged: the files are derived."""
        try:
            with self._lock:
                self._write_files()
        except (OSError, StoreError) as error:
            log.warning("the vector index was not saved and will be rebuilt from the database: %s", error)

    def close(self) -> None:
        """Save what changed and let go of the memory."""
        if self._unsaved:
            self.save()
        with self._lock:
            self._tenants.clear()
            self._change, self._unsaved = (0, 0), 0

    def rewrite(self) -> None:
        """After an erasure: leave no file that holds a vector the database no longer has.

        Files of tenants in use are written anew, the others are removed (they are rebuilt when they are needed). Raises
        `StoreError` where that fails, since something forgotten may still be readable then.
        """
        if self._folder is None or not self._folder.is_dir():
            return
        try:
            with self._lock:
                kept = self._write_files()
                for path in self._folder.iterdir():
                    if path.name not in kept:
                        path.unlink(missing_ok=True)
                _sync_folder(self._folder)
        except OSError as error:
            raise StoreError(
                f"old files of the vector index in {self._folder} could not be replaced: {error}"
            ) from error

    def verify(self) -> list[str]:
        """Where the index differs from the database, in RAM or on disk, one line each; empty if all is well."""
        problems = []
        tenants = [row[0] for row in self._database.query("SELECT DISTINCT tenant FROM records")]
        with self._lock:
            self._catch_up()
            for tenant in tenants:
                change, rows, vectors = self._stored(tenant)
                if change != self._change:
                    self._catch_up()
                    change, rows, vectors = self._stored(tenant)
                held = self._tenant(tenant)
                known, ours = held.vectors(rows)
                if held.count != len(rows) or len(known) != len(rows) or not np.array_equal(ours, vectors):
                    problems.append(f"the vector index of tenant {tenant!r} does not fit the database")
                path, manifest = self._paths(tenant)
                if manifest is not None and manifest.exists() and self._read(tenant) is None:
                    problems.append(f"{path} is damaged or stale")
        return problems

    def _query(self, vector: Vectors) -> Vectors:
        query = np.ascontiguousarray(vector, np.float32).reshape(-1)
        if query.shape != (self._dimension,) or not np.isfinite(query).all():
            raise InvalidInput(
                f"a query vector needs {self._dimension} finite numbers, not the shape {np.shape(vector)}"
            )
        return query

    def _catch_up(self) -> None:
        """Bring every loaded tenant up to the last committed change."""
        if not self._tenants:
            self._change = self._last_change()
            return
        number, nonce = self._change
        changes = self._database.query("SELECT * FROM changes WHERE change >= ? ORDER BY change", (number,))
        if number and (not changes or (changes[0]["change"], changes[0]["nonce"]) != (number, nonce)):
            log.info("the vector index is behind the database by too much or belongs to another one: rebuilding it")
            self._tenants.clear()
            self._change = self._last_change()
            return
        for tenant, held in self._tenants.items():
            self._apply(
                held,
                [(row["seq"], row["added"]) for row in changes if row["tenant"] == tenant and row["change"] > number],
            )
        if changes:
            self._unsaved += changes[-1]["change"] - number
            self._change = changes[-1]["change"], changes[-1]["nonce"]

    def _apply(self, held: Any, changes: Iterable[tuple[int, int]]) -> None:
        final = dict(changes)
        if not final:
            return
        held.remove(np.fromiter(final, np.int64))
        added = json.dumps([seq for seq, added in final.items() if added])
        rows = self._database.query(
            "SELECT seq, vector, checksum FROM vectors WHERE space = ? AND seq IN (SELECT value FROM json_each(?))",
            (self._space, added),
        )
        held.add(*self._arrays(rows))

    def _arrays(self, rows: list[Any]) -> tuple[Rows, Vectors]:
        size = 4 * self._dimension
        good = [row for row in rows if len(row["vector"]) == size and zlib.crc32(row["vector"]) == row["checksum"]]
        if len(good) < len(rows):
            log.warning("%d vectors are damaged and left out of the index: run verify()", len(rows) - len(good))
        seqs = np.array([row["seq"] for row in good], np.int64)
        vectors = np.frombuffer(b"".join(row["vector"] for row in good), "<f4").reshape(-1, self._dimension)
        return seqs, vectors

    def _last_change(self) -> tuple[int, int]:
        rows = self._database.query("SELECT change, nonce FROM changes ORDER BY change DESC LIMIT 1")
        return (rows[0]["change"], rows[0]["nonce"]) if rows else (0, 0)

    def _stored(self, tenant: str) -> tuple[tuple[int, int], Rows, Vectors]:
        """The tenant's vectors from the database, and a change that is certainly in them."""
        change = self._last_change()
        rows = self._database.query(
            "SELECT v.seq, v.vector, v.checksum FROM vectors v JOIN records r ON r.seq = v.seq "
            "WHERE v.space = ? AND r.tenant = ? ORDER BY v.seq",
            (self._space, tenant),
        )
        return change, *self._arrays(rows)

    def _tenant(self, tenant: str) -> Any:
        """The tenant's index, as of `_change`: in RAM already, or from its file, or built."""
        if tenant not in self._tenants:
            held = self._read(tenant)
            if held is None:
                _, rows, vectors = self._stored(tenant)
                held = _flat(self._dimension)
                held.add(rows, vectors)
                self._unsaved += len(rows)
            self._tenants[tenant] = held
        return self._tenants[tenant]

    def _paths(self, tenant: str) -> tuple[Path | None, Path | None]:
        """(index file, manifest). A tenant's name never becomes a path: it is hashed."""
        if self._folder is None:
            return None, None
        name = hashlib.sha256(json.dumps([self._space, tenant]).encode()).hexdigest()[:32]
        return self._folder / f"{name}.faiss", self._folder / f"{name}.json"

    def _read(self, tenant: str) -> Any:
        """The tenant's index from its file, caught up with the database; None if there is none that fits."""
        path, manifest_path = self._paths(tenant)
        if path is None or manifest_path is None or not hasattr(_flat(self._dimension), "dumped"):
            return None
        try:
            manifest = json.loads(manifest_path.read_bytes())
            data = path.read_bytes()
            change = (manifest["change"], manifest["nonce"])
            if manifest != self._manifest(data, change, manifest["count"]):
                raise ValueError("it does not fit its manifest")
            changes = self._database.query(
                "SELECT change, nonce, tenant, seq, added FROM changes WHERE change >= ? ORDER BY change", (change[0],)
            )
            if change[0] and (not changes or (changes[0]["change"], changes[0]["nonce"]) != change):
                raise ValueError("it belongs to another history of the database")
            held = _flat(self._dimension, data)
            if held.count != manifest["count"]:
                raise ValueError("it holds another number of vectors than its manifest says")
            self._apply(
                held, [(c["seq"], c["added"]) for c in changes if c["tenant"] == tenant and c["change"] > change[0]]
            )
            stored = self._database.query(
                "SELECT count(*) FROM vectors v JOIN records r ON r.seq = v.seq WHERE v.space = ? AND r.tenant = ?",
                (self._space, tenant),
            )[0][0]
            if held.count != stored:
                raise ValueError(f"it holds {held.count} vectors, the database {stored}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            log.warning("the index file %s is not used (%s): rebuilding it from the database", path.name, error)
            return None
        return held

    def _manifest(self, data: bytes, change: tuple[int, int], count: int) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "space": self._space,
            "digest": self._database.query("SELECT digest FROM spaces WHERE id = ?", (self._space,))[0]["digest"],
            "dimension": self._dimension,
            "change": change[0],
            "nonce": change[1],
            "count": count,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    def _write_files(self) -> set[str]:
        """Write every loaded tenant's file and manifest; returns the names of the files written."""
        names: set[str] = set()
        if self._folder is None or not self._tenants:
            return names
        # Under the write lock no process can erase a vector between our last look and the moment its file is in place.
        with self._database.write():
            self._catch_up()
            self._folder.mkdir(mode=0o700, exist_ok=True)
            for tenant, held in self._tenants.items():
                path, manifest = self._paths(tenant)
                if path is None or manifest is None or not hasattr(held, "dumped"):
                    continue
                data = held.dumped()
                _publish(path, data)
                _publish(manifest, json.dumps(self._manifest(data, self._change, held.count)).encode())
                names |= {path.name, manifest.name}
            _sync_folder(self._folder)
        self._unsaved = 0
        return names


class _FaissFlat:
    """``IDMap2,Flat`` with inner product."""

    def __init__(self, dimension: int, data: bytes | None = None) -> None:
        faiss: Any = importlib.import_module("faiss")
        self._faiss = faiss
        if data is None:
            self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))
        else:
            self._index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
            if not isinstance(self._index, faiss.IndexIDMap2) or self._index.d != dimension:
                raise ValueError("it is an index of another kind")
        self._known = set(faiss.vector_to_array(self._index.id_map).tolist())

    @property
    def count(self) -> int:
        return int(self._index.ntotal)

    def add(self, rows: Rows, vectors: Vectors) -> None:
        if len(rows):
            self._index.add_with_ids(np.ascontiguousarray(vectors, np.float32), rows)
            self._known.update(rows.tolist())

    def remove(self, rows: Rows) -> None:
        rows = np.array([row for row in rows.tolist() if row in self._known], np.int64)
        if len(rows):
            self._index.remove_ids(rows)
            self._known.difference_update(rows.tolist())

    def vectors(self, rows: Rows) -> tuple[Rows, Vectors]:
        known = np.array([row for row in rows.tolist() if row in self._known], np.int64)
        if not len(known):
            return known, np.empty((0, self._index.d), np.float32)
        return known, self._index.reconstruct_batch(known)

    def search(self, query: Vectors, k: int, allowed: Rows) -> tuple[Rows, Vectors]:
        k = min(k, len(allowed), self.count)
        if k == 0:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        if len(allowed) <= FEW:
            return _best(*self.vectors(allowed), query, k)
        # The filter works inside the scan: a tenant's or user's few rows can't be crowded out by better foreign ones.
        bits = np.zeros(int(allowed.max()) + 1, np.uint8)
        bits[allowed] = 1
        selector = self._faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))
        scores, rows = self._index.search(query[None], k, params=self._faiss.SearchParameters(sel=selector))
        found = rows[0] >= 0
        return rows[0][found], scores[0][found]

    def dumped(self) -> bytes:
        return bytes(self._faiss.serialize_index(self._index).tobytes())


class _NumpyFlat:
    """The same without FAISS: a matrix in RAM, and no file."""

    def __init__(self, dimension: int) -> None:
        self._rows = np.empty(0, np.int64)
        self._vectors = np.empty((0, dimension), np.float32)

    @property
    def count(self) -> int:
        return len(self._rows)

    def add(self, rows: Rows, vectors: Vectors) -> None:
        # Kept sorted by row, so that a look-up is a binary search.
        rows, vectors = np.concatenate([self._rows, rows]), np.concatenate([self._vectors, vectors])
        order = np.argsort(rows, kind="stable")
        self._rows, self._vectors = rows[order], vectors[order]

    def remove(self, rows: Rows) -> None:
        keep = ~np.isin(self._rows, rows)
        self._rows, self._vectors = self._rows[keep], self._vectors[keep]

    def vectors(self, rows: Rows) -> tuple[Rows, Vectors]:
        if not self.count:
            return np.empty(0, np.int64), self._vectors
        at = np.minimum(np.searchsorted(self._rows, rows), self.count - 1)
        at = at[self._rows[at] == rows]
        return self._rows[at], self._vectors[at]

    def search(self, query: Vectors, k: int, allowed: Rows) -> tuple[Rows, Vectors]:
        return _best(*self.vectors(allowed), query, k)


def _best(rows: Rows, vectors: Vectors, query: Vectors, k: int) -> tuple[Rows, Vectors]:
    scores = vectors @ query
    order = np.argsort(-scores, kind="stable")[:k]
    return rows[order], scores[order]


def _flat(dimension: int, data: bytes | None = None) -> Any:
    if _faiss_works():
        return _FaissFlat(dimension, data)
    return _NumpyFlat(dimension)


@cache
def _faiss_works() -> bool:
    try:
        importlib.import_module("faiss")
    except ImportError as error:
        log.warning("FAISS can't be imported (%s): vectors are searched with numpy, which is slower", error)
        return False
    return True


def _publish(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, whole or not at all, and durable."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
