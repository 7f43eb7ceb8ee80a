"""Which ends of a prompt a host is asked to keep, and for how long, by the least expected price.

A posterior of the gap between requests, and of what is still the same after it, gives each choice its expected bill of
this request and of those that follow. Knows a host's rules and the levels of a prompt (system, core, history) by key
and size; no text, no clock, no provider.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..cache_rules import CacheRules
from ..errors import InvalidInput
from .keeping import GOING_ON, keeping

__all__ = ["Level", "MarkPlanner", "keep_warm", "prewarm_pays"]

#: The levels of a prompt, by rate of change.
NAMES = ("system", "core", "history")

#: What is believed before anything was seen, in requests: gaps per lifetime (and longer than all), and how much of the
#: prompt is the same at the next request (nothing, the system, system and core, all).
GAPS_BEFORE = 1.0
DEPTHS_BEFORE = (0.05, 0.1, 0.25, 1.6)
#: A lifetime that costs a whole uncached prompt more than the shortest is not gambled on: so many gaps have to be seen
#: first that it would have covered and a shorter one not.
PROVEN = 1.9
#: How far the depths after gaps of one length are drawn to those after all gaps, in requests.
DRAWN = 1.0
#: What a request counts once another of its kind was seen: about the last hundred decide.
FADING = 0.99
#: How many entries are remembered that the latest request did not read.
OTHERS = 12
#: No account of requests ends above this times what never or always caching would have cost; see `MarkPlanner`.
BOUND = 1.5


@dataclass(frozen=True, slots=True)
class Level:
    """The end of a part of the prompt: ``system`` (tools included), ``core`` or ``history``, each with all before it.

    ``tokens`` and ``blocks`` count from the prompt's beginning. Equal keys mean equal bytes; of two histories with one
    key the longer extends the other byte for byte, so its key names where it begins.
    """

    name: str
    key: Hashable
    tokens: int
    blocks: int
    #: Index of the longest lifetime that is worth its price here, where the caller knows better than the gaps tell: a
    #: history that begins anew after every pause is not kept beyond it.
    longest: int | None = None


class Entry(NamedTuple):
    """A prefix that the host holds, as far as is known."""

    level: int
    key: str
    tokens: int
    blocks: int
    life: int
    until: float


class Choice(NamedTuple):
    """What to do at one request: the marks, what the host holds then, and what the levels' tokens cost."""

    marks: list[tuple[int, int]]
    entries: list[Entry]
    cost: float


