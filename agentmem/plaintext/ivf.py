"""The part of a large vector index that lies in files: FAISS's inverted lists of 8-bit codes, memory-mapped.

Knows how such a base is trained, measured, written, checked, opened and rid of forgotten vectors. Knows nothing of
records or of the database: vectors come in as numbers and are named by their place in the order they came.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agentmem._pure import kernels

if TYPE_CHECKING:
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.int64]
    Parts = npt.NDArray[np.int32]
    Bools = npt.NDArray[np.bool_]

__all__ = ["Base", "Builder", "faiss_works", "sync_folder"]

log = logging.getLogger("agentmem")

FORMAT = 2
#: Recall among the ten nearest that the number of lists looked into is chosen for.
RECALL = 0.98
#: Vectors taken as queries to measure it.
SAMPLE = 100
#: Vectors a list's centre is trained from, and how often all centres are moved.
TRAINING, ROUNDS = 40, 6


@cache
def faiss_works() -> bool:
    """Whether FAISS can be imported; a warning says so once where it can't."""
    try:
        importlib.import_module("faiss")
    except ImportError as error:
        log.warning("FAISS can't be imported (%s): vectors are searched with numpy, exactly, at any size", error)
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a base: it goes into its manifest."""

    count: int
    lists: int
    probes: int
    recall: float


class Base:
    """Inverted lists over vectors 0 to ``count`` - 1, whose record is ``seq`` and whose passage is ``part``.

    ``gone`` marks those that are not to be found any more. The files never change while they are open.
    """

    def __init__(self, index: Any, seq: Rows, part: Parts, facts: Facts, gone: Bools) -> None:
        self._faiss: Any = importlib.import_module("faiss")
        self._index = index
        self.seq, self.part, self.facts, self.gone = seq, part, facts, gone
        self.records = len(np.unique(seq))
        self._where: tuple[Parts, Parts] | None = None

    def __len__(self) -> int:
        return len(self.seq)

    def search(self, query: Vectors, k: int, allowed: Bools, *, everywhere: bool) -> tuple[Rows, Vectors]:
        """The ``k`` nearest of the allowed vectors (int64) and their scores: from all lists, or from the likely ones.

        The fewer are allowed, the more lists are likely ones, so that a filter does not cost what is found.
        """
        some = int(np.count_nonzero(allowed))
        if not some:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        likely = min(self.facts.lists, -(-self.facts.probes * len(self) // some))
        options = {"nprobe": self.facts.lists if everywhere else likely}
        if some < len(self):
            # The filter works inside the scan: few rows can't be crowded out by better ones that are not allowed.
            bits = np.packbits(allowed, bitorder="little")
            options["sel"] = self._faiss.IDSelectorBitmap(bits)
        parameters = self._faiss.SearchParametersIVF(**options)
        scores, rows = self._index.search(query[None], min(k, some), params=parameters)
        found = rows[0] >= 0
        return rows[0][found], scores[0][found]

    def vectors(self, rows: Rows) -> Vectors:
        """These vectors as their codes have them, float32: off by a thousandth in a score."""
        found = np.empty((len(rows), self._index.d), np.float32)
        if self._where is None:
            self._where = self._places()
        lists, offsets = self._where[0][rows].tolist(), self._where[1][rows].tolist()
        for row, one, offset in zip(found, lists, offsets, strict=True):
            self._index.reconstruct_from_offset(one, offset, self._faiss.swig_ptr(row))
        return found

    def _places(self) -> tuple[Parts, Parts]:
        """The list of each vector, and its place there."""
        lists, offsets = np.zeros(len(self), np.int32), np.zeros(len(self), np.int32)
        for number in range(self._index.nlist):
            ids = _ids(self._faiss, self._index.invlists, number)
            lists[ids], offsets[ids] = number, np.arange(len(ids))
        return lists, offsets

    def remove(self, seqs: Rows) -> None:
        """These records' vectors are not to be found any more."""
        at = np.searchsorted(self.seq, seqs)
        for first, last in zip(at.tolist(), np.searchsorted(self.seq, seqs, "right").tolist(), strict=True):
            self.gone[first:last] = True

    def rows(self, seqs: Rows) -> Rows:
        """The vectors of these records that can be found."""
        first, last = np.searchsorted(self.seq, seqs), np.searchsorted(self.seq, seqs, "right")
        pairs = zip(first.tolist(), last.tolist(), strict=True)
        found = np.array([row for first, last in pairs for row in range(first, last)], np.int64)
        return found[~self.gone[found]]

    def codes(self) -> int:
        """How many vectors the file holds codes of."""
        return int(self._index.ntotal)


