"""Where the planner puts a user's standing facts at an offer's costs: recalled, in the core block, or in a LoRA.

Makes the snapshot that a ledger of that user would give, and asks the real planner. Bills no request.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..planner import places
from ..planner.plan import plan
from ..planner.values import Able, Costs, Group, Snapshot, Unit
from ..types import Scope
from .offers import Offer
from .policies import CORE_TOKENS
from .traces import Person
from .workload import Workload

__all__ = ["Placed", "costs_of", "placed"]

DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What the planner does with the standing facts: those in the core block (``core_tokens`` together) and those that
    a LoRA learns. ``day`` is what the moves cost a day, spread over the days that they are expected to last, in the
    planner's unit. ``lora_days`` is how many days the most needed fact would have to be used in to pay for its
    training, None where it can't be taught or saves nothing."""

    core: frozenset[str] = frozenset()
    core_tokens: int = 0
    learnt: frozenset[str] = frozenset()
    day: float = 0.0
    lora_days: float | None = None


def placed(workload: Workload, person: Person, offer: Offer, *, learn: bool) -> Placed:
    """What `planner.plan` does for this person at the first billed turn. ``learn``: a LoRA may be taught."""
    if not person.seen:
        return Placed()
    known = _snapshot(workload, person, offer, learn=learn)
    tokens = dict(person.standing)
    core: frozenset[str] = frozenset()
    learnt: set[str] = set()
    day = 0.0
    for move in plan(known).moves:
        if move.kind == "collapse":
            core = frozenset(move.records)
        elif move.kind == "learn":
            learnt |= set(move.records)
        else:
            continue
        day += move.cost / move.holds if move.holds else 0.0
    core -= learnt
    return Placed(
        core=core,
        core_tokens=sum(tokens[id_] for id_ in core),
        learnt=frozenset(learnt),
        day=day,
        lora_days=_lora_days(known),
    )


def costs_of(offer: Offer) -> Costs:
    """The offer's numbers as the planner reads them: seconds of a machine, dollars of a host."""
    rules = offer.rules
    if offer.prices is not None:
        prices = offer.prices
        return Costs(
            unit="dollars",
            prefill=prices.input,
            cached=prices.read,
            write=max(prices.written[0] - prices.input, 0.0),
            output=prices.output,
            minimum=rules.minimum,
            lifetime_s=rules.lifetimes[0].seconds,
        )
    machine = offer.machine
    assert machine is not None
    unit: Unit = "seconds"
    return Costs(
        unit=unit,
        prefill=machine.prefill_s,
        cached=machine.cached_s,
        write=machine.write_s,
        output=machine.decode_s,
        minimum=rules.minimum,
        token_bytes=machine.token_bytes,
        version_bytes=machine.lora_bytes,
        learn=machine.learn_s,
        lora=machine.lora_s,
        gate_fails=machine.gate_fails,
    )


def _snapshot(workload: Workload, person: Person, offer: Offer, *, learn: bool) -> Snapshot:
    costs, scope = costs_of(offer), Scope(user="somebody")
    each = person.rate * workload.turns_session
    days = person.seen / each
    edits = workload.edits_day * person.rate / workload.sessions_day * days / len(person.standing)
    groups = [
        Group(
            key=id_,
            scope=scope,
            records=(id_,),
            tokens=tokens,
            uses=min(float(needed), float(person.seen)),
            days=days,
            edits=edits,
            sightings=needed,
            teachable=True,
        )
        for (id_, tokens), needed in zip(person.standing, person.needed, strict=True)
    ]
    gaps = [two.at - one.at for one, two in pairwise(person.turns)]
    warm = bisect_right(sorted(gaps), costs.lifetime_s) / len(gaps)
    # A core is rewritten when a session begins: no history stands behind it then.
    known = Snapshot(
        at=person.turns[0].at,
        scope=scope,
        model=offer.name,
        costs=costs,
        able=Able(pages=True, lora=learn and costs.learn is not None),
        groups=tuple(groups),
        cold=DAY / person.rate > costs.lifetime_s,
        requests_day=each,
        sessions_day=person.rate,
        warm=warm,
    )
    head = costs.prefill if workload.system_tokens < costs.minimum else places.reading(known)
    chosen: list[Group] = []
    room = CORE_TOKENS
    for group in sorted(groups, key=lambda group: -group.uses):
        if places.uses(group, known) * costs.prefill > places.requests(known) * head and group.tokens <= room:
            chosen.append(group)
            room -= group.tokens
    return known if not chosen else _with(known, chosen)


def _with(known: Snapshot, chosen: Sequence[Group]) -> Snapshot:
    """The snapshot with a core block of these as the one that would be chosen."""
    tokens = sum(group.tokens for group in chosen)
    block = Group(
        key="candidate",
        scope=known.scope,
        records=tuple(group.key for group in chosen),
        tokens=tokens,
        uses=sum(group.uses * group.tokens for group in chosen) / tokens,
        days=chosen[0].days,
        edits=sum(group.edits for group in chosen),
        where=frozenset({"core"}),
    )
    return replace(known, candidate=block)


def _lora_days(known: Snapshot) -> float | None:
    costs = known.costs
    if costs.learn is None or not known.able.lora:
        return None
    saves = max(places.spared(group, known) for group in known.groups)
    return costs.learn * (1 + costs.gate_fails) / saves if saves > 0 else None
