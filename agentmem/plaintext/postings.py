"""Which records hold a word and how often, by FTS5's own stems: read from its index once, kept in RAM, followed.

Knows FTS5's tokenizer (by asking it) and the virtual table ``records_terms``. Knows records only as places in a view.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from agentmem.database import Database

if TYPE_CHECKING:
    import numpy.typing as npt

    Places = npt.NDArray[np.int32]

__all__ = ["MOST_TERMS", "STOP_WORDS", "Postings", "stems", "terms"]

#: English words too common to say what is asked for. In other languages BM25's own weights do most of this work.
STOP_WORDS = frozenset(
    """
    a about an and are as at be been being but by can could d did do does down for from had has have he
    her here him his how i if in into is it its ll m may me might my no not of on or our out over re s
    she should so t than that the their them then there these they this those to up us ve was we were
    what when where which who whom why will with would you your
    """.split()  # noqa: SIM905 - read as prose
)
#: The most words of a query that are looked up; what follows adds cost, not sense.
MOST_TERMS = 64
#: As ``records_fts`` has it (database.py).
TOKENIZER = "porter unicode61"
#: Words whose stems are remembered.
KNOWN = 65_536
#: A word with the accents that are characters of their own: FTS5 takes them for parts of it and then drops them.
_WORD = re.compile("[^\\W_]+(?:[\u0300-\u036f]+[^\\W_]*)*")


def terms(query: str) -> list[str]:
    """The words of a query to look up: letters and digits only, without those that say nothing."""
    words = list(dict.fromkeys(_WORD.findall(query.lower())))
    return ([word for word in words if word not in STOP_WORDS] or words)[:MOST_TERMS]


class _Tokenizer:
    """FTS5's tokenizer, asked by way of an index in RAM that is emptied after each question."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[str, ...]] = {}
        self._fts = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._fts.execute("PRAGMA synchronous = OFF")
        self._fts.execute(f"CREATE VIRTUAL TABLE words USING fts5 (text, name, content='', tokenize='{TOKENIZER}')")
        self._fts.execute("CREATE VIRTUAL TABLE terms USING fts5vocab (words, instance)")

    def index(self, rows: Iterable[tuple[int, str | None, str | None]]) -> list[tuple[str, int]]:
        """(stem, row) of each word in these (row, text, name), by stem and then by row."""
        with self._lock:
            self._fts.execute("BEGIN")
            try:
                self._fts.executemany("INSERT INTO words (rowid, text, name) VALUES (?, ?, ?)", rows)
                return self._fts.execute("SELECT term, doc FROM terms").fetchall()
            finally:
                self._fts.execute("ROLLBACK")

    def stems(self, words: Sequence[str]) -> list[str]:
        """The stems of these words, each once, in their order. A word may be several tokens to FTS5, or none."""
        known = self._known
        new = [word for word in words if word not in known]
        if new:
            found: dict[int, list[str]] = {}
            for stem, row in self.index((row, word, None) for row, word in enumerate(new)):
                found.setdefault(row, []).append(stem)
            if len(known) > KNOWN:  # another thread goes on with the dict it began with
                known = self._known = {word: known[word] for word in words if word in known}
            for row, word in enumerate(new):
                known[word] = tuple(found.get(row, ()))
        return list(dict.fromkeys(stem for word in words for stem in known[word]))


@cache
def _tokenizer() -> _Tokenizer:
    """The tokenizer of this process; a forked child makes its own."""
    return _Tokenizer()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tokenizer.cache_clear)


def stems(query: str) -> list[str]:
    """The stems of a query's words as FTS5 stores them, each once, at most `MOST_TERMS` words of it."""
    return _tokenizer().stems(terms(query))


class _Held:
    """The postings of one stem. What lies behind ``count`` is room to grow: a reader's slices never change.

    ``since`` is how many of the places that were taken out (`Postings.add`) are out of these.
    """

    __slots__ = ("count", "places", "since", "times")

    def __init__(self, places: Places, times: Places, since: int) -> None:
        self.places, self.times, self.count, self.since = places, times, len(places), since

    def add(self, places: Places, times: Places) -> None:
        """Add postings that are not here, behind all others or between them."""
        here, often = self.slices()
        if len(here) and here[-1] >= places[0]:
            at = np.searchsorted(here, places)
            self.places, self.times = np.insert(here, at, places), np.insert(often, at, times)
            self.count = len(self.places)
            return
        count = self.count + len(places)
        if count > len(self.places):
            room = max(count, 2 * len(self.places))
            self.places, self.times = np.empty(room, np.int32), np.empty(room, np.int32)
            self.places[: self.count], self.times[: self.count] = here, often
        self.places[self.count : count], self.times[self.count : count] = places, times
        self.count = count

    def remove(self, gone: Places) -> None:
        """Take out those of these places that are here."""
        here, often = self.slices()
        if not len(here):
            return
        at = np.minimum(np.searchsorted(here, gone), len(here) - 1)
        at = at[here[at] == gone]
        if len(at):
            self.places, self.times = np.delete(here, at), np.delete(often, at)
            self.count = len(self.places)

    def slices(self) -> tuple[Places, Places]:
        return self.places[: self.count], self.times[: self.count]


