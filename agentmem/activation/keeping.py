"""The decision process behind the marks of a prompt: what may be kept of it, for how long, and what that is worth.

States, moves and chances for a system, core and history that a host keeps for one of its lifetimes each. Knows prices
and sizes as numbers; no entries, no keys, no time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..cache_rules import CacheRules

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Indices = npt.NDArray[np.intp]

__all__ = ["GOING_ON", "Keeping", "keeping"]

#: The chance that another request follows, for the worth of what is kept.
GOING_ON = 0.93


class Keeping:
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

    def solve(  # noqa: PLR0917 - the numbers of one decision
        self,
        held: Sequence[int],
        parts: Sequence[float],
        later: Sequence[float],
        valid: Sequence[bool],
        chances: Sequence[float],
        rules: CacheRules,
    ) -> list[int | None]:
        """The best move from ``held``: for each level the lifetime to mark it for, None for no new mark.

        ``parts`` are the tokens of system, core, history and its newest piece at this request, ``later`` on average at
        those that follow.
        """
        import numpy as np

        # What is not written of a history that is read will have to be paid again at the next request that reads it.
        again = np.cumsum(np.array(chances).reshape(-1, 4)[:-1, 3])
        cost_now, cost = (self._costs(sizes, valid, again, rules) for sizes in (parts, later))
        number = len(self.states)
        chance = np.zeros((number, number))
        np.add.at(chance, (np.arange(number)[:, None], self.following), np.array(chances))
        move, ahead = self._cheapest(cost), np.zeros(len(cost))
        for _ in range(20):
            after = self.end[move]
            worth = np.linalg.solve(np.eye(number) - GOING_ON * chance[after], cost[move])
            ahead = GOING_ON * (chance @ worth)[self.end]
            better = self._cheapest(cost + ahead)
            if (better == move).all():
                break
            move = better
        chosen = self._cheapest(cost_now + ahead)[self.index[self._plain(held), True]]
        result, wrote = self.states[self.end[chosen]][0], self.writes[chosen]
        return [result[level] - 1 if wrote[level] else None for level in range(3)]

    def _costs(self, parts: Sequence[float], valid: Sequence[bool], again: Floats, rules: CacheRules) -> Floats:
        """What each move costs at its request, infinite where a mark would stand below the minimum."""
        import numpy as np

        price = np.array([rules.read, 1.0, *(life.write for life in rules.lifetimes)])
        cost: Floats = (price[self.prices] * self.sizes * np.array(parts)).sum(axis=1)
        cost[(self.writes & ~np.array(valid)).any(axis=1)] = np.inf
        for life, lifetime in enumerate(rules.lifetimes):
            cost[self.keeps == life] += parts[3] * GOING_ON * again[life] * (lifetime.write - rules.read)
        return cost

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
def keeping(lifetimes: int) -> Keeping:
    """The process for hosts with so many lifetimes; made once."""
    return Keeping(lifetimes)


def _falling(lives: Sequence[int]) -> bool:
    kept = [life for life in lives if life]
    return all(a >= b for a, b in itertools.pairwise(kept))


def _moves(state: tuple[int, int, int], lifetimes: int) -> list[tuple[tuple[int, int, int], tuple[int, int, int, int]]]:
    """What can be done where ``state`` is readable: the state that comes of it, and how each part is paid.

    Parts: system, core, the history but its newest piece, and that. What lies in front of the longest entry is read and
    can't be marked for another time; what lies behind may be marked, the parts in between are paid with the next mark.
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
