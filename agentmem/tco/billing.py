"""What the turns of a person cost at an offer under a policy, the planner's moves with them.

Puts together who needs what (traces.py), how it is sent (policies.py), where it is kept (placing.py) and what it costs
(offers.py); adds nothing of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ..activation.cache_model import Bill
from .offers import Offer
from .placing import Placed, placed
from .policies import LEARNT, OURS, Way, bills, ways
from .traces import Person
from .workload import Workload

__all__ = ["Billed", "billed", "cheapest"]


@dataclass(frozen=True, kw_only=True)
class Billed:
    """The billed turns of one person: each request, the mean cost of a turn in the offer's unit, and in CPU-seconds of
    the machine (None at hosts)."""

    bills: list[Bill]
    cost: float
    seconds: float | None
    placed: Placed


def billed(workload: Workload, person: Person, offer: Offer, way: Way) -> Billed:
    """What this person's turns cost with one way to run a policy."""
    where = Placed()
    if way.policy in (OURS, LEARNT):
        where = placed(workload, person, offer, learn=way.policy == LEARNT)
        way = replace(way, core=where.core, core_tokens=where.core_tokens, learnt=where.learnt)
    sent = bills(person, offer.rules, way)
    outputs = [turn.reply for turn in person.turns[person.warm :]]
    cost = fmean(offer.cost(bill, output) for bill, output in zip(sent, outputs, strict=True))
    moves = where.day / (person.rate * workload.turns_session)
    machine = offer.machine
    if machine is None:
        return Billed(bills=sent, cost=cost + moves, seconds=None, placed=where)
    more = moves + (machine.lora_s if where.learnt else 0.0)
    seconds = fmean(machine.seconds(bill, output) for bill, output in zip(sent, outputs, strict=True)) + more
    paid = offer.local.computing(more / machine.cores)
    return Billed(bills=sent, cost=cost + (more if paid is None else paid), seconds=seconds, placed=where)


def cheapest(workload: Workload, persons: Sequence[Person], offer: Offer, policy: str) -> tuple[Way, list[Billed]]:
    """The policy with the setting that costs least over all of these people: a developer chooses once."""
    runs = [(way, [billed(workload, person, offer, way) for person in persons]) for way in ways(policy, offer.rules)]
    return min(runs, key=lambda run: fmean(one.cost for one in run[1]))