class MarkPlanner:
    """Plans the marks of one scope's requests. Small and not thread-safe; a plan takes about 0.3 ms.

    Each choice (which levels are marked, for which lifetime) is a move of a Markov decision process whose states are
    what the host holds and whose chances come from the scope's own requests: a Dirichlet posterior of the gap (within
    each lifetime, or longer) and of how much of the prompt stays the same. It is solved exactly, by policy iteration
    (Howard 1960), for requests that go on with chance 0.93. In the steady state that is: write where the chance of the
    next use exceeds (w - 1) / (w - r).

    A second account holds what never caching and always caching (every end, the shortest lifetime) would have cost so
    far. A choice that could end above 1.5 times the cheaper of them, were always caching followed from then on, is
    not made. The account runs until `restart`.

    ``state`` is what `state` gave, for the same rules; one that can't be read is as none.
    """

    def __init__(self, rules: CacheRules, *, state: Mapping[str, Any] | None = None) -> None:
        self.rules = rules
        self._buckets = len(rules.lifetimes) + 1
        #: How often a gap of each bucket was seen, and what stayed the same after it (last of a row: all).
        self._gaps = [0.0] * self._buckets
        self._depths = [[0.0] * 4 for _ in range(self._buckets)]
        self._growth = 0.0
        self._last: tuple[float, list[Level]] | None = None
        self._ours: list[Entry] = []
        self._always: list[Entry] = []
        self._account = [0.0, 0.0, 0.0]
        self._planned: tuple[tuple[Level, ...], float, Choice, Choice] | None = None
        if state:
            self._restore(state)

    def plan(self, levels: Sequence[Level], at: float) -> list[tuple[int, int]]:
        """The marks of a request at the Unix time ``at``: (blocks in the prefix, index of the lifetime), in order.

        At most `CacheRules.marks`, longer lifetimes first; empty where caching does not pay, or the host takes none.
        Entries that are still read are marked again where a mark is left: it costs nothing, keeps within the host's
        lookback, and writes them anew should the host have lost them. Changes nothing.

        Raises `InvalidInput` for unknown, unordered or shrinking levels.
        """
        return list(self._choice(levels, at)[0].marks)

    def done(self, levels: Sequence[Level], at: float) -> None:
        """This request was sent: learn from it. Where `plan` was the last call, with the same levels, its marks and its
        time count."""
        planned = self._planned
        if planned is not None and planned[0] == tuple(levels):
            at = planned[1]  # a lifetime counts from when the request was sent
        ours, always = self._choice(levels, at)
        self._planned = None
        if not self.rules.marked:
            return
        self._gaps, self._depths, self._growth = self._observed(levels, at)
        self._last = (at, list(levels))
        self._ours = [*self._others(self._ours, levels, at), *ours.entries]
        self._always = [*self._others(self._always, levels, at), *always.entries]
        never = float(levels[-1].tokens) if levels else 0.0
        self._account = [a + b for a, b in zip(self._account, (ours.cost, always.cost, never), strict=True)]

    def held(self, at: float) -> int | None:
        """Tokens of the last request's prefix that the host still holds, as far as is known; None where it takes no
        marks or was sent nothing yet."""
        if self._last is None:
            return None
        return max((entry.tokens for entry in self._kept(self._ours, self._last[1], at)), default=0)

    def restart(self) -> None:
        """The host's cache is empty and a new account begins; what was learnt of the gaps stays."""
        self._ours, self._always, self._account = [], [], [0.0, 0.0, 0.0]
        self._last = self._planned = None

    def state(self) -> dict[str, Any]:
        """All that was learnt and is held, JSON-able, about a kilobyte."""
        last = None if self._last is None else [self._last[0], [[*_told(level)] for level in self._last[1]]]
        return {
            "gaps": [round(count, 4) for count in self._gaps],
            "depths": [[round(count, 4) for count in row] for row in self._depths],
            "growth": round(self._growth, 2),
            "last": last,
            "ours": [list(entry) for entry in self._ours],
            "always": [list(entry) for entry in self._always],
            "account": [round(cost, 2) for cost in self._account],
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            gaps = [float(count) for count in state["gaps"]]
            depths = [[float(count) for count in row] for row in state["depths"]]
            if [len(row) for row in depths] != [4] * self._buckets or len(gaps) != self._buckets:
                return
            if not all(0 <= count < math.inf for row in (gaps, *depths) for count in row):
                return
            growth = float(state["growth"])
            ours, always = ([_entry(values) for values in state[name]] for name in ("ours", "always"))
            account = [float(cost) for cost in state["account"]]
            last = state["last"]
            told = None if last is None else (float(last[0]), [Level(*values) for values in last[1]])
            if len(account) != 3 or any(entry.life >= self._buckets - 1 for entry in ours + always):
                return
        except (LookupError, TypeError, ValueError):
            return
        self._gaps, self._depths, self._growth, self._account = gaps, depths, growth, account
        self._ours, self._always, self._last = ours, always, told

    # What was seen.

    def _observed(self, levels: Sequence[Level], at: float) -> tuple[list[float], list[list[float]], float]:
        """Gaps, depths and the history's growth, with the gap before this request and what stayed the same."""
        if self._last is None:
            return self._gaps, self._depths, self._growth
        before, known = self._last
        bucket = sum(at - before >= life.seconds for life in self.rules.lifetimes)
        now = {level.name: level for level in levels}
        depth, growth = len(NAMES), self._growth
        for level in known:
            found = now.get(level.name)
            if found is None or _key(found) != _key(level) or found.tokens < level.tokens:
                depth = NAMES.index(level.name)
                break
        if depth == len(NAMES) and known and levels:
            grown = levels[-1].tokens - known[-1].tokens
            growth = float(grown) if not growth else 0.8 * growth + 0.2 * grown
        gaps = [count * FADING for count in self._gaps]
        gaps[bucket] += 1.0
        # What stays after a rare gap is remembered as long as after a common one.
        depths = [[*row] for row in self._depths]
        depths[bucket] = [count * FADING for count in depths[bucket]]
        depths[bucket][depth] += 1.0
        return gaps, depths, growth

    def _chances(self, gaps: Sequence[float], depths: Sequence[Sequence[float]]) -> list[float]:
        """The chance of each cell (gap's bucket, depth that stays), bucket by bucket."""
        columns = [sum(row[depth] for row in depths) for depth in range(4)]
        overall = [(a + b) / (sum(columns) + sum(DEPTHS_BEFORE)) for a, b in zip(columns, DEPTHS_BEFORE, strict=True)]
        weights = [GAPS_BEFORE, *[GAPS_BEFORE / 2] * (self._buckets - 1)]  # short gaps are the likeliest
        found: list[float] = []
        for seen, row, weight in zip(gaps, depths, weights, strict=True):
            gap = (seen + weight) / (sum(gaps) + sum(weights))
            found.extend(gap * (row[d] + DRAWN * overall[d]) / (sum(row) + DRAWN) for d in range(4))
        return found

    # What to do.

    def _choice(self, levels: Sequence[Level], at: float) -> tuple[Choice, Choice]:
        """Our choice, and what always caching would do."""
        planned = self._planned
        if planned is not None and planned[0] == tuple(levels) and planned[1] == at:
            return planned[2], planned[3]
        _check(levels)
        nothing = Choice([], [], float(levels[-1].tokens) if levels else 0.0)
        if not self.rules.marked or not self.rules.marks:
            return nothing, nothing
        shelf = self._kept(self._ours, levels, at)
        always = self._marked(levels, self._kept(self._always, levels, at), [0, 0, 0], at)
        wanted = self._best(levels, shelf, at)
        gaps = self._observed(levels, at)[0]
        lifetimes = self.rules.lifetimes
        proven = max(
            life
            for life, told in enumerate(lifetimes)
            if told.write - lifetimes[0].write <= 1.0 or gaps[life] >= PROVEN
        )
        for level in levels:
            index = NAMES.index(level.name)
            life = wanted[index]
            if life is not None:
                wanted[index] = min(life, proven if level.longest is None else min(proven, level.longest))
        ours = self._marked(levels, shelf, wanted, at)
        if not self._within(ours, always, levels):
            ours = self._marked(levels, shelf, [0, 0, 0], at)
        self._planned = (tuple(levels), at, ours, always)
        return ours, always

    def _kept(self, entries: Sequence[Entry], levels: Sequence[Level], at: float) -> list[Entry]:
        """The entries that a request of these levels can read now."""
        now = {NAMES.index(level.name): level for level in levels}
        return [
            entry
            for entry in entries
            if entry.until > at
            and (level := now.get(entry.level)) is not None
            and entry.key == _key(level)
            and entry.tokens <= level.tokens
            and entry.blocks <= level.blocks
        ]

    def _others(self, entries: Sequence[Entry], levels: Sequence[Level], at: float) -> list[Entry]:
        """The latest entries that this request does not read but another may: of a second conversation."""
        read = set(self._kept(entries, levels, at))
        return [entry for entry in entries if entry.until > at and entry not in read][-OTHERS:]

    def _marked(
        self, levels: Sequence[Level], alive: Sequence[Entry], wanted: Sequence[int | None], at: float
    ) -> Choice:
        """What comes of marking each level for the lifetime wanted (None: not), given what is alive."""
        rules = self.rules
        least = min((entry.life for entry in alive), default=len(rules.lifetimes) - 1)
        read = max((entry.tokens for entry in alive), default=0)
        cost, done = read * rules.read, read
        entries = [
            entry._replace(until=at + rules.lifetimes[entry.life].seconds) if rules.renewed else entry
            for entry in alive
        ]
        marks = {entry.blocks: entry.life for entry in alive}
        made: list[int] = []
        asked = [
            (index, level, life)
            for level in levels
            if (life := wanted[index := NAMES.index(level.name)]) is not None
            and level.tokens > read
            and level.tokens >= rules.minimum
        ]
        for index, level, life in asked[-max(rules.marks - bool(alive), 1) :]:
            if level.tokens == done:
                continue
            least = min(least, life)
            cost += (level.tokens - done) * rules.lifetimes[least].write
            done = level.tokens
            until = at + rules.lifetimes[least].seconds
            entries.append(Entry(index, _key(level), level.tokens, level.blocks, least, until))
            marks[level.blocks] = least
            made.append(level.blocks)
        cost += (levels[-1].tokens if levels else 0) - done
        return Choice(self._chosen(marks, made, alive), _thinned(entries), cost)

    def _chosen(self, marks: Mapping[int, int], made: Sequence[int], alive: Sequence[Entry]) -> list[tuple[int, int]]:
        """As many marks as the host takes: the new ones, the longest entry that is read, then from the front."""
        deepest = max((entry.blocks for entry in alive), default=0)
        order = [*reversed(made), deepest, *sorted(marks)]
        kept = [blocks for blocks in dict.fromkeys(order) if blocks in marks][: self.rules.marks]
        found: list[tuple[int, int]] = []
        longest = len(self.rules.lifetimes) - 1
        for blocks in sorted(kept):
            longest = min(longest, marks[blocks])  # an entry in front may have been kept for less than one behind it
            found.append((blocks, longest))
        return found

    def _within(self, ours: Choice, always: Choice, levels: Sequence[Level]) -> bool:
        """Whether the account stays below its bound even if always caching is followed from the next request on."""
        spent, regular, never = self._account
        total = levels[-1].tokens if levels else 0
        owed = _short(ours.entries, always.entries) * (self.rules.lifetimes[0].write - self.rules.read)
        return spent + ours.cost + owed <= BOUND * min(regular + always.cost, never + total)

    def _best(self, levels: Sequence[Level], alive: Sequence[Entry], at: float) -> list[int | None]:
        """The lifetime that each level is best marked for now; None where it is not."""
        gaps, depths, growth = self._observed(levels, at)
        tokens = {level.name: level.tokens for level in levels}
        ends = [0, 0, 0]
        done = 0
        for index, name in enumerate(NAMES):
            done = ends[index] = max(done, tokens.get(name, done))
        held = [0, 0, 0]
        for entry in alive:
            held[entry.level] = max(held[entry.level], entry.life + 1)
        read = max((entry.tokens for entry in alive if entry.level == 2), default=None)
        newest = min(max(growth, 1.0), ends[2] - ends[1]) if read is None else float(ends[2] - read)
        parts = [ends[0], ends[1] - ends[0], ends[2] - ends[1] - newest, max(newest, 1.0)]
        valid = [
            end >= self.rules.minimum and (index == 2 or name in tokens)
            for index, (name, end) in enumerate(zip(NAMES, ends, strict=True))
        ]
        chances = self._chances(gaps, depths)
        same = GOING_ON * (1.0 - sum(chances[2::4]))
        later = [*parts[:2], parts[2] + newest + max(growth, 1.0) * same / (1.0 - same), max(growth, 1.0)]
        return keeping(len(self.rules.lifetimes)).solve(held, parts, later, valid, chances, self.rules)


def _thinned(entries: Sequence[Entry]) -> list[Entry]:
    """Without the ends of a history that a longer one of at least their lifetime makes needless."""
    return [
        entry
        for entry in entries
        if not any(
            other.level == entry.level and other.tokens > entry.tokens and other.life >= entry.life for other in entries
        )
    ]


def _short(ours: Sequence[Entry], always: Sequence[Entry]) -> int:
    """The tokens that always caching may yet read where we have to write them, whatever stays the same until then.

    A stretch of the prompt counts if, at some time from now on and for some level up to which nothing changes, one of
    its entries reads it and none of ours does: ours may end sooner where reading does not renew them. Once it is
    written we hold it for as long as any entry of theirs lasts, so each stretch is counted once; but different ones may
    be missed by different requests, so they add up.
    """
    ends = sorted({0, *(entry.tokens for entry in (*ours, *always))})
    missed: set[int] = set()
    for at in {-math.inf, *(entry.until for entry in ours)}:
        for depth in range(len(NAMES)):
            read = [entry.tokens for entry in ours if entry.level <= depth and entry.until > at]
            theirs = [entry.tokens for entry in always if entry.level <= depth and entry.until > at]
            held, most = max(read, default=0), max(theirs, default=0)
            missed.update(place for place, end in enumerate(ends) if held < end <= most)
    return sum(ends[place] - ends[place - 1] for place in missed)


def _check(levels: Sequence[Level]) -> None:
    known, tokens, blocks = -1, 0, 0
    for level in levels:
        if level.name not in NAMES or NAMES.index(level.name) <= known:
            names = ", ".join(found.name for found in levels)
            raise InvalidInput(f"levels {names}: give system, core and history, each at most once, in this order")
        if level.tokens < tokens or level.blocks < blocks:
            raise InvalidInput(f"level {level.name} ends before the one in front of it: tokens and blocks add up")
        known, tokens, blocks = NAMES.index(level.name), level.tokens, level.blocks


def _key(level: Level) -> str:
    return level.key if isinstance(level.key, str) else repr(level.key)


def _told(level: Level) -> tuple[str, str, int, int]:
    return level.name, _key(level), level.tokens, level.blocks


def _entry(values: Sequence[Any]) -> Entry:
    level, key, tokens, blocks, life, until = values
    return Entry(int(level), str(key), int(tokens), int(blocks), int(life), float(until))


def prewarm_pays(rules: CacheRules, tokens: int, chance: float, parallel: int = 1) -> bool:
    """Whether to write a prefix before it is asked for costs less than not to.

    ``chance`` that it is used within its lifetime, by ``parallel`` requests at once: an entry is readable only once the
    first answer begins, so that without it each of them pays the write. For a single request it only saves time.
    """
    life = rules.lifetimes[0]
    if not rules.prewarms or tokens < rules.minimum:
        return False
    ahead = life.write + chance * parallel * rules.read
    return ahead < chance * parallel * life.write


def keep_warm(rules: CacheRules, expected_gap_s: float, tokens: int) -> float | None:
    """In how many seconds a ping should renew an idle prefix, where it costs less than writing it again; else None.

    ``expected_gap_s`` lies between the last request and the next one. A ping reads the prefix; at nine tenths of the
    shortest lifetime each, as many are sent as keep it until then, and at most (w - r) / r of them pay.
    """
    life = rules.lifetimes[0]
    if not rules.renewed or tokens < rules.minimum or not life.seconds <= expected_gap_s < math.inf:
        return None
    every = life.seconds * 0.9
    pings = math.ceil(expected_gap_s / every) - 1
    return every if pings * rules.read + rules.read < life.write else None
