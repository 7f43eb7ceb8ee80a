"""The vector index of one folder and one embedding space: derived from the table ``vectors`` and never trusted.

Knows how to stay in step with the database (it replays the table ``changes``), when vectors are compared one by one
and when a base of inverted lists is made (ivf.py), and when files are thrown away. Knows nothing of texts or scopes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agentmem.database import Database
from agentmem.errors import Incompatible, InvalidInput, StoreError

from . import ivf
from .catalog import View, changes_since, last_change
from .exact import best_of, grouped
from .shards import Shard, Stored, pieces

if TYPE_CHECKING:
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.int64]
    Parts = npt.NDArray[np.int32]
    Places = npt.NDArray[np.int32]
    Bools = npt.NDArray[np.bool_]

__all__ = ["VectorIndex", "open_space"]

log = logging.getLogger("agentmem")

#: Vectors of a tenant that are compared one by one; for more, a base of inverted lists is made. Over 384 dimensions
#: that is 200 MB and a hundredth of a second.
EXACT = 131_072
#: The share of a base that may be newer than it before it is made anew.
SHARE = 4
#: The same where `VectorIndex.compact` was asked for: less is not worth training a million vectors' lists again.
WORTH = 64
#: Allowed vectors of a base up to which they are read and compared one by one.
FEW = 256
#: Of a base's best records, how many get the scores of their stored vectors instead of those of their codes.
DECIDED = 32
#: Changes after which the manifests are written without waiting for `VectorIndex.close`.
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
    """Nearest vectors by inner product: exact below `EXACT` vectors of a tenant, above by FAISS's inverted lists.

    Scores are those of the stored vectors; in a base only of the best (`DECIDED`), for the others those of 8-bit codes,
    off by a thousandth. Every call first catches up with what any process has committed, so a deleted vector is never
    returned and an added one is found at once. Files lie in ``folder`` (None: none are kept); a missing, damaged or
    foreign one is made anew from the database and that is logged. Must not be called inside a `Database.write` block:
    it would learn what may be undone.
    """

    def __init__(self, database: Database, folder: str | os.PathLike[str] | None, space: int, dimension: int) -> None:
        self._database = database
        self._stored = Stored(database, space, dimension)
        self._folder = None if folder is None or database.path == ":memory:" else Path(folder)
        self._dimension = dimension
        self.start()
        _ALL.add(self)

    def start(self) -> None:
        """Begin with nothing in RAM and a free lock, as a forked child has to: no thread came with it."""
        self._lock = threading.RLock()
        self._shards: dict[str, Shard] = {}
        self._change = (0, 0)  # the number and nonce of the last change that is in every loaded shard
        self._state = 0  # counts what changed in RAM
        self._unsaved = 0
        self._last: tuple[Any, Places, Vectors] | None = None  # the last query's scores over a view
        self._building: threading.Thread | None = None
        self._refused: dict[str, int] = {}
        self._stop = threading.Event()

    # ---- searching ---------------------------------------------------------------------------------------------

    def search(self, vector: Vectors, k: int, view: View, allowed: Bools) -> tuple[Places, Vectors]:
        """The ``k`` allowed records of the view with the best passage, best first: places int32, scores float32."""
        query = self._query(vector)
        with self._lock:
            self._catch_up()
            parts = [(np.empty(0, np.int32), np.empty(0, np.float32))]
            for tenant in view.tenants:
                shard = self._shard(tenant)
                parts.append(shard.exact.score(query, view, allowed))
                if shard.base is not None:
                    parts.append(self._look(shard, query, k, view, allowed))
            found, scores = (np.concatenate(some) for some in zip(*parts, strict=True))
            self._last = (query.tobytes(), view.generation, view.version, self._state), found, scores
        if k < len(found):
            some = np.argpartition(scores, len(found) - k)[len(found) - k :]
            found, scores = found[some], scores[some]
        order = np.argsort(-scores, kind="stable")
        self._tend(view.tenants)
        return found[order], scores[order]

    def scores(self, vector: Vectors, view: View, places: Places) -> Vectors:
        """The score of the best passage of each of these records, float32, NaN for one without vectors."""
        query = self._query(vector)
        with self._lock:
            found = np.full(len(places), np.nan, np.float32)
            key = query.tobytes(), view.generation, view.version, self._state
            if self._last is not None and self._last[0] == key and len(self._last[1]):
                # Right behind a search for the same: its scores are there, and hold for that moment.
                self._last = (key, *_rising(*self._last[1:]))
                at = np.minimum(np.searchsorted(self._last[1], places), len(self._last[1]) - 1)
                found[:] = np.where(self._last[1][at] == places, self._last[2][at], np.nan)
            else:
                self._catch_up()
            missing = np.flatnonzero(np.isnan(found))
            if len(missing):
                wanted = view.seq[places[missing]]
                found[missing] = grouped(query, *self._vectors(view, np.unique(wanted)), wanted)
        return found

    def vectors(self, view: View, places: Places) -> Vectors:
        """The mean of each of these records' vectors, float32 [places, dimension], NaN for one without."""
        wanted = view.seq[places]
        with self._lock:
            self._catch_up()
            seq, vectors = self._vectors(view, np.unique(wanted))
        records, again = np.unique(wanted, return_inverse=True)
        total, times = np.zeros((len(records), self._dimension), np.float32), np.zeros(len(records), np.float32)
        at = np.searchsorted(records, seq)
        np.add.at(total, at, vectors)
        np.add.at(times, at, 1)
        total[times == 0] = np.nan
        return np.asarray(total / np.maximum(times, 1)[:, None], np.float32)[again]

    def count(self, tenant: str = "") -> int:
        """How many vectors this tenant has."""
        with self._lock:
            self._catch_up()
            return self._shard(tenant).count()

    def _query(self, vector: Vectors) -> Vectors:
        query: Vectors = np.ascontiguousarray(vector, np.float32).reshape(-1)
        if query.shape != (self._dimension,) or not np.isfinite(query).all():
            raise InvalidInput(
                f"a query vector needs {self._dimension} finite numbers, not the shape {np.shape(vector)}"
            )
        return query

    def _look(self, shard: Shard, query: Vectors, k: int, view: View, allowed: Bools) -> tuple[Places, Vectors]:
        """About the ``k`` best allowed records of a shard's base (int32 places) and their scores."""
        base = shard.base
        assert base is not None
        owner, found = shard.owners.seen(base.seq, base.gone, view, allowed)
        some = int(np.count_nonzero(found))
        if some <= FEW:
            seqs = np.unique(base.seq[found])
            seq, _, vectors = self._stored.read(seqs)
            scores = grouped(query, seq, vectors, seqs)
            held = ~np.isnan(scores)
            return view.places(seqs[held]), scores[held]
        # As many as would be compared one by one if they were alone are looked for in every list. A record may have
        # several passages among the nearest: only so many more are looked for as there are passages to a record.
        several = -(-max(k, DECIDED) * len(base) // base.records)
        rows, scores = base.search(query, several, found, everywhere=some <= EXACT)
        places, scores = best_of(owner[rows], scores)
        # The codes choose, the vectors decide who is first.
        first = np.argsort(-scores)[:DECIDED]
        seqs = np.sort(view.seq[places[first]])
        seq, _, vectors = self._stored.read(seqs)
        decided = grouped(query, seq, vectors, view.seq[places[first]])
        scores[first] = np.where(np.isnan(decided), scores[first], decided)
        return places, scores

    def _vectors(self, view: View, seqs: Rows) -> tuple[Rows, Vectors]:
        """(seq, vector) of all passages of these records that have any."""
        found, vectors = [np.empty(0, np.int64)], [np.empty((0, self._dimension), np.float32)]
        for tenant in view.tenants:
            shard = self._shard(tenant)
            held = shard.exact.held(shard.exact.rows(seqs))
            found.append(held[0])
            vectors.append(held[2])
            if shard.base is not None:
                rows = shard.base.rows(seqs)
                found.append(shard.base.seq[rows])
                vectors.append(shard.base.vectors(rows))
        return np.concatenate(found), np.concatenate(vectors)

    # ---- following the database --------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Bring every loaded shard up to the last committed change."""
        if not self._shards:
            self._change = last_change(self._database)
            return
        changes = changes_since(self._database, self._change)
        if changes is None:
            log.info("the vector index is behind the database by too much or belongs to another one: rebuilding it")
            self._shards.clear()
            self._state += 1
            self._change = last_change(self._database)
            return
        if not changes:
            return
        for tenant, shard in self._shards.items():
            self._apply(shard, {row[2]: row[3] for row in changes if row[1] == tenant})
        self._unsaved += len(changes)
        self._change = changes[-1][0], changes[-1][4]
        self._state += 1

    def _apply(self, shard: Shard, final: dict[int, int]) -> None:
        if not final:
            return
        shard.remove(np.sort(np.fromiter(final, np.int64)))
        for part in pieces(np.sort(np.array([seq for seq, added in final.items() if added], np.int64))):
            shard.exact.add(*self._stored.read(part))

    def _shard(self, tenant: str) -> Shard:
        """The tenant's vectors, as of `_change` or later: in RAM already, or with a base from files, or read."""
        shard = self._shards.get(tenant)
        if shard is None:
            shard = self._shards[tenant] = self._stored.shard(tenant, self._folder)
        return shard

    # ---- files -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Note in the manifests what the bases in use are up to date with. What fails is logged: files are derived."""
        try:
            with self._lock:
                self._write_manifests()
        except (OSError, StoreError) as error:
            log.warning("the vector index was not saved and may be rebuilt from the database: %s", error)

    def _write_manifests(self) -> None:
        based = {tenant: shard for tenant, shard in self._shards.items() if shard.base is not None}
        if self._folder is None or not based:
            return
        with self._database.write():
            self._catch_up()
            for tenant, shard in based.items():
                self._note(tenant, shard)
        self._unsaved = 0

    def _note(self, tenant: str, shard: Shard) -> None:
        """Write one manifest, unless another process has made another base meanwhile."""
        if self._folder is None or self._shards.get(tenant) is not shard:
            return
        found = ivf.read_manifest(self._folder, self._stored.name(tenant))
        if found is not None and found["file"] == shard.manifest["file"]:
            shard.manifest |= {**self._stored.origin(self._change), "gone": sorted(shard.touched)}
            ivf.publish(self._folder, self._stored.name(tenant), shard.manifest)

    def rewrite(self) -> None:
        """After an erasure: leave no file that holds a vector the database no longer has.

        Bases of tenants in use are written anew without it, other files are removed (and made anew when they pay).
        Raises `StoreError` where that fails, since something forgotten may still be readable then.
        """
        if self._folder is None or not self._folder.is_dir():
            return
        try:
            with self._lock, self._database.write():
                self._catch_up()
                kept = set()
                for tenant, shard in self._shards.items():
                    name = self._stored.name(tenant)
                    found = ivf.read_manifest(self._folder, name) if shard.base is not None else None
                    if shard.base is None or found is None or found["file"] != shard.manifest["file"]:
                        continue
                    if shard.base.codes() > np.count_nonzero(~shard.base.gone):
                        manifest = ivf.without(self._folder, name, shard.manifest, shard.base)
                        manifest |= {**self._stored.origin(self._change), "gone": sorted(shard.touched)}
                        ivf.publish(self._folder, name, manifest)
                        shard.base, shard.manifest = ivf.open_base(self._folder, manifest, self._dimension), manifest
                    else:
                        self._note(tenant, shard)
                    kept |= {f"{name}.json", *(f"{shard.manifest['file']}.{end}" for end in ("ivf", "rows"))}
                for path in self._folder.iterdir():
                    if path.name not in kept:
                        path.unlink(missing_ok=True)
                ivf.sync_folder(self._folder)
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(
                f"old files of the vector index in {self._folder} could not be replaced: {error}"
            ) from error

    # ---- making a base -----------------------------------------------------------------------------------------

    def _tend(self, tenants: list[str]) -> None:
        """Start what a search should not wait for."""
        with self._lock:
            if self._unsaved >= MANY:
                self.save()
            if self._folder is None or (self._building is not None and self._building.is_alive()):
                return
            for tenant in tenants:
                shard = self._shards.get(tenant)
                if shard is None or not shard.wants_base(EXACT, SHARE) or not ivf.faiss_works():
                    continue
                if len(shard.exact) > 2 * self._refused.get(tenant, 0):
                    self._stop.clear()
                    self._building = threading.Thread(
                        target=self._build_aside, args=(tenant, len(shard.exact)), name="agentmem index", daemon=True
                    )
                    self._building.start()
                    return

    def _build_aside(self, tenant: str, count: int) -> None:
        try:
            self._build(tenant)
        except (OSError, StoreError, RuntimeError, MemoryError) as error:
            log.warning("no base of inverted lists was made: %s; vectors are compared one by one", error)
            self._refused[tenant] = count  # tried again when there are twice as many

    def _build(self, tenant: str) -> None:
        """Make a base of all of a tenant's vectors. Nothing is held up but by the writing of its files."""
        if self._folder is None:
            return
        change = last_change(self._database)
        seqs = self._stored.of(tenant)
        if not len(seqs):
            return
        builder = ivf.Builder(self._dimension, len(seqs))
        chosen = [self._stored.read(some) for some in pieces(seqs[builder.sample()])]
        if not builder.train(np.concatenate([vectors for _, _, vectors in chosen]), lambda: not self._stop.is_set()):
            return
        del chosen
        for some in pieces(seqs):
            if self._stop.is_set():
                return
            builder.add(*self._stored.read(some))
        self._folder.mkdir(mode=0o700, exist_ok=True)
        # Under the write lock no process can erase a vector between our last look and the moment its file is in place.
        with self._lock, self._database.write():
            changes = changes_since(self._database, change)
            if changes is None:
                log.info("the database changed too much while a vector index was made: it is made later")
                return
            last = int(seqs[-1])
            touched = sorted({row[2] for row in changes if row[1] == tenant and row[2] <= last})
            builder.write(
                self._folder, self._stored.name(tenant), self._stored.origin(last_change(self._database)), touched
            )
            self._shards.pop(tenant, None)
            self._state += 1

    def compact(self) -> None:
        """Fold what is newer than a base, and what is gone from it, into a new one, unless it is very little."""
        if self._folder is None or not ivf.faiss_works():
            return
        self._halt()
        with self._lock:
            self._catch_up()
            tenants = [row[0] for row in self._database.query("SELECT DISTINCT tenant FROM records")]
            stale = []
            for tenant in tenants:
                shard = self._shard(tenant)
                newer = 0 if shard.base is None else max(len(shard.exact), len(shard.touched))
                if shard.wants_base(EXACT, SHARE) or newer > len(shard.base or ()) // WORTH:
                    stale.append(tenant)
        self._stop.clear()
        for tenant in stale:
            self._build(tenant)

    def _halt(self) -> None:
        """Have a base that is being made given up."""
        self._stop.set()
        if self._building is not None and self._building is not threading.current_thread():
            self._building.join()
        self._building = None

    def close(self) -> None:
        """Save what changed and let go of the memory."""
        self._halt()
        with self._lock:
            based = [shard for shard in self._shards.values() if shard.base is not None]
            if any(shard.manifest["change"] != self._change[0] for shard in based):
                self.save()
            self._shards.clear()
            self._change, self._unsaved, self._last = (0, 0), 0, None

    # ---- what it says of itself --------------------------------------------------------------------------------

    def facts(self) -> list[str]:
        """How vectors are searched and what that costs in recall: a line per tenant with a base, one for all others."""
        lines, exact = [], 0
        with self._lock:
            self._catch_up()
            for (tenant,) in self._database.query("SELECT DISTINCT tenant FROM records ORDER BY tenant"):
                manifest = self._folder and self._folder / f"{self._stored.name(tenant)}.json"
                # Only for a base is it worth reading what is not in RAM.
                shard = self._shard(tenant) if manifest and manifest.exists() else self._shards.get(tenant)
                if shard is None or shard.base is None:
                    exact += 1
                    continue
                facts = shard.base.facts
                lines.append(
                    f"the vectors of {f'tenant {tenant!r}' if tenant else 'no tenant'}: {shard.count():,}, of which "
                    f"{len(shard.exact):,} are compared one by one; the others lie in {facts.lists:,} lists, "
                    f"{facts.probes:,} of them looked into: {facts.recall:.1%} of the ten nearest are found"
                )
        if exact:
            lines.append(f"the vectors of {exact:,} {'tenant' if exact == 1 else 'tenants'}: all compared (exact)")
        return lines

    def verify(self) -> list[str]:
        """Where the index differs from the database, in RAM or on disk, one line each; empty if all is well."""
        problems = []
        tenants = [row[0] for row in self._database.query("SELECT DISTINCT tenant FROM records")]
        for tenant in tenants:
            with self._lock:
                # Only a second look keeps others from committing meanwhile.
                for look in (contextlib.nullcontext, self._database.write):
                    with look():
                        self._catch_up()
                        shard = self._shard(tenant)
                        fits = shard.agrees(self._stored, tenant)
                    if fits:
                        break
                else:
                    problems.append(f"the vector index of tenant {tenant!r} does not fit the database")
                if self._folder is None:
                    continue
                try:
                    manifest = ivf.read_manifest(self._folder, self._stored.name(tenant))
                    if manifest is not None:
                        ivf.open_base(self._folder, manifest, self._dimension)
                except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                    problems.append(f"the index file of tenant {tenant!r} is damaged: {error}")
        return problems


def _rising(places: Places, scores: Vectors) -> tuple[Places, Vectors]:
    if (places[1:] > places[:-1]).all():
        return places, scores
    order = np.argsort(places)
    return places[order], scores[order]


#: The indexes whose locks a forked child must not find held.
_ALL: weakref.WeakSet[VectorIndex] = weakref.WeakSet()


def _after_fork() -> None:
    for index in _ALL:
        index.start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
