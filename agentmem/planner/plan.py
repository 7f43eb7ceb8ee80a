"""Which moves of memory pay: a pure function of one snapshot, the same for the same snapshot.

Each move is weighed by what it saves a day, for as many days as that is expected to last, against what it costs once,
with a hysteresis; what does not pay is not proposed, and what no longer pays goes back. Owed work (versions to train
again, sessions to seal, turns to extract from) comes first and needs no saving; keeping a head ahead of its next
request only moves work into the silence, and pays by what waiting counts. Knows no store and makes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator

from . import places
from .places import HYSTERESIS
from .values import Budget, ConsolidationPlan, Group, Kind, Move, Snapshot, amount

__all__ = ["fit", "plan"]

#: How often a record must have been said or recalled without contradiction before a LoRA version is taught it.
SIGHTINGS = 2
#: Work that comes back: its key names the newest turn, so that it can be done again after another one.
AGAIN: frozenset[Kind] = frozenset({"collapse", "shrink", "prime", "evict", "drop", "unlearn", "extract", "reconcile"})
#: In which order moves are made that are worth the same.
ORDER: tuple[Kind, ...] = (
    "retrain", "unlearn", "seal", "extract", "reconcile", "shrink", "collapse", "evict", "drop", "prime", "distil",
    "learn",
)  # fmt: skip


def plan(snapshot: Snapshot, budget: Budget | None = None) -> ConsolidationPlan:
    """The moves that pay and those that are owed, in the order to make them; what the budget has no room for is
    ``left``.

    While a conversation of the scope goes on (``busy``), nothing that would change the head of its prompts: the head's
    text, its states, the LoRA versions that act.
    """
    moves = list(_written(snapshot))
    if not snapshot.busy and not snapshot.requests_day:
        moves += _wrong(snapshot)  # nothing was counted, and a prior alone moves nothing
    elif not snapshot.busy:
        moves += _rewritten(snapshot)
        # A head that is about to change is not kept first.
        if not any(move.kind in ("collapse", "shrink") for move in moves):
            moves += [*_kept(snapshot), *_distilled(snapshot)]
        pupils = _pupils(snapshot)
        moves += _forgotten(snapshot, pupils)
        # What a rewritten core takes in is not taught as well: only one of the two savings would come.
        taken = snapshot.chosen if any(move.kind in ("collapse", "shrink") for move in moves) else frozenset()
        moves += _trained(snapshot, pupils, [group for group in pupils if not taken.intersection(group.records)])
    made, left = fit(moves, budget)
    return ConsolidationPlan(moves=made, left=left, costs=dict(sorted(snapshot.costs.source.items())))


def fit(moves: Iterable[Move], budget: Budget | None) -> tuple[tuple[Move, ...], tuple[Move, ...]]:
    """What fits the budget and what is left, both in the order to make them: owed work, then by saving for cost.

    Greedy: a move that does not fit is passed over and the next is tried, so more money never buys less saving. A
    budget in seconds bounds costs in seconds, one in dollars those in dollars; bytes that are freed make no room.
    """
    spent = {"seconds": 0.0, "dollars": 0.0}
    most = {"seconds": math.inf, "dollars": math.inf}
    size, room = 0, math.inf
    if budget is not None:
        for unit, limit in (("seconds", budget.seconds), ("dollars", budget.dollars)):
            most[unit] = math.inf if limit is None else limit
        room = math.inf if budget.bytes is None else budget.bytes
    made: list[Move] = []
    left: list[Move] = []
    for move in sorted(moves, key=_rank):
        new = max(0, move.bytes)
        if spent[move.unit] + move.cost > most[move.unit] or size + new > room:
            left.append(move)
            continue
        spent[move.unit] += move.cost
        size += new
        made.append(move)
    return tuple(made), tuple(left)


def _rank(move: Move) -> tuple[bool, float, int, str]:
    worth = move.saves * move.holds
    ratio = math.inf if not move.cost else worth / move.cost
    return move.saves > 0, -ratio if move.saves > 0 else 0.0, ORDER.index(move.kind), move.key


def _move(
    snapshot: Snapshot,
    kind: Kind,
    records: Iterable[str] = (),
    *,
    replaces: Iterable[str] = (),
    tokens: int = 0,
    cost: float = 0.0,
    saves: float = 0.0,
    requests: float | None = None,
    holds: float = 0.0,
    size: float = 0.0,
    why: str,
) -> Move:
    ids, old = tuple(records), tuple(replaces)
    scope = [value for _, value in snapshot.scope.levels()]
    round_ = snapshot.latest if kind in AGAIN else ""
    named = json.dumps([kind, scope, snapshot.model, ids, old, tokens if kind == "prime" else 0, round_])
    return Move(
        key=hashlib.sha256(named.encode()).hexdigest()[:32],
        kind=kind,
        scope=snapshot.scope,
        records=ids,
        replaces=old,
        tokens=tokens,
        unit=snapshot.costs.unit,
        cost=cost,
        saves=saves,
        requests=(places.requests(snapshot) if requests is None else requests) if saves else 0.0,
        holds=holds if saves else 0.0,
        bytes=round(size),
        why=why,
    )


def _pays(saves: float, holds: float, cost: float) -> bool:
    return saves > 0 and saves * holds >= HYSTERESIS * cost


# ---- owed ------------------------------------------------------------------------------------------------------------


def _written(snapshot: Snapshot) -> Iterator[Move]:
    """What was put off: versions that lost a record, ends of sessions, turns that a model should read."""
    costs, able = snapshot.costs, snapshot.able
    read, told = snapshot.turn_tokens * costs.prefill, snapshot.answer_tokens * costs.output
    if able.lora and not snapshot.busy:
        left = dict(zip(snapshot.owed, snapshot.owed_records, strict=False))
        for digest in snapshot.owed:
            records = left.get(digest, able.shard)
            cost = (costs.learn or 0.0) * (1 + costs.gate_fails) * records
            why = f"a version lost a record: it serves no more until it is trained again with the {records} others"
            yield _move(snapshot, "retrain", [digest], cost=cost, size=costs.version_bytes, why=why)
    for session in snapshot.unsealed:
        turns = _turns(snapshot)
        cost = turns * read + told if able.writes else 0.0
        yield _move(snapshot, "seal", [session], cost=cost, why="its session ended")
    if able.writes and snapshot.unread:
        why = f"{snapshot.unread} turns that no extraction has read"
        yield _move(snapshot, "extract", cost=snapshot.unread * (read + told), why=why)
        yield _move(snapshot, "reconcile", cost=snapshot.unread * (read + told), why=why)


def _turns(snapshot: Snapshot) -> float:
    """Turns of a session, where that is known."""
    if not snapshot.sessions_day:
        return 1.0
    return max(1.0, snapshot.requests_day / snapshot.sessions_day)


# ---- the core block --------------------------------------------------------------------------------------------------


def _worth(block: Group | None, snapshot: Snapshot) -> float:
    """What a core block saves a day: what would be recalled without it, less what reading it costs."""
    if block is None:
        return 0.0
    needed = places.uses(block, snapshot) * block.tokens * snapshot.costs.prefill
    return needed - places.requests(snapshot) * block.tokens * places.reading(snapshot)


def _rewritten(snapshot: Snapshot) -> Iterator[Move]:
    """The core block that would be chosen now, in place of the one that stands."""
    core, chosen, costs = snapshot.core, snapshot.candidate, snapshot.costs
    before = core.records if core else ()
    after = chosen.records if chosen else ()
    block = chosen or core
    if block is None or not snapshot.able.core or before == after:
        return
    tokens, standing = (block.tokens if block else 0 for block in (chosen, core))
    was = _worth(core, snapshot)
    saves = _worth(chosen, snapshot) - was
    if snapshot.cold:  # all is written anew in any case
        cost = max(0, tokens - standing) * (costs.prefill + costs.write)
    elif costs.depth is None:
        cost = (tokens + snapshot.behind) * max(0.0, costs.prefill + costs.write - places.reading(snapshot))
    else:
        anew = tokens + snapshot.behind
        cost = max(0.0, costs.computing(0, anew) + anew * costs.write - costs.loading(anew))
    holds = places.standing(block, snapshot)
    # Where it costs nothing, a difference that is mere noise is no reason either.
    if not _pays(saves, holds, cost) or saves < (HYSTERESIS - 1) * abs(was):
        return
    why = (
        f"{len(after)} records, {tokens} tokens, in place of {len(before)}, {standing} tokens; "
        f"carrying the difference has cost {amount(snapshot.carried, costs.unit)} so far"
    )
    kind: Kind = "shrink" if tokens < standing else "collapse"
    yield _move(snapshot, kind, after, replaces=before, tokens=tokens, cost=cost, saves=saves, holds=holds, why=why)


def _kept(snapshot: Snapshot) -> Iterator[Move]:
    """States of the head, computed ahead of the next request or given up."""
    costs, core, each = snapshot.costs, snapshot.core, places.requests(snapshot)
    if core and "pages" in core.where:
        spares = each * max(0.0, costs.computing(0, core.tokens) - costs.loading(core.tokens))
        keeping = places.held(core, snapshot)
        if keeping > 0 and keeping >= HYSTERESIS * spares:
            why = f"keeping its states costs {amount(keeping, costs.unit)} a day, they spare {_told(spares, snapshot)}"
            yield _move(
                snapshot, "evict", core.records, tokens=core.tokens, saves=keeping - spares, holds=places.days(core),
                size=-core.bytes, why=why,
            )  # fmt: skip
            return
    # At a host a prefix is written by the request that marks it: ahead of it costs the same, and one read more.
    if not (snapshot.unprimed and snapshot.head_known and snapshot.able.pages) or costs.unit != "seconds":
        return
    tokens = snapshot.unprimed
    size = tokens * costs.token_bytes
    cost = costs.computing(0, tokens) + tokens * costs.write
    spared = max(0.0, costs.computing(0, tokens) - costs.loading(tokens))
    keeping = size * costs.byte_day
    # The next request would compute and keep the head itself: one computation is spared, the one that is waited for.
    requests = min(each, 1.0)
    saves, holds = requests * spared - keeping, 1 / requests
    lasts = holds <= (places.days(core) if core else places.MOST_DAYS)
    if lasts and _pays(saves * costs.waiting, holds, cost) and each * spared > HYSTERESIS * keeping:
        why = f"{tokens} tokens that the next request would wait for; a second of waiting counts {costs.waiting:g}"
        yield _move(
            snapshot, "prime", core.records if core else (), tokens=tokens, cost=cost, saves=saves, requests=requests,
            holds=holds, size=size, why=why,
        )  # fmt: skip


def _distilled(snapshot: Snapshot) -> Iterator[Move]:
    """The core as a trained prefix of fewer positions, or that prefix given up."""
    costs, core = snapshot.costs, snapshot.core
    if core is None or not core.tokens:
        return
    standing = "prefix" in core.where
    spares = places.requests(snapshot) * core.tokens * (places.reading(snapshot) - costs.distilled * costs.cached)
    keeping = places.held(core, snapshot, costs.distilled)
    holds = places.standing(core, snapshot)
    if standing:
        if keeping > 0 and keeping >= HYSTERESIS * spares:
            why = f"keeping it costs {amount(keeping, costs.unit)} a day, it spares {_told(spares, snapshot)}"
            yield _move(
                snapshot, "drop", core.records, tokens=core.tokens, saves=keeping - spares, holds=holds,
                size=-core.bytes, why=why,
            )  # fmt: skip
        return
    if not (snapshot.able.prefix and snapshot.head_known) or costs.distil is None:
        return
    saves = spares - keeping
    cost = core.tokens * costs.distil * (1 + costs.gate_fails)
    if not _pays(saves, holds, cost) or spares <= HYSTERESIS * keeping or not places.stable(core, cost / saves):
        return
    size = core.tokens * costs.distilled * costs.token_bytes
    why = f"{core.tokens} tokens as {core.tokens * costs.distilled:.0f} trained positions"
    yield _move(
        snapshot, "distil", core.records, tokens=core.tokens, cost=cost, saves=saves, holds=holds, size=size, why=why
    )


# ---- LoRA versions ---------------------------------------------------------------------------------------------------


def _learnt(snapshot: Snapshot, *, holds: bool) -> list[Group]:
    """What versions were taught that still holds; else what they were taught and no longer does."""
    return [group for group in snapshot.groups if "lora" in group.where and group.teachable == holds]


def _pay(snapshot: Snapshot, pupils: list[Group]) -> bool:
    """Whether versions spare more a day than their acting costs: those that act, and those worth teaching beside them.
    What no longer holds is unlearnt in any case: a version that were taught for its sake as well would be next."""
    gains = sum(places.spared(group, snapshot) for group in (*_learnt(snapshot, holds=True), *pupils))
    overhead = places.acting(snapshot)
    return overhead <= 0 <= gains or overhead < HYSTERESIS * gains


def _forgotten(snapshot: Snapshot, pupils: list[Group]) -> Iterator[Move]:
    """LoRA versions that no longer pay; else what they learnt that no longer holds."""
    learnt = _learnt(snapshot, holds=True)
    if not learnt or _pay(snapshot, pupils):
        yield from _wrong(snapshot)
        return
    answering = sum(places.answering(group, snapshot) for group in learnt)
    costs_day = places.acting(snapshot) + answering
    spares = sum(places.spared(group, snapshot) for group in learnt) + answering
    why = (
        f"versions cost {_told(costs_day, snapshot)}, they spare {amount(spares, snapshot.costs.unit)}"
        f" on {len(learnt)} groups"
    )
    holds = max(places.days(group) for group in learnt)
    gone = [*learnt, *_learnt(snapshot, holds=False)]
    size = -sum(group.bytes for group in gone)
    yield _move(snapshot, "unlearn", _ids(gone), saves=costs_day - spares, holds=holds, size=size, why=why)


def _wrong(snapshot: Snapshot) -> Iterator[Move]:
    """What was learnt and no longer holds, whatever it saves."""
    if wrong := _learnt(snapshot, holds=False):
        why = f"{len(wrong)} of what was learnt no longer holds, is not trusted or was said otherwise"
        yield _move(snapshot, "unlearn", _ids(wrong), size=-sum(group.bytes for group in wrong), why=why)


def _pupils(snapshot: Snapshot) -> list[Group]:
    """What is worth teaching on its own, the best first: able, taught by nobody yet, stable, and it pays trainings."""
    costs = snapshot.costs
    if not snapshot.able.lora or costs.learn is None:
        return []
    found: list[tuple[float, str, Group]] = []
    for group in snapshot.groups:
        if not group.teachable or "lora" in group.where or group.sightings < SIGHTINGS or not group.uses:
            continue
        cost = len(group.records) * costs.learn * (1 + costs.gate_fails)
        saves, holds = places.spared(group, snapshot), places.days(group)
        if _pays(saves, holds, cost) and places.stable(group, cost / saves):
            found.append((-saves / len(group.records), group.key, group))
    return [group for _, _, group in sorted(found, key=lambda one: one[:2])]


def _trained(snapshot: Snapshot, pupils: list[Group], taught: list[Group]) -> Iterator[Move]:
    """What is stable enough and used enough to be learnt, in shards of the settings' size.

    ``taught`` are those of the ``pupils`` that no other move takes. The first shard of all must also pay for what
    versions that act cost on every request; later ones add nothing.
    """
    costs = snapshot.costs
    acting = bool(_learnt(snapshot, holds=True))
    overhead = places.acting(snapshot)
    if acting and not _pay(snapshot, pupils):
        return  # all of them go
    for shard in _shards(taught, snapshot.able.shard):
        records = _ids(shard)
        cost = len(records) * (costs.learn or 0.0) * (1 + costs.gate_fails)
        spares = sum(places.spared(group, snapshot) for group in shard)
        holds = sum(places.days(group) * places.spared(group, snapshot) for group in shard) / spares
        saves = spares - (0.0 if acting else overhead)
        if not _pays(saves, holds, cost) or (not acting and spares <= HYSTERESIS * overhead):
            return  # the shards behind it are worth less
        acting = True
        tokens = sum(group.tokens for group in shard)
        often = sum(places.uses(group, snapshot) for group in shard)
        why = f"{len(records)} stable records, {tokens} tokens, needed {often:.3g} times a day together"
        yield _move(
            snapshot, "learn", records, tokens=tokens, cost=cost, saves=saves, holds=holds,
            size=costs.version_bytes, why=why,
        )  # fmt: skip


def _shards(groups: list[Group], most: int) -> Iterator[list[Group]]:
    """Groups in their order, as many at a time as have at most so many records; a larger group is one by itself."""
    shard: list[Group] = []
    for group in groups:
        if shard and len(_ids(shard)) + len(group.records) > most:
            yield shard
            shard = []
        shard.append(group)
    if shard:
        yield shard


def _ids(groups: Iterable[Group]) -> list[str]:
    return sorted({record for group in groups for record in group.records})


def _told(value: float, snapshot: Snapshot) -> str:
    return f"{amount(value, snapshot.costs.unit)} a day"
