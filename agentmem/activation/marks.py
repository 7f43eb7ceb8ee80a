"""Which ends of a prompt a host is asked to keep, and for how long, by the least expected price.

A posterior of the gap between requests, and of what is still the same after it, gives each choice its expected bill of
this request and of those that follow. Knows a host's rules and the levels of a prompt (system, core, history) by key
and size; no text, no clock, no provider.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..cache_rules import CacheRules
from ..errors import InvalidInput

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Indices = npt.NDArray[np.intp]

__all__ = ["Level", "MarkPlanner", "keep_warm", "prewarm_pays"]

#: The levels of a prompt, by rate of change.
NAMES = ("system", "core", "history")

#: What is believed before anything was seen, in requests: gaps per lifetime (and longer than all), and how much of the
#: prompt is the same at the next request (nothing, the system, system and core, all).
GAPS_BEFORE = 1.0
DEPTHS_BEFORE = (0.05, 0.1, 0.25, 1.6)
#: How far the depths after gaps of one length are drawn to those after all gaps, in requests.
DRAWN = 4.0
#: What a request counts after the next one: about the last hundred decide.
FADING = 0.99
#: The chance that another request follows, for the worth of what is kept.
GOING_ON = 0.97
#: No account of requests ends above this times what never or always caching would have cost; see `MarkPlanner`.
BOUND = 1.45


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
    (Howard 1960), for requests that go on with chance 0.97. In the steady state that is: write where the chance of the
    next use exceeds (w - 1) / (w - r).

    A second account holds what never caching and always caching (every end, the shortest lifetime) would have cost so
    far. A choice that could end above 1.45 times the cheaper of them, were always caching followed from then on, is
    not made. The account runs until `restart`.

    ``state`` is what `state` gave, for the same rules; one that can't be read is as none.
    """

    def __init__(self, rules: CacheRules, *, state: Mapping[str, Any] | None = None) -> None:
        self.rules = rules
        self._buckets = len(rules.lifetimes) + 1
        self._counts = [[0.0] * 4 for _ in range(self._buckets)]
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
        """This request was sent with the marks of `plan`: learn from it."""
        ours, always = self._choice(levels, at)
        self._planned = None
        if not self.rules.marked:
            return
        self._counts, self._growth = self._observed(levels, at)
        self._last = (at, list(levels))
        self._ours, self._always = ours.entries, always.entries
        never = float(levels[-1].tokens) if levels else 0.0
        self._account = [a + b for a, b in zip(self._account, (ours.cost, always.cost, never), strict=True)]

    def restart(self) -> None:
        """The host's cache is empty and a new account begins; what was learnt of the gaps stays."""
        self._ours, self._always, self._account = [], [], [0.0, 0.0, 0.0]
        self._last = self._planned = None

    def state(self) -> dict[str, Any]:
        """All that was learnt and is held, JSON-able, about a kilobyte."""
        last = None if self._last is None else [self._last[0], [[*_told(level)] for level in self._last[1]]]
        return {
            "counts": [[round(count, 4) for count in row] for row in self._counts],
            "growth": round(self._growth, 2),
            "last": last,
            "ours": [list(entry) for entry in self._ours],
            "always": [list(entry) for entry in self._always],
            "account": [round(cost, 2) for cost in self._account],
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            counts = [[float(count) for count in row] for row in state["counts"]]
            if [len(row) for row in counts] != [4] * self._buckets or not all(
                0 <= count < math.inf for row in counts for count in row
            ):
                return
            growth = float(state["growth"])
            ours, always = ([_entry(values) for values in state[name]] for name in ("ours", "always"))
            account = [float(cost) for cost in state["account"]]
            last = state["last"]
            told = None if last is None else (float(last[0]), [Level(*values) for values in last[1]])
            if len(account) != 3 or any(entry.life >= self._buckets - 1 for entry in ours + always):
                return
        except (KeyError, TypeError, ValueError):
            return
        self._counts, self._growth, self._account = counts, growth, account
        self._ours, self._always, self._last = ours, always, told

    # What was seen.

    def _observed(self, levels: Sequence[Level], at: float) -> tuple[list[list[float]], float]:
        """The counts and the history's growth with the gap before this request."""
        if self._last is None:
            return self._counts, self._growth
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
        counts = [[count * FADING for count in row] for row in self._counts]
        counts[bucket][depth] += 1.0
        return counts, growth

    def _chances(self, counts: Sequence[Sequence[float]]) -> list[float]:
        """The chance of each cell (gap's bucket, depth that stays), bucket by bucket."""
        rows = [sum(row) for row in counts]
        columns = [sum(row[depth] for row in counts) for depth in range(4)]
        seen = sum(rows)
        prior = sum(DEPTHS_BEFORE)
        overall = [(columns[d] + DEPTHS_BEFORE[d]) / (seen + prior) for d in range(4)]
        weights = _gaps_before(self._buckets)
        found: list[float] = []
        for row, total, weight in zip(counts, rows, weights, strict=True):
            gap = (total + weight) / (seen + sum(weights))
            found.extend(gap * (row[d] + DRAWN * overall[d]) / (total + DRAWN) for d in range(4))
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
        for level in levels:
            index = NAMES.index(level.name)
            life = wanted[index]
            if life is None or level.tokens <= done or level.tokens < rules.minimum:
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
        """At most as many marks as the host takes: the new ones, the longest entry that is read, then from the front."""
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
        short = 0
        for depth in range(len(NAMES)):
            theirs = max((entry.tokens for entry in always.entries if entry.level <= depth), default=0)
            held = max((entry.tokens for entry in ours.entries if entry.level <= depth), default=0)
            short = max(short, theirs - held)
        owed = short * (self.rules.lifetimes[0].write - self.rules.read)
        return spent + ours.cost + owed <= BOUND * min(regular + always.cost, never + total)

    def _best(self, levels: Sequence[Level], alive: Sequence[Entry], at: float) -> list[int | None]:
        """The lifetime that each level is best marked for now; None where it is not."""
        counts, growth = self._observed(levels, at)
        game = _game(len(self.rules.lifetimes))
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
        return game.solve(held, parts, valid, self._chances(counts), self.rules)


class Game:
    """The states and moves of the decision process for a number of lifetimes; the same for all hosts that have so many.

    A state says for how long each level is kept: 0 not, else the lifetime's index + 1. Those behind never have a longer
    one. In the second half of the states the history has just begun anew, and is nothing worth keeping.
    """

    def __init__(self, lifetimes: int) -> None:
        import numpy as np

        self.lifetimes = lifetimes
        held = [
            (s, c, h)
            for s in range(lifetimes + 1)
            for c in range(lifetimes + 1)
            for h in range(lifetimes + 1)
            if _falling((s, c, h))
        ]
        self.states = [(state, True) for state in held] + [(state, False) for state in held if not state[2]]
        index = {state: number for number, state in enumerate(self.states)}
        self.index = index
        moves: list[tuple[int, int, tuple[int, int, int, int]]] = []
        for number, (state, grown) in enumerate(self.states):
            for result, prices in _moves(state, lifetimes):
                if grown or not result[2]:
                    moves.append((number, index[result, grown], prices))
        self.begin: Indices = np.array([move[0] for move in moves])
        self.end: Indices = np.array([move[1] for move in moves])
        #: Per move and part of the prompt: 0 read, 1 in full, 2 + i written for lifetime i.
        self.prices: Indices = np.array([move[2] for move in moves])
        self.first: Indices = np.flatnonzero(np.r_[True, self.begin[1:] != self.begin[:-1]])
        self.count: Indices = np.diff(np.r_[self.first, len(moves)])
        self.writes = np.array([[wrote > 1 for wrote in self._written(move)] for move in moves])
        #: Per move, the lifetime of a history that is read and whose newest piece is not written; -1 for other moves.
        self.keeps: Indices = np.array([self._keeps(move) for move in moves])
        following = [
            [index[_after(state, grown, bucket, depth)] for bucket in range(lifetimes + 1) for depth in range(4)]
            for state, grown in self.states
        ]
        self.following: Indices = np.array(following)
        grown_part = np.array([[1.0, 1.0, float(grown), float(grown)] for _, grown in self.states])
        self.sizes: Floats = grown_part[self.begin]

    def _written(self, move: tuple[int, int, tuple[int, int, int, int]]) -> tuple[int, int, int]:
        """Per level, 2 where this move makes an entry for it, else 0."""
        before, after = self.states[move[0]][0], self.states[move[1]][0]
        wrote = [2 * (a != b) for a, b in zip(before, after, strict=True)]
        if move[2][3] > 1:
            wrote[2] = 2
        return wrote[0], wrote[1], wrote[2]

    def _keeps(self, move: tuple[int, int, tuple[int, int, int, int]]) -> int:
        state, grown = self.states[move[0]]
        return state[2] - 1 if state[2] and grown and move[2][3] == 1 else -1

    def solve(
        self,
        held: Sequence[int],
        parts: Sequence[float],
        valid: Sequence[bool],
        chances: Sequence[float],
        rules: CacheRules,
    ) -> list[int | None]:
        """The best move from ``held``: for each level the lifetime to mark it for, None for no new mark."""
        import numpy as np

        price = np.array([rules.read, 1.0, *(life.write for life in rules.lifetimes)])
        cost = (price[self.prices] * self.sizes * np.array(parts)).sum(axis=1)
        cost[(self.writes & ~np.array(valid)).any(axis=1)] = np.inf
        # What is not written of a history that is read will have to be paid again at the next request that reads it.
        again = np.cumsum(np.array(chances).reshape(-1, 4)[:-1, 3])
        for life, lifetime in enumerate(rules.lifetimes):
            cost[self.keeps == life] += parts[3] * GOING_ON * again[life] * (lifetime.write - rules.read)
        number = len(self.states)
        chance = np.zeros((number, number))
        np.add.at(chance, (np.arange(number)[:, None], self.following), np.array(chances))
        move = self._cheapest(cost)
        for _ in range(20):
            after = self.end[move]
            worth = np.linalg.solve(np.eye(number) - GOING_ON * chance[after], cost[move])
            better = self._cheapest(cost + GOING_ON * (chance @ worth)[self.end])
            if (better == move).all():
                break
            move = better
        state = self.index[self._plain(held), True]
        chosen = move[state]
        result, wrote = self.states[self.end[chosen]][0], self.writes[chosen]
        return [result[level] - 1 if wrote[level] else None for level in range(3)]

    def _plain(self, held: Sequence[int]) -> tuple[int, int, int]:
        """What is held, as a state: a longer lifetime behind a shorter one counts as the shorter."""
        least, found = self.lifetimes, []
        for life in held:
            least = min(least, life) if life else least
            found.append(least if life else 0)
        return found[0], found[1], found[2]

    def _cheapest(self, cost: Floats) -> Indices:
        """The cheapest move of each state; of equal ones the first."""
        import numpy as np

        least = np.minimum.reduceat(cost, self.first)
        hit = np.flatnonzero(cost <= np.repeat(least, self.count))
        return hit[np.searchsorted(hit, self.first)]


@functools.lru_cache(maxsize=4)
def _game(lifetimes: int) -> Game:
    return Game(lifetimes)


def _falling(lives: Sequence[int]) -> bool:
    kept = [life for life in lives if life]
    return all(a >= b for a, b in zip(kept, kept[1:], strict=False))


def _moves(state: tuple[int, int, int], lifetimes: int) -> list[tuple[tuple[int, int, int], tuple[int, int, int, int]]]:
    """What can be done where ``state`` is readable: the state that comes of it, and how each part is paid.

    Parts: system, core, the history but its newest piece, and that. What lies in front of the longest entry is read and
    can't be marked for another time; what lies behind may be marked, the parts in between being paid with the next mark.
    """
    depth = max((level + 1 for level in range(3) if state[level]), default=0)
    least = min((life for life in state if life), default=lifetimes)
    found: list[tuple[tuple[int, int, int], tuple[int, int, int, int]]] = []
    if depth == 3:
        found.append((state, (0, 0, 0, 1)))
        for life in range(1, least + 1):
            found.append(((state[0], state[1], life), (0, 0, 0, 1 + life)))
        return found
    options = [[state[level]] if level < depth else list(range(least + 1)) for level in range(3)]
    for s in options[0]:
        for c in options[1]:
            for h in options[2]:
                result = (s, c, h)
                if not _falling(result):
                    continue
                paid = [1, 1, 1, 1]
                price = 1
                for part in (3, 2, 1, 0):
                    level = min(part, 2)
                    if level < depth:
                        paid[part] = 0
                        continue
                    if result[level] and part != 3:
                        price = 1 + result[level]
                    elif part == 3 and result[2]:
                        price = 1 + result[2]
                    paid[part] = price
                found.append((result, (paid[0], paid[1], paid[2], paid[3])))
    return found


def _after(state: tuple[int, int, int], grown: bool, bucket: int, depth: int) -> tuple[tuple[int, int, int], bool]:
    """What is left of a state after a gap of this bucket, where only the first ``depth`` levels stayed the same."""
    left = tuple(life if life > bucket and level < depth else 0 for level, life in enumerate(state))
    return (left[0], left[1], left[2]), grown and depth != 2


def _gaps_before(buckets: int) -> list[float]:
    """The prior of the gap: shortest most likely."""
    return [GAPS_BEFORE, *[GAPS_BEFORE / 2] * (buckets - 1)]


def _thinned(entries: Sequence[Entry]) -> list[Entry]:
    """Without the ends of a history that a longer one of at least their lifetime makes needless."""
    return [
        entry
        for entry in entries
        if not any(
            other.level == entry.level and other.tokens > entry.tokens and other.life >= entry.life for other in entries
        )
    ]


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
    first answer begins, so that without it each of them pays the write.
    """
    life = rules.lifetimes[0]
    if not rules.prewarms or tokens < rules.minimum:
        return False
    ahead = life.write + chance * parallel * rules.read
    return ahead < chance * parallel * life.write


def keep_warm(rules: CacheRules, expected_gap_s: float, tokens: int) -> float | None:
    """In how many seconds a ping should renew an idle prefix, where it costs less than writing it again; else None.

    A ping reads the prefix, once a lifetime, until the next request is expected: at most (w - r) / r of them pay.
    """
    life = rules.lifetimes[0]
    if not rules.renewed or tokens < rules.minimum or expected_gap_s <= life.seconds:
        return None
    every = life.seconds * 0.9
    pings = math.ceil(expected_gap_s / every) - 1
    return every if pings * rules.read + rules.read < life.write else None
