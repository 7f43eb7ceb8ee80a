"""Where one way to remember overtakes another: by the length of what was said, by turns a session, by users.

Small samples of the same users at a few points, and the crossing between two of them on a line. Knows what an offer
costs at a point; draws no table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from ..figures import Curve
from ..planner.places import MOST_DAYS
from .billing import cheapest
from .offers import Offer
from .placing import placed
from .policies import FULL, FULL_CACHED, LEARNT, OURS
from .report import BreakEven, Line
from .traces import Person, people
from .workload import MONTH_DAYS, Workload

__all__ = ["DAYS", "TURNS", "can_learn", "crossing", "curves", "drawn", "found"]

#: Days of history, and turns a session, at which costs are compared; and users drawn at each.
DAYS = (0.5, 3.0, 14.0, 60.0, 360.0)
TURNS = (1.0, 4.0, 16.0, 64.0)
DRAWN = 4
#: Users drawn to see when a LoRA pays.
LEARNERS = 64
#: The part of a day that a machine can be busy before users have to wait.
BUSY = 0.5


def can_learn(offer: Offer) -> bool:
    """Whether the planner may put records into a LoRA there."""
    return offer.machine is not None and offer.machine.learn_s is not None


def curves(
    workload: Workload, offers: Sequence[Offer], policies: Sequence[str], seed: int
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """The cost of a turn of each policy at each offer after so many days, for users of one age."""
    return _grid(offers, policies, DAYS, lambda day: (workload, day), seed)


def found(
    workload: Workload,
    offers: Sequence[Offer],
    lines: Sequence[Line],
    policies: Sequence[str],
    by_day: Mapping[tuple[str, str], Sequence[tuple[float, float]]],
    *,
    seed: int,
) -> list[BreakEven]:
    """The points at which agentmem overtakes each other policy, and a machine of one's own each host."""
    told: list[BreakEven] = []
    if OURS in policies:
        lengths = [policy for policy in policies if policy not in (OURS, LEARNT, FULL, FULL_CACHED)]
        day = workload.months * MONTH_DAYS / 2
        by_turns = _grid(
            offers, [OURS, *lengths] if lengths else [], TURNS, lambda n: (_longer_sessions(workload, n), day), seed
        )
        for offer in offers:
            told += [
                _where(offer, by_day, other, "days of history") for other in (FULL, FULL_CACHED) if other in policies
            ]
            told += [_where(offer, by_turns, other, "turns a session") for other in lengths]
    best = {
        line.offer: min((one for one in lines if one.offer == line.offer), key=lambda one: one.cost) for line in lines
    }
    for mine in offers:
        if mine.machine is not None and mine.fixed_month:
            told += [_machine(workload, mine, best, other) for other in offers if other.prices is not None]
    if LEARNT in policies:
        persons = people(workload, LEARNERS, seed)
        told += [_lora(workload, persons, offer) for offer in offers if can_learn(offer)]
    return told


def crossing(ours: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float | None:
    """From which x on ``ours`` is lower than ``other``, by straight lines between common points over the logarithm of
    x; None where it is not lower at the last point, or never was higher."""
    gaps = [(x, mine - theirs) for (x, mine), (_, theirs) in zip(ours, other, strict=True)]
    if gaps[-1][1] >= 0:
        return None
    for (x0, before), (x1, after) in zip(reversed(gaps[:-1]), reversed(gaps[1:]), strict=True):
        if before >= 0:
            share = before / (before - after)
            return math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0)))
    return None


def _where(
    offer: Offer, points: Mapping[tuple[str, str], Sequence[tuple[float, float]]], other: str, axis: str
) -> BreakEven:
    ours, theirs = points[offer.name, OURS], points[offer.name, other]
    at = crossing(ours, theirs)
    always = at is None and ours[-1][1] < theirs[-1][1]
    span = f"looked at from {ours[0][0]:g} to {ours[-1][0]:g}"
    return BreakEven.model_validate(
        {
            "offer": offer.name, "cheaper": OURS, "dearer": other, "axis": axis, "at": at, "always": always,
            "note": span,
        }
    )  # fmt: skip


def _grid(
    offers: Sequence[Offer],
    policies: Sequence[str],
    points: Sequence[float],
    at: Callable[[float], tuple[Workload, float]],
    seed: int,
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    made: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for point in points:
        workload, day = at(point)
        persons = people(workload, DRAWN, seed, day=day)
        for offer in offers:
            for policy in policies:
                if policy == LEARNT:
                    continue
                _, run = cheapest(workload, persons, offer, policy)
                made.setdefault((offer.name, policy), []).append((point, fmean(one.cost for one in run)))
    return made


def _longer_sessions(workload: Workload, turns: float) -> Workload:
    """As many turns a day in sessions of ``turns``."""
    sessions = workload.turns_day / turns
    return workload.model_copy(update={"turns_session": turns, "sessions_day": sessions})


def _machine(workload: Workload, mine: Offer, best: Mapping[str, Line], other: Offer) -> BreakEven:
    """From how many users on machines of one's own are cheaper than a host, each with its cheapest policy."""
    here, there = best[mine.name], best[other.name]
    assert mine.fixed_month is not None
    assert here.seconds is not None
    assert mine.machine is not None
    turns = workload.turns_day * MONTH_DAYS  # of a user a month
    busy = here.seconds / mine.machine.cores * turns
    most = BUSY * MONTH_DAYS * 86_400 / busy  # users that one machine can take
    needed = mine.fixed_month / (there.cost * turns)
    note = f"one machine takes {most:,.0f} users at {BUSY:.0%} load ({here.policy} against {there.policy})"
    cheaper = needed <= most
    return BreakEven(
        offer=mine.name,
        cheaper=mine.name,
        dearer=other.name,
        axis="users",
        at=float(math.ceil(needed)) if cheaper else None,
        note=note,
    )


def _lora(workload: Workload, persons: Sequence[Person], offer: Offer) -> BreakEven:
    """How many days of use pay for teaching a LoRA a user's most needed fact, for the median turn's user."""
    where = [placed(workload, person, offer, learn=True) for person in persons]
    days = sorted(math.inf if one.lora_days is None else one.lora_days for one in where)
    at = days[len(days) // 2]
    taught = sum(bool(one.learnt) for one in where) / len(where)
    return BreakEven(
        offer=offer.name,
        cheaper="teaching a LoRA the most needed fact",
        dearer="the cheaper of recalling it and the core block",
        axis="days of use",
        at=at if math.isfinite(at) else None,
        note=f"the planner teaches users who make {taught:.0%} of all turns; it counts on {MOST_DAYS:g} days at most, "
        "or until an edit is likely",
    )


def drawn(points: Mapping[tuple[str, str], Sequence[tuple[float, float]]]) -> list[tuple[str, Curve]]:
    """The points as curves for plots, each with its offer."""
    return [(offer, Curve(name=policy, points=tuple(values))) for (offer, policy), values in points.items()]
