"""Late interaction: token vectors, compressed, and how well each query token finds its match in a passage.

The scores of ColBERT (Khattab and Zaharia 2020), over codes of 2 bits that native/maxsim.c reads in place. Knows the
codes, where those of a record are and what of them is in RAM; knows nothing of texts, scopes or what a good sum is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import weakref
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from agentmem._pure import kernels
from agentmem._pure.late import HEADER, MOST_TOKENS, VERSION, row_bytes, tokens_shape
from agentmem.database import Database
from agentmem.errors import Corrupt, InvalidInput, ProviderError

from .exact import fresh

if TYPE_CHECKING:
    import numpy.typing as npt

    from .encoded import TokenVectors

    Scores = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.int64]

__all__ = ["BUDGET", "MOST_PARTS", "Matches", "TokenStore", "pack", "pack_all", "scores"]

log = logging.getLogger("agentmem")

#: Bytes of codes kept in RAM where the caller sets no other limit: those of some four thousand turns of a chat. More
#: would grow with the memory; what is not here costs a search of 20,000 records two milliseconds.
BUDGET = 16 << 20
#: Passages of one record that take part: a book that is one record must not fill the RAM at each search.
MOST_PARTS = 1024
_SMALLEST = 1 << 20  # bytes of a fresh arena


def pack(tokens: TokenVectors) -> bytes:
    """The codes of one passage's token vectors [tokens, dimension], 2 bits a number: a sixteenth of float32."""
    return pack_all([tokens])[0]


def pack_all(tokens: Sequence[TokenVectors]) -> list[bytes]:
    """`pack` for many passages at once. Raises `ProviderError` for what is no matrix of finite numbers."""
    if not tokens:
        return []
    try:
        rows = np.ascontiguousarray(np.concatenate(tokens), np.float32)
        scales = np.empty(len(rows), "<u2")
        codes = np.empty((len(rows), row_bytes(rows.shape[1])), np.uint8)
        kernels().tokens_encode(rows, scales, codes)
    except (ValueError, IndexError) as error:
        raise ProviderError(f"the embedder's token vectors can't be stored: {error}") from error
    packed, at = [], 0
    for one in tokens:
        if len(one) > MOST_TOKENS:
            raise ProviderError(f"the embedder returned {len(one)} tokens for one text, the most is {MOST_TOKENS}")
        to = at + len(one)
        header = HEADER.pack(VERSION, 0, rows.shape[1], len(one))
        packed.append(header + scales[at:to].tobytes() + codes[at:to].tobytes())
        at = to
    return packed


def scores(query: TokenVectors, packed: Sequence[bytes]) -> Scores:
    """Float32 [len(packed), query tokens]: of each query token, the largest product with a token of each passage.

    Raises `InvalidInput` for a query of no numbers, and `Corrupt` for bytes that are no codes of its dimension.
    """
    starts = np.zeros(len(packed), np.int64)
    np.cumsum([len(one) for one in packed[:-1]], out=starts[1:])
    return _score(query, np.frombuffer(b"".join(packed), np.uint8), starts)


def _score(query: TokenVectors, data: npt.NDArray[np.uint8], starts: Rows) -> Scores:
    tokens = np.ascontiguousarray(query, np.float32)
    if tokens.ndim != 2 or not tokens.shape[1]:
        raise InvalidInput(f"query tokens are [tokens, dimension], not the shape {tokens.shape}")
    found = np.empty((len(starts), len(tokens)), np.float32)
    if not found.size:
        return found
    if not np.isfinite(tokens).all():
        raise InvalidInput("a query token has a NaN or an infinity")
    try:
        kernels().maxsim(tokens, data, starts, found)
    except ValueError as error:
        raise Corrupt(f"token vectors can't be read: {error}") from error
    return found


@dataclass(frozen=True)
class Matches:
    """How well the tokens of a query match the passages of ``records`` records; those without codes have no row."""

    records: int
    #: Float32 [passages, query tokens]; the passages of a record follow each other, the records as they were asked for.
    scores: Scores
    #: Int64 [passages], ascending: which of the records asked for.
    owner: Rows
    #: Int32 [passages]: the passage's number in its record.
    part: npt.NDArray[np.int32]

    @property
    def one_each(self) -> bool:
        """Whether each record has one passage: a row per record, in their order."""
        return len(self.owner) == self.records and bool((self.owner[1:] > self.owner[:-1]).all())

    def best(self, weights: Scores) -> tuple[Scores, npt.NDArray[np.int32]]:
        """Per record the largest ``scores @ weights`` of its passages, float32 [records], and the passage's number.

        NaN and -1 for a record without codes.
        """
        sums = self.scores @ np.asarray(weights, np.float32)
        if self.one_each:
            return sums, self.part
        best = np.full(self.records, np.nan, np.float32)
        part = np.full(self.records, -1, np.int32)
        order = np.lexsort((-self.part, sums, self.owner))  # the last one of a record is its best
        best[self.owner[order]] = sums[order]
        part[self.owner[order]] = self.part[order]
        return best, part


