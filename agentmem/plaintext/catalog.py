"""What a search must know of every record, as arrays in RAM: whose it is, when it holds, its turn's neighbours.

Derived from the table ``records`` and kept in step by the table ``changes``, so that another process's commit is seen
by the next search. Knows nothing of texts beyond their length and whether they ask or name a time; nothing is stored.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from agentmem.database import Database
from agentmem.types import LEVELS, Scope

from .drafts import ROLES, check_scope
from .postings import Postings

if TYPE_CHECKING:
    import numpy.typing as npt

    Bools = npt.NDArray[np.bool_]
    Places = npt.NDArray[np.int32]
    Rows = npt.NDArray[np.int64]
    Codes = npt.NDArray[np.int32]
    Seconds = npt.NDArray[np.float64]

__all__ = ["TIMED", "Catalog", "View"]

log = logging.getLogger("agentmem")

#: Words that place what is said in time, in lower case. The look-ahead makes it three times as fast.
TIMED = re.compile(
    r"\b(?=[adfijlmnorsty])(?:yesterday|to(?:day|night|morrow)|"
    r"last (?:night|week|month|year|mon|tue|wed|thu|fri|sat|sun)\w*|"
    r"next (?:week|month|year|weekend)|ago|this (?:week|month|year|morning|weekend)|since|in \d{4}|"
    r"few (?:days|weeks|months)|recently|just|jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|"
    r"aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b"
)
#: Rows read in one statement: what a statement holds of the database's lock is bounded.
CHUNK = 10_000
#: Rows of all tenants' views together that are kept; the views used longest ago go first.
MOST_ROWS = 4_000_000
#: Masks of scopes that a view remembers.
MASKS = 16
#: Deleted rows that a view carries along before it is read anew, and the share of all its rows.
FEW_DEAD, SHARE_DEAD = 1024, 4
#: The arrays that have one entry per record, and what each starts with. 60 bytes a record in all, up to
#: twice that while they grow.
COLUMNS: dict[str, tuple[Any, Any]] = {
    "seq": (np.int64, 0),
    "group": (np.int32, 0),
    "document": (np.int32, 0),
    "role": (np.int8, 0),
    "name": (np.int32, -1),
    "asks": (np.bool_, False),
    "timed": (np.bool_, False),
    "live": (np.bool_, True),
    "length": (np.int32, 0),
    "at_s": (np.float64, np.nan),
    "from_s": (np.float64, -np.inf),
    "until_s": (np.float64, np.inf),
    "previous": (np.int32, -1),
    "next": (np.int32, -1),
}
_READ = (
    f"SELECT seq, {', '.join(LEVELS)}, role, CAST(name AS BLOB), CAST(text AS BLOB), at_s, from_s, until_s, sz "
    "FROM json_each(?) AS wanted CROSS JOIN records ON seq = wanted.value "
    "LEFT JOIN records_fts_docsize AS words ON words.id = seq"
)
#: What tells one table's places from another's, in the whole process.
_GENERATIONS = itertools.count(1)
_ROLE = {role: code for code, role in enumerate(ROLES)}


class View:
    """The records that handles of one tenant may ever see, in order of arrival: arrays of n, read only.

    ``seq`` int64 ascending; ``group`` int32 (the record's full scope, a row of ``scopes``); ``document`` int32 (the
    session as one document; a record without a session is one by itself), below ``documents``; ``role`` int8 (a place
    in `drafts.ROLES`); ``name`` int32 (a place in ``names``, -1 for none); ``asks``, ``timed`` bool (the text ends with
    a question mark, names a time); ``length`` int32 (words of text and name, as FTS5 counts them); ``at_s`` float64
    (NaN for none), ``from_s``, ``until_s`` float64 (infinite for none); ``previous``, ``next`` int32 (the neighbours in
    the same session, -1 for none); ``live`` bool (False: forgotten, and in nothing that `allowed` returns).
    """

    seq: Rows
    group: Codes
    document: Codes
    role: npt.NDArray[np.int8]
    name: Codes
    asks: Bools
    timed: Bools
    live: Bools
    length: Codes
    at_s: Seconds
    from_s: Seconds
    until_s: Seconds
    previous: Places
    next: Places

    def __init__(self, table: _Table) -> None:
        self._table = table
        self.n = table.n
        for name, column in table.columns.items():
            setattr(self, name, column[: table.n])
        self.names: Sequence[str] = table.names
        self.documents = table.documents
        self.scopes: Codes = table.scopes[: table.groups]
        self.postings: Postings = table.postings
        self.version = table.version
        self.generation = table.generation
        self.tenant = table.tenant

    def __len__(self) -> int:
        return self.n

    @property
    def tenants(self) -> list[str]:
        """The tenants that have records here, '' for those of none."""
        # A copy first: a newer view's table adds to the same dict, in another thread.
        return [tenant for tenant in list(self._table.codes[0]) if tenant or self._table.shared]

    def level(self, name: str) -> Codes:
        """The code of each record's scope level: int32 [n], 0 where it is not set."""
        codes: Codes = self.scopes[:, LEVELS.index(name)][self.group]
        return codes

    def allowed(self, scope: Scope, at: float) -> Bools:
        """Which records ``scope`` may see and hold at ``at`` (UTC seconds): bool [n], not to be written to.

        The same rows as the conditions `conditions.visible` and `conditions.valid_at`.
        """
        return self._table.allowed(check_scope(scope), at, self)

    def places(self, seqs: Rows | Sequence[int]) -> Places:
        """Where these rows are: int32, -1 for a row that is not here or is gone."""
        wanted = np.asarray(seqs, np.int64)
        if not self.n:
            return np.full(len(wanted), -1, np.int32)
        first = int(self.seq[0])
        if int(self.seq[-1]) - first + 1 == self.n:  # no gaps: arithmetic is a search
            at = np.clip(wanted - first, 0, self.n - 1)
        else:
            at = np.minimum(np.searchsorted(self.seq, wanted), self.n - 1)
        return np.where((self.seq[at] == wanted) & self.live[at], at, -1).astype(np.int32)