class Builder:
    """Makes a base: `sample` says which vectors to train from, `train`, `add` all in order, `write`."""

    def __init__(self, dimension: int, count: int) -> None:
        self._faiss: Any = importlib.import_module("faiss")
        self._dimension = dimension
        self.lists = max(1, int(2 * count**0.5))
        self._count = count
        self._centres: Any = None
        self._index: Any = None
        self._queries: Any = None
        self._seq: list[Rows] = []
        self._part: list[Parts] = []
        self._best = np.full((0, 11), -np.inf, np.float32)
        self._best_rows = np.empty((0, 11), np.int64)

    def sample(self) -> Rows:
        """The places of the vectors to train from, ascending."""
        random = np.random.default_rng(0)
        wanted = min(self._count, TRAINING * self.lists)
        return np.sort(random.choice(self._count, wanted, replace=False))

    def train(self, vectors: Vectors, going_on: Callable[[], bool]) -> bool:
        """Find the lists' centres (spherical k-means). False where ``going_on`` said stop between two rounds."""
        random = np.random.default_rng(1)
        self._queries = vectors[random.permutation(len(vectors))[:SAMPLE]].copy()
        self._best = np.full((len(self._queries), 11), -np.inf, np.float32)
        self._best_rows = np.full((len(self._queries), 11), -1, np.int64)
        centres = vectors[random.permutation(len(vectors))[: self.lists]].copy()
        for _ in range(ROUNDS):
            if not going_on():
                return False
            bounds = {"max_points_per_centroid": 10**6, "min_points_per_centroid": 1}
            means = self._faiss.Kmeans(self._dimension, len(centres), niter=1, spherical=True, seed=1, **bounds)
            means.train(vectors, init_centroids=centres)
            centres = means.centroids
        quantizer = self._faiss.IndexFlatIP(self._dimension)
        quantizer.add(centres)
        # Codes of the vectors themselves, not of their distance to the centre: a centre can then be changed.
        by_residual = False
        self._index = self._faiss.IndexIVFScalarQuantizer(
            *(quantizer, self._dimension, len(centres), self._faiss.ScalarQuantizer.QT_8bit),
            *(self._faiss.METRIC_INNER_PRODUCT, by_residual),
        )
        self._quantizer = quantizer  # FAISS does not keep it alive
        self._index.train(vectors)
        self.lists = len(centres)
        return True

    def add(self, seq: Rows, part: Parts, vectors: Vectors) -> None:
        """The next vectors, in ascending order of (seq, part)."""
        first = self._index.ntotal
        self._index.add(vectors)
        self._seq.append(seq)
        self._part.append(part)
        scores = self._queries @ vectors.T
        rows = np.broadcast_to(np.arange(first, first + len(vectors)), scores.shape)
        scores, rows = np.hstack([self._best, scores]), np.hstack([self._best_rows, rows])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :11]
        self._best, self._best_rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def measure(self) -> tuple[int, float]:
        """The fewest lists to look into that find `RECALL` of the ten nearest of the sample, and what they find."""
        probes, recall = 1, 0.0
        while True:
            self._index.nprobe = probes
            _, found = self._index.search(self._queries, 20)
            # A query is a stored vector: that it finds itself is left out.
            pairs = zip(found.tolist(), self._best_rows.tolist(), strict=True)
            hits = [len(set(got) & set(right[1:])) for got, right in pairs]
            recall = sum(hits) / max(1, sum(int((right[1:] >= 0).sum()) for right in self._best_rows))
            if recall >= RECALL or probes >= self.lists:
                return probes, recall
            probes = min(self.lists, 2 * probes)

    def write(self, folder: Path, name: str, origin: Mapping[str, Any], gone: Iterable[int]) -> None:
        """Write the base's files and its manifest, durable, without the vectors of the records ``gone``."""
        probes, recall = self.measure()
        seq, part = np.concatenate(self._seq), np.concatenate(self._part)
        facts = Facts(count=len(seq), lists=self.lists, probes=probes, recall=recall)
        left_out = sorted(gone)
        drop(self._index, np.isin(seq, left_out))
        file = _write(folder, name, self._index, seq, part)
        publish(folder, name, {**origin, **facts.__dict__, **file, "gone": left_out})


