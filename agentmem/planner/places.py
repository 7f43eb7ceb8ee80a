"""What a group of records costs a day in each place that it can live in, and once to bring it there.

The formulas of the three kinds of memory with measured numbers in them; knows no store, chooses nothing. A record in
the plain costs its tokens each time it is recalled; at the head it costs them on every request, read from a cache or
not; as pages of states the same, cheaper, and its bytes; as a trained prefix fewer positions; in a LoRA version
nothing for each token, but the version's share of every request and a training.
"""

from __future__ import annotations

import math

from .rates import lifetime, rate, unedited
from .values import Group, Snapshot, State

__all__ = [
    "HYSTERESIS",
    "STABLE",
    "acting",
    "answering",
    "daily",
    "days",
    "held",
    "once",
    "place",
    "reading",
    "spared",
    "stable",
    "standing",
    "uses",
]

#: A move is made only if what it saves is so many times what it costs.
HYSTERESIS = 1.2
#: No saving is counted on for more days than these, however long nothing was edited.
MOST_DAYS = 30.0
#: What is trained must stay unedited with this chance until it has paid; one edit wastes all of it.
STABLE = 0.5
DAY_S = 86_400.0

#: From the cheapest place to stay in to the dearest to come to.
PLACES: tuple[State, ...] = ("plain", "core", "pages", "prefix", "lora")


def _requests(snapshot: Snapshot, days: float) -> float:
    return rate(snapshot.requests_day * days, days).mean


def requests(snapshot: Snapshot) -> float:
    """Requests a day. What was watched for an hour is not believed to go on like that all day: the same prior as for
    uses is beneath both, so that their ratio stays what was counted."""
    return _requests(snapshot, snapshot.watched)


def uses(group: Group, snapshot: Snapshot) -> float:
    """How many requests a day need the group: the part of requests that did while it was watched, of those a day. No
    request needs it twice."""
    part = rate(group.uses, group.days).mean / _requests(snapshot, group.days)
    return min(1.0, part) * requests(snapshot)


def days(group: Group) -> float:
    """Days for which a saving on this group is counted on: until it is edited, as far as that can be foreseen."""
    return min(lifetime(group.edits, group.days), MOST_DAYS)


def standing(block: Group, snapshot: Snapshot) -> float:
    """Days for which a core block is counted on to stand: as long as the last one stood, if none of it is edited before
    that. So one that was chosen a moment ago is not worth another rebuild for a better one."""
    stood = snapshot.watched if snapshot.stood is None else snapshot.stood
    return min(days(block), stood)


def stable(group: Group, until: float) -> bool:
    """Whether it will likely stay unedited for so many days."""
    return unedited(group.edits, group.days, until) >= STABLE


def warm(snapshot: Snapshot) -> float:
    """The part of requests that find the head of the last one kept."""
    if snapshot.warm is not None:
        return min(1.0, max(0.0, snapshot.warm))
    if math.isinf(snapshot.costs.lifetime_s):
        return 1.0
    # Requests that come by chance; those of a conversation come close together, so this is the least it can be.
    return 1 - math.exp(-requests(snapshot) * snapshot.costs.lifetime_s / DAY_S)


def reading(snapshot: Snapshot) -> float:
    """The price of one token of the head on one request: from the cache where it is found there, else written anew;
    never more than computing it without a cache."""
    costs = snapshot.costs
    if not (snapshot.able.pages or snapshot.able.prefix):
        return costs.prefill
    found = warm(snapshot)
    return min(costs.prefill, found * costs.cached + (1 - found) * (costs.prefill + costs.write))


def held(group: Group, snapshot: Snapshot, share: float = 1.0) -> float:
    """What keeping the states of so large a part of its tokens costs a day."""
    costs = snapshot.costs
    size = costs.token_bytes * group.tokens * share if costs.token_bytes else group.bytes
    return size * costs.byte_day


def acting(snapshot: Snapshot) -> float:
    """What LoRA versions that act cost a day, however many records they hold."""
    costs, each = snapshot.costs, requests(snapshot)
    sessions = each if snapshot.sessions_day is None else min(each, snapshot.sessions_day)
    return (each * costs.lora if snapshot.able.always else 0.0) + sessions * costs.swap


def answering(group: Group, snapshot: Snapshot) -> float:
    """What a LoRA version costs a day for acting on the requests that need this group; 0 where it acts on all."""
    return 0.0 if snapshot.able.always else uses(group, snapshot) * snapshot.costs.lora


def daily(group: Group, snapshot: Snapshot) -> dict[State, float]:
    """What the group costs a day in each place that the engine has, in `Costs.unit`, without what bringing it there
    costs. A LoRA version's own cost is shared by all records that versions hold, this group with them."""
    able, costs, each = snapshot.able, snapshot.costs, requests(snapshot)
    found: dict[State, float] = {"plain": uses(group, snapshot) * group.tokens * costs.prefill}
    if able.core:
        found["core"] = each * group.tokens * costs.prefill
        if able.pages:
            found["pages"] = each * group.tokens * reading(snapshot) + held(group, snapshot)
        if able.prefix and costs.distil is not None:
            found["prefix"] = each * group.tokens * costs.distilled * costs.cached + held(
                group, snapshot, costs.distilled
            )
    if able.lora and costs.learn is not None:
        learnt = sum(len(one.records) for one in snapshot.groups if "lora" in one.where and one.key != group.key)
        share = len(group.records) / (learnt + len(group.records))
        found["lora"] = answering(group, snapshot) + acting(snapshot) * share
    return found


def once(group: Group, snapshot: Snapshot) -> dict[State, float]:
    """What it costs to bring the group to each place that the engine has."""
    able, costs = snapshot.able, snapshot.costs
    found: dict[State, float] = {"plain": 0.0}
    written = group.tokens * (costs.prefill + costs.write)
    if able.core:
        found["core"] = 0.0
        if able.pages:
            found["pages"] = written
        if able.prefix and costs.distil is not None:
            found["prefix"] = group.tokens * costs.distil * (1 + costs.gate_fails)
    if able.lora and costs.learn is not None:
        found["lora"] = len(group.records) * costs.learn * (1 + costs.gate_fails)
    return found


def place(group: Group) -> State:
    """The place that counts: the furthest of those that it lives in."""
    return next(state for state in reversed(PLACES) if state in group.where or state == "plain")


def spared(group: Group, snapshot: Snapshot) -> float:
    """What a LoRA version spares on the group a day: what recalling it costs, or what reading it at the head does if it
    is in the core that would be chosen and that is cheaper; less what answering for it costs. The core has no room for
    all that would pay there.
    """
    spares = uses(group, snapshot) * group.tokens * snapshot.costs.prefill
    if snapshot.able.core and snapshot.chosen.issuperset(group.records):
        spares = min(spares, requests(snapshot) * group.tokens * reading(snapshot))
    return spares - answering(group, snapshot)