class Catalog:
    """The views of one folder. Safe to use from many threads; must not be called inside a `Database.write` block."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.start()
        _ALL.add(self)

    def start(self) -> None:
        """Begin with nothing in RAM and a free lock, as a forked child has to."""
        self._lock = threading.RLock()
        self._tables: OrderedDict[str | None, _Table] = OrderedDict()

    def view(self, tenant: str | None) -> View:
        """The rows a handle of this tenant may ever see (its own and those of no tenant; None: all), as of now."""
        with self._lock:
            table = self._tables.get(tenant)
            if table is None or not self._follow(table):
                table = self._load(tenant)
            self._tables.move_to_end(tenant)
            return self._tables[tenant].view()

    def clear(self) -> None:
        """Let go of the memory; the next view is read anew."""
        with self._lock:
            self._tables.clear()

    def _load(self, tenant: str | None) -> _Table:
        self._tables.pop(tenant, None)
        table = _Table(tenant, next(_GENERATIONS), self._database)
        table.change = last_change(self._database)
        # The order is the table's own: an index that covers seq and tenant would have to be sorted.
        mine, values = ("", []) if tenant is None else ("WHERE tenant IN ('', ?)", [tenant])
        seqs = sorted(row[0] for row in self._database.query(f"SELECT seq FROM records {mine}", values))
        complete = len(seqs) <= Postings.SMALL
        table.postings.complete = complete
        for first in range(0, len(seqs), CHUNK):
            rows = self._read(seqs[first : first + CHUNK])
            table.append(rows)
            if complete:
                table.index(rows)
        self._tables[tenant] = table
        while len(self._tables) > 1 and sum(kept.n for kept in self._tables.values()) > MOST_ROWS:
            self._tables.popitem(last=False)
        return table

    def _read(self, seqs: Sequence[int]) -> list[Any]:
        return self._database.query(_READ, (json.dumps(seqs),))

    def _follow(self, table: _Table) -> bool:
        """Bring a view up to the last committed change. False where that takes reading it anew."""
        changes = changes_since(self._database, table.change)
        if changes is None:
            log.info("the catalog is behind the database by too much or belongs to another history: reading it anew")
            return False
        if not changes:
            return True
        final = {row[2]: row[3] for row in changes if table.tenant is None or row[1] in ("", table.tenant)}
        if final:
            seqs = sorted(seq for seq, added in final.items() if added)
            rows = [row for first in range(0, len(seqs), CHUNK) for row in self._read(seqs[first : first + CHUNK])]
            found = {row[0] for row in rows}
            # A view that a search holds is not written to: this one goes on with a copy.
            table = self._tables[table.tenant] = table.unshared()
            try:
                if not table.apply(rows, [seq for seq in final if seq not in found]):
                    return False
            except BaseException:  # Ctrl-C, no memory: what is half applied must not be gone on with
                del self._tables[table.tenant]
                raise
        table.change = changes[-1][0], changes[-1][4]
        return True


def last_change(database: Database) -> tuple[int, int]:
    """The number and nonce of the last committed change, (0, 0) where there is none."""
    rows = database.query("SELECT change, nonce FROM changes ORDER BY change DESC LIMIT 1")
    return (rows[0][0], rows[0][1]) if rows else (0, 0)


def changes_since(database: Database, change: tuple[int, int]) -> list[Any] | None:
    """The changes (number, tenant, seq, added, nonce) behind this one, or None where they can't be told any more."""
    number, nonce = change
    changes = database.query(
        "SELECT change, tenant, seq, added, nonce FROM changes WHERE change >= ? ORDER BY change", (number,)
    )
    if not number:
        return changes if not changes or changes[0][0] == 1 else None
    if not changes or (changes[0][0], changes[0][4]) != (number, nonce):
        return None
    return changes[1:]