def _write(folder: Path, name: str, index: Any, seq: Rows, part: Parts) -> dict[str, Any]:
    """Write an index and its rows under a name of their own; returns what a manifest says of them."""
    faiss: Any = importlib.import_module("faiss")
    unique = f"{name}-{secrets.token_hex(4)}"
    rows = seq.astype("<i8").tobytes() + part.astype("<i4").tobytes()
    with _temporary(folder / f"{unique}.rows") as temporary:
        temporary.write_bytes(rows)
    path = folder / f"{unique}.ivf"
    with _temporary(path) as temporary:
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:  # how FAISS says that a write failed
            raise OSError(f"FAISS could not write {path.name}: {error}") from error
    return {"file": unique, "rows": _crc(rows), "bytes": path.stat().st_size, "crc32c": _file_crc(path)}


def drop(index: Any, gone: Bools) -> None:
    """Take vectors out of an index in RAM, so that nothing in it tells of them.

    A list's centre may be the very vector that was alone in it: the centre of a list that loses one becomes the mean
    of what is left.
    """
    if not gone.any():
        return
    faiss: Any = importlib.import_module("faiss")
    lists = index.invlists
    lost = [number for number in range(index.nlist) if gone[_ids(faiss, lists, number)].any()]
    index.remove_ids(faiss.IDSelectorBatch(np.flatnonzero(gone).astype(np.int64)))
    quantizer = faiss.downcast_index(index.quantizer)
    centres = faiss.rev_swig_ptr(quantizer.get_xb(), quantizer.ntotal * index.d).reshape(-1, index.d)
    for number in lost:
        centre, left = np.zeros(index.d, np.float32), np.empty(index.d, np.float32)
        for place in range(lists.list_size(number)):
            index.reconstruct_from_offset(number, place, faiss.swig_ptr(left))
            centre += left
        centres[number] = centre / (np.linalg.norm(centre) or 1.0)


def publish(folder: Path, name: str, manifest: dict[str, Any]) -> None:
    """Put a manifest in place, and remove the files that the last one named."""
    with _temporary(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps({**manifest, "format": FORMAT}))
    for old in folder.glob(f"{name}-*"):
        if old.stem != manifest["file"]:
            old.unlink(missing_ok=True)
    sync_folder(folder)


def read_manifest(folder: Path, name: str) -> dict[str, Any] | None:
    """The manifest of a base, None where there is none. ValueError for a damaged one."""
    try:
        manifest = json.loads((folder / f"{name}.json").read_bytes())
    except FileNotFoundError:
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError("its manifest is damaged or of another format")
    return manifest


def open_base(folder: Path, manifest: Mapping[str, Any], dimension: int) -> Base:
    """The base of a manifest, mapped. ValueError, KeyError, TypeError or OSError for anything that does not fit."""
    faiss: Any = importlib.import_module("faiss")
    path, count = folder / f"{manifest['file']}.ivf", int(manifest["count"])
    rows = (folder / f"{manifest['file']}.rows").read_bytes()
    if len(rows) != 12 * count or _crc(rows) != manifest["rows"]:
        raise ValueError("its list of rows does not fit its manifest")
    if path.stat().st_size != manifest["bytes"] or _file_crc(path) != manifest["crc32c"]:
        raise ValueError("it does not fit its manifest")
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        raise ValueError(f"FAISS can't read it: {error}") from error
    if index.d != dimension or index.ntotal > count or index.nlist != manifest["lists"]:
        raise ValueError("it is an index of another kind")
    seq = np.frombuffer(rows, "<i8", count).astype(np.int64)
    part = np.frombuffer(rows, "<i4", count, 8 * count).astype(np.int32)
    facts = Facts(**{name: manifest[name] for name in ("count", "lists", "probes", "recall")})
    base = Base(index, seq, part, facts, np.zeros(count, bool))
    base.remove(np.array(manifest["gone"], np.int64))
    return base


def without(folder: Path, name: str, manifest: Mapping[str, Any], base: Base) -> dict[str, Any]:
    """Write a base anew that holds nothing of what is gone; returns its manifest, not yet published."""
    faiss: Any = importlib.import_module("faiss")
    index = faiss.read_index(str(folder / f"{manifest['file']}.ivf"))
    drop(index, base.gone)
    return {**manifest, **_write(folder, name, index, base.seq, base.part)}


def _ids(faiss: Any, lists: Any, number: int) -> Rows:
    size = lists.list_size(number)
    ids: Rows = faiss.rev_swig_ptr(lists.get_ids(number), size) if size else np.empty(0, np.int64)
    return ids


def _crc(data: bytes) -> int:
    return int(kernels().crc32c(data))


def _file_crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            crc = int(kernels().crc32c(data, crc))
    return crc


@contextlib.contextmanager
def _temporary(path: Path) -> Generator[Path]:
    """A path to write to; what was written is put at ``path``, whole or not at all, and durable."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        yield temporary
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