class Postings:
    """The postings of one view's words, those in use. ``complete``: all words are here, nothing is read for new ones.

    A view of few records is indexed whole; else a word is read from ``records_terms`` when it is first asked for.
    """

    #: Records up to which a view's words are all indexed when it is made (a tenth of a second at most).
    SMALL = 4096
    #: Bytes of postings that are kept; the words used longest ago go first.
    BUDGET = 256 * 1024 * 1024
    #: Changed records up to which their words are followed one by one; for more, the words are read again.
    FEW = 256

    def __init__(self, database: Database) -> None:
        self.complete = False
        self._database = database
        self._lock = threading.Lock()
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._bytes = 0
        self._covered = 0  # places whose words have come by `add`: an older view's reading would lack some
        self._gone: list[int] = []  # places whose old words are taken out of a word's postings when it is next used

    def get(self, words: Sequence[str], seqs: npt.NDArray[np.int64]) -> list[tuple[Places, Places]]:
        """For each stem (places ascending, occurrences), int32; ``seqs`` are the row numbers of the view's places."""
        with self._lock:
            missing = [] if self.complete else [word for word in words if word not in self._held]
            read = self._read(missing, seqs) if missing else {}
            if len(seqs) >= self._covered:
                self._held.update(read)
                self._bytes += sum(8 * held.count for held in read.values())
            found = []
            for word in words:
                held = self._held.get(word) or read.get(word)
                if held is None:
                    found.append((_NONE, _NONE))
                    continue
                if not self.complete and word in self._held:
                    self._held.move_to_end(word)
                self._settle(held)
                places, times = held.slices()
                # Postings run ahead of a view that a search still holds.
                if len(places) and places[-1] >= len(seqs):
                    count = int(np.searchsorted(places, len(seqs)))
                    places, times = places[:count], times[:count]
                found.append((places, times))
            while self._bytes > self.BUDGET and len(self._held) > len(words):
                self.complete = False
                self._bytes -= 8 * len(self._held.popitem(last=False)[1].places)
            return found

    def add(self, rows: Sequence[tuple[int, str, str | None]], count: int, changed: Sequence[int] = ()) -> None:
        """Index (place, text, name) of records. ``changed``: those of the places that were here with other words.

        ``count`` is the number of places that the view has now. A search at the same time finds the old words of a
        record or the new ones.
        """
        with self._lock:
            self._covered = count
            if len(rows) > (self.SMALL if self.complete else self.FEW):
                self._forget()
                return
            words = [*_grouped(_tokenizer().index(rows))]
            self._gone += changed
            for word, places, times in words:
                held = self._held.get(word)
                if held is None:
                    if not self.complete:
                        continue
                    held = self._held[word] = _Held(_NONE, _NONE, len(self._gone))
                self._settle(held)
                before = len(held.places)
                held.add(places, times)
                self._bytes += 8 * (len(held.places) - before)
            if len(self._gone) > self.SMALL:
                for held in self._held.values():
                    self._settle(held)
                    held.since = 0
                self._gone = []

    def _settle(self, held: _Held) -> None:
        """Take out of a word's postings what `add` said is gone since they were last used."""
        if held.since == len(self._gone):
            return
        before = len(held.places)
        held.remove(np.unique(np.array(self._gone[held.since :], np.int32)))
        held.since = len(self._gone)
        self._bytes -= 8 * (before - len(held.places))

    def _forget(self) -> None:
        """Drop all words: they are read again when they are asked for."""
        self.complete, self._bytes = False, 0
        self._held.clear()
        self._gone = []

    def _read(self, words: Sequence[str], seqs: npt.NDArray[np.int64]) -> dict[str, _Held]:
        rows = self._database.query(
            "SELECT value, (SELECT group_concat(doc) FROM records_terms WHERE term = value) FROM json_each(?)",
            (json.dumps(words),),
        )
        found = {}
        for word, text in rows:
            held = _Held(_NONE, _NONE, len(self._gone))
            if text is not None and len(seqs):
                docs = np.fromstring(text, np.int64, sep=",")
                first, last = int(seqs[0]), int(seqs[-1])
                if last - first + 1 == len(seqs):  # no gaps: arithmetic is a search
                    at = docs[(docs >= first) & (docs <= last)] - first
                else:
                    at = np.minimum(np.searchsorted(seqs, docs), len(seqs) - 1)
                    at = at[seqs[at] == docs]
                held = _Held(*_counted(at.astype(np.int32)), len(self._gone))
            found[word] = held
        return found


_NONE = np.empty(0, np.int32)
_ONCE = np.ones(1, np.int32)
_ONCE.flags.writeable = False


def _counted(places: Places) -> tuple[Places, Places]:
    """Ascending places, each as often as the word occurs, as (places, occurrences)."""
    starts = np.flatnonzero(np.diff(places, prepend=-1))
    return places[starts], np.diff(starts, append=len(places)).astype(np.int32)


def _grouped(rows: Sequence[tuple[str, int]]) -> Iterable[tuple[str, Places, Places]]:
    first = 0
    docs = np.array([doc for _, doc in rows], np.int32)
    for at in range(1, len(rows) + 1):
        if at == len(rows) or rows[at][0] != rows[first][0]:
            # Most words of a turn that comes alone occur once in it.
            alone = at == first + 1
            where, often = (docs[first:at], _ONCE) if alone else _counted(docs[first:at])
            yield rows[first][0], where, often
            first = at