class _Table:
    """The growing arrays behind the views of one tenant. Rows keep their places for its whole life (`generation`)."""

    def __init__(self, tenant: str | None, generation: int, database: Database) -> None:
        self.tenant = tenant
        self.generation = generation
        self.version = 0
        self.change: tuple[int, int] = (0, 0)
        self.n = self.groups = self.documents = self.dead = 0
        self.columns: dict[str, Any] = {name: np.empty(0, kind) for name, (kind, _) in COLUMNS.items()}
        self.codes: list[dict[str, int]] = [{"": 0} for _ in LEVELS]
        self.group_codes: dict[tuple[str, ...], int] = {}
        self.scopes: Any = np.empty((0, len(LEVELS)), np.int32)
        self.tails: Any = np.empty(0, np.int32)  # the last place of each group that has a session
        self.document_of: Any = np.empty(0, np.int32)  # the document of each group that has a session
        self.names: list[str] = []
        self.name_codes: dict[str, int] = {}
        self.shared = False
        self.bounded = False
        self.masks: OrderedDict[Scope, tuple[float, float, Bools]] = OrderedDict()
        self.postings = Postings(database)
        self.views: weakref.WeakSet[View] = weakref.WeakSet()
        self.lock = threading.Lock()

    def view(self) -> View:
        view = View(self)
        self.views.add(view)
        return view

    def unshared(self) -> _Table:
        """This table, or a copy of it where a view of it is in use. The postings are shared: they know places only."""
        if not self.views:
            return self
        other = _Table.__new__(_Table)
        other.__dict__.update(self.__dict__)
        other.columns = {name: column[: self.n].copy() for name, column in self.columns.items()}
        other.scopes, other.tails = self.scopes.copy(), self.tails.copy()
        other.document_of = self.document_of.copy()
        other.names = [*self.names]
        other.masks = OrderedDict()
        other.views = weakref.WeakSet()
        other.lock = threading.Lock()
        return other

    # ---- reading -----------------------------------------------------------------------------------------------

    def allowed(self, scope: Scope, at: float, view: View) -> Bools:
        with self.lock:
            if view.version == self.version and scope in self.masks:
                since, until, mask = self.masks[scope]
                if since <= at < until:
                    return mask
            mask = self._seen(scope, view)[view.group] & view.live
            since, until = -np.inf, np.inf
            if self.bounded:
                mask &= (view.from_s <= at) & (view.until_s > at)
                edges = np.concatenate([view.from_s, view.until_s])
                since = float(edges[edges <= at].max(initial=-np.inf))
                until = float(edges[edges > at].min(initial=np.inf))
            mask.flags.writeable = False
            if view.version == self.version:
                self.masks[scope] = since, until, mask
                self.masks.move_to_end(scope)
                while len(self.masks) > MASKS:
                    self.masks.popitem(last=False)
            return mask

    def _seen(self, scope: Scope, view: View) -> Bools:
        """Of each group whether the scope sees it: it lies beneath the scope, or at a level above that shares."""
        beneath = np.ones(len(view.scopes), bool)
        above = np.ones(len(view.scopes), bool)
        for column, (_, value) in enumerate(scope.levels()):
            codes = view.scopes[:, column]
            if value is None:
                above &= codes == 0
            else:
                own = codes == self.codes[column].get(value, -1)
                beneath &= own
                above &= own | (codes == 0)
        return beneath | above

    # ---- writing -----------------------------------------------------------------------------------------------

    def append(self, rows: Sequence[Any]) -> None:
        """Rows of `_READ` with numbers above all that are here, ascending."""
        if not rows:
            return
        first, self.n = self.n, self.n + len(rows)
        self._reserve(self.n)
        self._write(slice(first, self.n), rows)
        self._link(first)
        self._changed()

    def index(self, rows: Sequence[Any], changed: Sequence[int] = ()) -> None:
        """Give these rows' words to the postings; ``changed`` are the places of those that were here already."""
        places = np.searchsorted(self.columns["seq"][: self.n], [row[0] for row in rows]).tolist()
        words = [(_text(row[7]), None if row[6] is None else _text(row[6])) for row in rows]
        self.postings.add([(place, *texts) for place, texts in zip(places, words, strict=True)], self.n, changed)

    def apply(self, rows: Sequence[Any], gone: Iterable[int]) -> bool:
        """Rows that came or changed, as they are now, and rows that are gone. False where only reading all helps."""
        seq = self.columns["seq"][: self.n]
        last = int(seq[-1]) if self.n else 0
        new = [row for row in rows if row[0] > last]
        old = [row for row in rows if row[0] <= last]
        places = np.searchsorted(seq, [row[0] for row in old])
        if old:
            if (seq[places] != [row[0] for row in old]).any() or not self.columns["live"][places].all():
                return False
            before = self.columns["group"][places].copy()
            self._write(places, old)
            if (before != self.columns["group"][places]).any():
                return False
        self.append(new)
        if old or new:
            self.index([*old, *new], places.tolist())
        for number in gone:
            self._remove(number)
        self._changed()
        return self.dead <= max(FEW_DEAD, self.n // SHARE_DEAD)

    def _changed(self) -> None:
        self.version += 1
        self.masks.clear()

    def _reserve(self, count: int) -> None:
        for name, column in self.columns.items():
            if len(column) < count:
                larger = np.full(max(count, 2 * len(column)), COLUMNS[name][1], COLUMNS[name][0])
                larger[: len(column)] = column
                self.columns[name] = larger

    def _write(self, places: Any, rows: Sequence[Any]) -> None:
        seq, *levels, role, name, text, at_s, from_s, until_s, sizes = zip(*rows, strict=True)
        columns = self.columns
        columns["seq"][places] = seq
        columns["group"][places] = [self._group(group) for group in zip(*levels, strict=True)]
        columns["role"][places] = [_ROLE.get(value, -1) for value in role]
        columns["name"][places] = [-1 if value is None else self._name(_text(value)) for value in name]
        texts = [_text(value) for value in text]
        columns["asks"][places] = [value.rstrip().endswith(("?", "\uff1f")) for value in texts]
        columns["timed"][places] = [TIMED.search(value.lower()) is not None for value in texts]
        columns["length"][places] = [_words(value) for value in sizes]
        columns["at_s"][places] = [np.nan if value is None else value for value in at_s]
        columns["from_s"][places] = [-np.inf if value is None else value for value in from_s]
        columns["until_s"][places] = [np.inf if value is None else value for value in until_s]
        self.bounded = self.bounded or any(value is not None for value in (*from_s, *until_s))

    def _group(self, levels: tuple[str, ...]) -> int:
        code = self.group_codes.get(levels)
        if code is None:
            code = self.group_codes[levels] = self.groups
            self.groups += 1
            if self.groups > len(self.scopes):
                size = max(64, 2 * len(self.scopes))
                self.scopes = _grown(self.scopes, size, 0)
                self.tails, self.document_of = _grown(self.tails, size, -1), _grown(self.document_of, size, -1)
            for column, value in enumerate(levels):
                self.scopes[code, column] = self.codes[column].setdefault(value, len(self.codes[column]))
            self.shared = self.shared or not levels[0]
        return code

    def _name(self, name: str) -> int:
        code = self.name_codes.get(name)
        if code is None:
            code = self.name_codes[name] = len(self.names)
            self.names.append(name)
        return code

    def _link(self, first: int) -> None:
        """Neighbours and documents of the rows from ``first`` on."""
        columns, count = self.columns, self.n
        group = columns["group"][first:count]
        session = self.scopes[group, -1] != 0
        lone = np.flatnonzero(~session) + first
        columns["document"][lone] = np.arange(self.documents, self.documents + len(lone))
        self.documents += len(lone)
        turns = np.flatnonzero(session)
        if not len(turns):
            return
        places = (turns[np.argsort(group[turns], kind="stable")] + first).astype(np.int32)
        groups = columns["group"][places]
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        heads = groups[starts]
        previous = np.empty_like(places)
        previous[1:] = places[:-1]
        previous[starts] = self.tails[heads]
        columns["previous"][places] = previous
        linked = previous >= 0
        columns["next"][previous[linked]] = places[linked]
        columns["next"][places[np.append(starts[1:], len(places)) - 1]] = -1
        self.tails[heads] = places[np.append(starts[1:], len(places)) - 1]
        new = heads[self.document_of[heads] < 0]
        self.document_of[new] = np.arange(self.documents, self.documents + len(new))
        self.documents += len(new)
        columns["document"][places] = self.document_of[groups]

    def _remove(self, number: int) -> None:
        """A row is gone: it keeps its place, and its neighbours become each other's."""
        place = int(np.searchsorted(self.columns["seq"][: self.n], number))
        columns = self.columns
        if place >= self.n or columns["seq"][place] != number or not columns["live"][place]:
            return
        columns["live"][place] = False
        before, after = int(columns["previous"][place]), int(columns["next"][place])
        if before >= 0:
            columns["next"][before] = after
        if after >= 0:
            columns["previous"][after] = before
        columns["previous"][place] = columns["next"][place] = -1
        group = columns["group"][place]
        if self.tails[group] == place:
            self.tails[group] = before
        self.dead += 1


def _grown(array: Any, size: int, fill: int) -> Any:
    larger = np.full((size, *array.shape[1:]), fill, array.dtype)
    larger[: len(array)] = array
    return larger


def _text(value: bytes) -> str:
    """A text as it is stored; a damaged one must not keep all others from being found."""
    return value.decode(errors="replace")


def _words(sizes: bytes | None) -> int:
    """How many words FTS5 counted in a row: the sum of a few varints, as its table of sizes holds them."""
    if not sizes:
        return 0
    if max(sizes) < 128:
        return sum(sizes)
    total = value = 0
    for byte in sizes:  # SQLite's varint: 7 bits a byte, high bits first; FTS5's sizes fit in fewer than nine bytes
        value = value << 7 | byte & 127
        if byte < 128:
            total, value = total + value, 0
    return total


#: The catalogs whose locks a forked child must not find held.
_ALL: weakref.WeakSet[Catalog] = weakref.WeakSet()


def _after_fork() -> None:
    for catalog in _ALL:
        catalog.start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
