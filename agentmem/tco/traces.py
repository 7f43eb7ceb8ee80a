"""Users drawn from a workload: for each, a stretch of turns in the middle of a life, and what its turns need to know.

A sample stratified by turns, so that the few who chat most weigh as much as they cost. Draws only; sends nothing and
knows no price. The same workload, size and seed give the same users.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist

from ..activation.replays import Recall
from ..activation.turns import Turn
from .workload import MONTH_DAYS, Workload

__all__ = ["BILLED", "WARM", "Person", "people"]

DAY = 86_400.0
#: Turns of each person that are billed, and those before them that only set the scene (fewer where there were fewer).
BILLED = 48
WARM = 32
#: Turns before the billed ones that the planner knows of at most (cores.TURNS_SEEN).
SEEN = 200
#: Spread of the gaps within a session, and of the lengths of texts: standard deviation of the logarithm.
GAPS, LENGTHS = 1.0, 0.5


@dataclass(frozen=True, kw_only=True)
class Person:
    """A stretch of one user's life.

    ``rate`` is sessions a day, ``day`` the days since the start at the first billed turn. ``turns`` are in order, the
    first ``warm`` of them not billed; ``gone`` tokens were said before all of them. ``home`` names the turn here in
    which a record was said; records without one are older. ``fill`` are records that a memory of fixed size adds to
    what each turn needs. Of the standing facts the n-th was ``needed[n]`` times in the newest ``seen`` turns before the
    first billed one: what a ledger knows then.
    """

    rate: float
    day: float
    turns: tuple[Turn, ...]
    warm: int
    gone: int
    home: dict[str, int]
    fill: tuple[tuple[tuple[str, int], ...], ...]
    standing: tuple[tuple[str, int], ...]
    seen: int
    needed: tuple[int, ...]

    def recall(self, *, without: frozenset[str] = frozenset()) -> Recall:
        """What a search gives that keeps only what may matter: what the turn needs and the prompt does not hold."""

        def found(number: int, first: int, kept: set[str]) -> Sequence[tuple[str, int]]:
            return [
                (id_, tokens)
                for id_, tokens in self.turns[number].recalled
                if id_ not in kept and id_ not in without and not first <= self.home.get(id_, -1) < number
            ]

        return found

    def top_k(self) -> Recall:
        """What a memory gives that always takes as many records, those that it needs among them."""
        needed = self.recall()

        def found(number: int, first: int, kept: set[str]) -> Sequence[tuple[str, int]]:
            mine = needed(number, first, kept)
            return [*mine, *self.fill[number][: max(len(self.fill[number]) - len(mine), 0)]]

        return found


def people(workload: Workload, count: int, seed: int = 0, *, day: float | None = None) -> list[Person]:
    """``count`` users, each standing for an equal part of all turns, by how often they chat.

    Person i is drawn from the i-th of ``count`` strata of equally many turns (sessions a day are log-normal, and so is
    their distribution weighted by sessions: its mean is greater by the variance); the time of life is stratified too,
    independently (a Latin hypercube: McKay, Beckman, Conover, Technometrics 21(2), 1979), or is ``day`` for all.
    """
    rng = random.Random(f"{seed} people")  # noqa: S311
    ages = list(range(count))
    rng.shuffle(ages)
    found = []
    for stratum in range(count):
        own = random.Random(f"{seed} person {stratum} of {count}")  # noqa: S311
        level = NormalDist().inv_cdf(min(max((stratum + own.random()) / count, 1e-9), 1 - 1e-9))
        rate = workload.sessions_day * math.exp(workload.spread**2 / 2 + workload.spread * level)
        drawn = workload.months * MONTH_DAYS * (ages[stratum] + own.random()) / count
        found.append(_person(workload, rate, drawn if day is None else day, own))
    return found


def _person(workload: Workload, rate: float, day: float, rng: random.Random) -> Person:
    turns_before = rate * workload.turns_session * min(day, workload.retention_days)
    warm = min(WARM, round(turns_before))
    each = workload.message_tokens + workload.reply_tokens
    gone = round((turns_before - warm) * each) if turns_before > warm else 0
    # A user with no past began now; else the stretch begins somewhere in a session.
    stops = [max(1.0 / workload.turns_session, 1e-9), workload.gap_s]
    at, session, turns = day * DAY, 0, list[Turn]()
    standing = [(f"standing {n}", _length(workload.record_tokens, rng)) for n in range(workload.standing_facts)]
    chances = list(accumulate(1.0 / (n + 1) for n in range(workload.standing_facts)))
    seen = min(round(turns_before), SEEN)
    asks = round(seen * workload.recalled_tokens / workload.record_tokens * workload.standing_share)
    needed = Counter(rng.choices(range(len(standing)), cum_weights=chances, k=asks))
    home: dict[str, int] = {}
    fill: list[tuple[tuple[str, int], ...]] = []
    for number in range(warm + BILLED):
        if number:
            ends = rng.random() < stops[0]
            session += ends
            # Sessions follow each other by chance; the time within them is short beside that between them.
            at += rng.expovariate(rate / DAY) if ends else rng.lognormvariate(math.log(stops[1]), GAPS)
        needs = _needs(workload, number, round(turns_before) - warm, (standing, chances), rng)
        for id_, _ in needs:
            if id_.startswith("turn "):
                home[id_] = int(id_.split()[1])
        fill.append(
            tuple((f"filler {number} {n}", _length(workload.record_tokens, rng)) for n in range(workload.top_k))
        )
        turns.append(
            Turn(
                id=f"turn {number}",
                at=at,
                session=f"session {session}",
                system=workload.system_tokens,
                core=0,
                message=_length(workload.message_tokens, rng),
                reply=_length(workload.reply_tokens, rng),
                recalled=tuple(needs),
            )
        )
    return Person(
        rate=rate,
        day=day,
        turns=tuple(turns),
        warm=warm,
        gone=gone,
        home=home,
        fill=tuple(fill),
        standing=tuple(standing),
        seen=seen,
        needed=tuple(needed[n] for n in range(len(standing))),
    )


def _needs(
    workload: Workload,
    number: int,
    before: int,
    standing: tuple[Sequence[tuple[str, int]], Sequence[float]],
    rng: random.Random,
) -> list[tuple[str, int]]:
    """The records that turn ``number``, with ``before`` turns before all of them, needs: as many as make up
    `Workload.recalled_tokens` on the average. A user's first turns find little.

    ``standing`` are the standing facts and the running sums of their chances.
    """
    most = workload.recalled_tokens / workload.record_tokens
    count = math.floor(most) + (rng.random() < most % 1)
    past = before + number
    found: dict[str, int] = {}
    for _ in range(count):
        if rng.random() < workload.standing_share:
            id_, tokens = rng.choices(standing[0], cum_weights=standing[1])[0]
        elif past:
            # What was said lately is asked for more often: log-uniform in the number of turns ago.
            ago = round(past ** rng.random())
            id_ = f"turn {number - ago}" if ago <= number else f"old {past - ago}"
            tokens = _length(workload.record_tokens, rng)
        else:
            continue
        found.setdefault(id_, tokens)
    return list(found.items())


def _length(mean: float, rng: random.Random) -> int:
    """A number of tokens of this mean, log-normal, at least 1."""
    return max(1, round(mean * math.exp(LENGTHS * rng.gauss(0, 1) - LENGTHS**2 / 2)))