class TokenStore:
    """The codes of one embedding space, read from the table ``tokens`` as searches need them and kept in RAM.

    Threads may share it. It does not look for changes itself: `drop` what the feed of changes names. Codes that fail
    their checksum are logged and left out. Must not be called inside a `Database.write` block.
    """

    def __init__(self, database: Database, space: int, *, budget: int = BUDGET) -> None:
        self._database = database
        self._space = space
        self._budget = budget
        self.start()
        _ALL.add(self)

    def start(self) -> None:
        """Begin with nothing in RAM and a free lock, as a forked child has to: no thread came with it."""
        self._lock = threading.Lock()
        self._clear()

    def match(self, query: TokenVectors, seqs: Rows) -> Matches:
        """The scores of the query's tokens [tokens, dimension] for the passages of these rows (at most 1,024 each).

        What is not in RAM costs one SELECT. Raises `InvalidInput` for a query of no numbers.
        """
        wanted = np.ascontiguousarray(seqs, np.int64).reshape(-1)
        tokens = np.ascontiguousarray(query, np.float32)
        if tokens.ndim != 2:
            raise InvalidInput(f"query tokens are [tokens, dimension], not the shape {tokens.shape}")
        with self._lock, self._whole():
            entries = self._entries(wanted)
            counts, firsts = self._counts[entries], self._firsts[entries]
            if len(counts) and counts.min() == counts.max() == 1:
                owner, passages = np.arange(len(wanted)), firsts
            else:
                owner = np.repeat(np.arange(len(wanted)), counts)
                before = np.cumsum(counts) - counts
                passages = np.arange(len(owner)) + np.repeat(firsts - before, counts)
            # The arena is only ever written behind what is used: the kernel may read it without the lock.
            arena, starts, parts = self._arena, self._starts[passages], self._parts[passages]
            if self._dimensions is not None and len(starts) and tokens.shape[1] != self._dimensions:
                raise InvalidInput(f"query tokens have {tokens.shape[1]} dimensions, this space {self._dimensions}")
            if self._used > self._budget:
                self._evict()
        return Matches(len(wanted), _score(tokens, arena, starts), owner, parts)

    def spans(self, seqs: Sequence[int], parts: Sequence[int]) -> list[tuple[int, int] | None]:
        """Of passage ``parts[i]`` of row ``seqs[i]``, its characters [start, stop); None where there is none."""
        rows = self._database.query(
            "SELECT pair.key, start, stop FROM json_each(?) AS pair JOIN vectors ON space = ? "
            "AND seq = json_extract(pair.value, '$[0]') AND part = json_extract(pair.value, '$[1]')",
            (json.dumps([[int(seq), int(part)] for seq, part in zip(seqs, parts, strict=True)]), self._space),
        )
        found: list[tuple[int, int] | None] = [None] * len(seqs)
        for place, start, stop in rows:
            found[place] = (start, stop)
        return found

    def drop(self, seqs: Rows) -> None:
        """Forget what is in RAM of these rows: they changed, or are gone."""
        with self._lock, self._whole():
            gone = np.isin(self._seqs, np.asarray(seqs, np.int64))
            if not gone.any():
                return
            self._waste += int(self._sizes[gone].sum())
            self._keep(~gone)
            if self._waste > self._used // 2:
                self._compact()

    @contextlib.contextmanager
    def _whole(self) -> Generator[None]:
        """Where Ctrl-C or the end of memory comes between two steps, nothing half done is gone on with."""
        try:
            yield
        except InvalidInput:
            raise
        except BaseException:
            self._clear()
            raise

    def clear(self) -> None:
        """Forget all that is in RAM."""
        with self._lock:
            self._clear()

    @property
    def bytes(self) -> int:
        """Of RAM that the codes take."""
        return int(self._arena.nbytes)

    def _clear(self) -> None:
        self._arena: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        self._used = self._waste = self._clock = 0
        self._dimensions: int | None = None
        # Per record, by ascending seq: its passages are firsts to firsts + counts, and take so many bytes.
        self._seqs = self._firsts = self._counts = self._sizes = self._uses = np.empty(0, np.int64)
        # Per passage: where its codes begin, and its number in the record.
        self._starts = np.empty(0, np.int64)
        self._parts = np.empty(0, np.int32)

    def _entries(self, wanted: Rows) -> Rows:
        """Places of these rows in the arrays of records; what is missing is read first."""
        places = np.searchsorted(self._seqs, wanted)
        known = places < len(self._seqs)
        known[known] = self._seqs[places[known]] == wanted[known]
        if not known.all():
            self._read(np.unique(wanted[~known]))
            places = np.searchsorted(self._seqs, wanted)
        self._clock += 1
        self._uses[places] = self._clock
        return places

    def _read(self, missing: Rows) -> None:
        rows = self._database.query(
            "SELECT seq, part, codes, checksum FROM tokens WHERE space = ? AND part < ? "
            "AND seq IN (SELECT value FROM json_each(?)) ORDER BY seq, part",
            (self._space, MOST_PARTS, json.dumps(missing.tolist())),
        )
        good = [row for row in rows if self._sound(row)]
        lengths = np.array([len(row["codes"]) for row in good], np.int64)
        owner = np.searchsorted(missing, np.array([row["seq"] for row in good], np.int64))
        counts = np.bincount(owner, minlength=len(missing))
        firsts = len(self._starts) + np.cumsum(counts) - counts
        sizes = np.bincount(owner, lengths, len(missing)).astype(np.int64)
        self._reserve(int(lengths.sum()))
        starts = self._used + np.cumsum(lengths) - lengths
        end = self._used + int(lengths.sum())
        self._arena[self._used : end] = np.frombuffer(b"".join([row["codes"] for row in good]), np.uint8)
        self._used = end
        self._starts = np.concatenate([self._starts, starts])
        self._parts = np.concatenate([self._parts, np.array([row["part"] for row in good], np.int32)])
        at = np.searchsorted(self._seqs, missing)
        self._seqs = np.insert(self._seqs, at, missing)
        self._firsts = np.insert(self._firsts, at, firsts)
        self._counts = np.insert(self._counts, at, counts)
        self._sizes = np.insert(self._sizes, at, sizes)
        self._uses = np.insert(self._uses, at, 0)

    def _sound(self, row: Any) -> bool:
        codes = row["codes"]
        if isinstance(codes, bytes) and zlib.crc32(codes) == row["checksum"]:
            try:
                _, dimensions, size = tokens_shape(codes)
            except ValueError as error:
                log.warning("token vectors of row %s, passage %s, are left out: %s", row["seq"], row["part"], error)
                return False
            self._dimensions = self._dimensions or dimensions
            if size == len(codes) and dimensions == self._dimensions:
                return True
        log.warning("token vectors of row %s, passage %s, are damaged and left out", row["seq"], row["part"])
        return False

    def _reserve(self, length: int) -> None:
        if self._used + length > len(self._arena):
            room = max(self._used + length, min(2 * len(self._arena), self._budget), _SMALLEST)
            arena = fresh((room,), np.uint8)
            arena[: self._used] = self._arena[: self._used]
            self._arena = arena

    def _evict(self) -> None:
        """Keep what was used last, up to half of the budget."""
        order = np.argsort(-self._uses, kind="stable")
        kept = np.zeros(len(order), bool)
        kept[order[np.cumsum(self._sizes[order]) <= self._budget // 2]] = True
        self._keep(kept)
        self._compact()

    def _keep(self, kept: npt.NDArray[np.bool_]) -> None:
        for name in ("_seqs", "_firsts", "_counts", "_sizes", "_uses"):
            setattr(self, name, getattr(self, name)[kept])

    def _compact(self) -> None:
        """Bring the codes of the records that are left together, in an arena of their size."""
        counts = self._counts
        before = np.cumsum(counts) - counts
        passages = np.arange(int(counts.sum())) + np.repeat(self._firsts - before, counts)
        old, starts = self._arena, self._starts[passages]
        pieces = [old[start : start + tokens_shape(old, start)[2]] for start in starts.tolist()]
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        self._used, self._waste = int(lengths.sum()), 0
        self._arena = fresh((max(self._used, min(2 * self._used, self._budget)),), np.uint8)
        if pieces:
            np.concatenate(pieces, out=self._arena[: self._used])
        self._starts, self._parts, self._firsts = np.cumsum(lengths) - lengths, self._parts[passages], before


#: The stores whose locks a forked child must not find held.
_ALL: weakref.WeakSet[TokenStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in _ALL:
        store.start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
