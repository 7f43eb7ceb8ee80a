"""Whatever is counted: the planner is a pure function, pays its way, keeps its budget and never goes to and fro."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.planner import places
from agentmem.planner.explain import explain
from agentmem.planner.plan import SIGHTINGS, fit, plan
from agentmem.planner.rates import lifetime, rate, unedited
from agentmem.planner.values import Able, Budget, ConsolidationPlan, Costs, Group, Move, Snapshot, State
from agentmem.types import Scope

ANA = Scope(user="ana")
HEAD: frozenset[State] = frozenset({"core", "pages", "prefix"})
PLAIN: frozenset[State] = frozenset({"plain"})
CORE: frozenset[State] = frozenset({"core"})
LORA: frozenset[State] = frozenset({"lora"})
NOWHERE: frozenset[State] = frozenset()


@st.composite
def costs(draw: st.DrawFn) -> Costs:
    prefill = draw(st.sampled_from([1e-6, 0.003, 0.02]))
    hosted = draw(st.booleans())
    return Costs(
        unit="dollars" if hosted else "seconds",
        prefill=prefill,
        cached=prefill * draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])),
        write=prefill * draw(st.sampled_from([0.0, 0.25, 1.5])),
        output=prefill * 5,
        byte_day=draw(st.sampled_from([0.0, 1e-9, 1e-4])),
        token_bytes=draw(st.sampled_from([0.0, 23_040.0])),
        version_bytes=draw(st.sampled_from([0.0, 1.65e6])),
        lifetime_s=draw(st.sampled_from([300.0, 86_400.0, math.inf])),
        learn=draw(st.sampled_from([None, 0.01, 1.3])),
        distil=draw(st.sampled_from([None, 0.001, 0.1])),
        lora=draw(st.sampled_from([0.0, 0.001, 0.1])),
        swap=draw(st.sampled_from([0.0, 0.005])),
        gate_fails=draw(st.sampled_from([0.0, 0.3])),
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    days = draw(st.sampled_from([0.01, 1.0, 30.0]))
    count = draw(st.integers(0, 6))
    core = draw(st.sets(st.integers(0, 5))) if draw(st.booleans()) else set()
    chosen = draw(st.sets(st.integers(0, 5))) if draw(st.booleans()) else core
    places: list[State] = ["pages", "prefix"]
    kept: frozenset[State] = frozenset(draw(st.sets(st.sampled_from(places))))

    def block(members: set[int], where: frozenset[State]) -> Group | None:
        if not members:
            return None
        return Group(
            key="block",
            scope=ANA,
            records=tuple(f"r{number}" for number in sorted(members)),
            tokens=draw(st.integers(1, 2000)),
            uses=draw(st.floats(0, 300)),
            days=days,
            edits=draw(st.sampled_from([0.0, 1.0, 40.0])),
            where=where,
            bytes=draw(st.sampled_from([0, 10**7])),
        )

    groups = tuple(
        Group(
            key=f"r{number}",
            scope=ANA,
            records=(f"r{number}",),
            tokens=draw(st.integers(1, 400)),
            uses=draw(st.one_of(st.floats(0, 3), st.floats(50, 500))),
            days=days,
            edits=draw(st.sampled_from([0.0, 0.0, 5.0])),
            where=PLAIN | (CORE if number in core else NOWHERE) | draw(st.sampled_from([NOWHERE, LORA])),
            sightings=draw(st.integers(0, 4)),
            teachable=draw(st.sampled_from([True, True, False])),
            bytes=draw(st.sampled_from([0, 10**6])),
        )
        for number in range(count)
    )
    return Snapshot(
        at=1e9,
        scope=ANA,
        model="local:tiny",
        costs=draw(costs()),
        able=Able(
            core=draw(st.sampled_from([True, True, False])),
            pages=draw(st.booleans()),
            prefix=draw(st.booleans()),
            lora=draw(st.booleans()),
            always=draw(st.booleans()),
            writes=draw(st.booleans()),
            shard=draw(st.sampled_from([1, 3, 20])),
        ),
        groups=groups,
        core=block(core, PLAIN | CORE | kept),
        candidate=block(chosen, PLAIN),
        behind=draw(st.integers(0, 4000)),
        carried=draw(st.floats(0, 100)),
        cold=draw(st.booleans()),
        busy=draw(st.sampled_from([False, False, True])),
        requests_day=draw(st.sampled_from([0.0, 2.0, 500.0, 500.0])),
        unprimed=draw(st.sampled_from([0, 512])),
        head_known=draw(st.sampled_from([True, True, False])),
        owed=tuple(draw(st.sets(st.sampled_from(["v1", "v2"])))),
        unsealed=tuple(draw(st.sets(st.sampled_from(["s1", "s2"])))),
        unread=draw(st.sampled_from([0, 7])),
        turn_tokens=40.0,
        answer_tokens=20.0,
        sessions_day=draw(st.sampled_from([None, 1.0])),
        warm=draw(st.sampled_from([None, 0.9])),
        stood=draw(st.sampled_from([None, 0.01, 20.0])),
        latest="t9",
    )


def moved(snapshot: Snapshot, moves: Iterable[Move]) -> Snapshot:
    """The snapshot that would be taken once these moves were made and nothing else happened."""
    for move in moves:
        snapshot = _moved(snapshot, move)
    return snapshot


def _moved(snapshot: Snapshot, move: Move) -> Snapshot:
    core = snapshot.core
    if move.kind in ("collapse", "shrink"):
        core = snapshot.candidate
        if core is not None:
            core = dataclasses.replace(core, where=PLAIN | CORE, bytes=0)
        members = set(core.records) if core else set()
        groups = tuple(
            dataclasses.replace(one, where=(one.where - HEAD) | (CORE if one.key in members else NOWHERE))
            for one in snapshot.groups
        )
        new = core.tokens + 200 if core and snapshot.able.pages else 0
        return dataclasses.replace(snapshot, core=core, groups=groups, carried=0.0, unprimed=new, stood=0.0)
    if move.kind in ("learn", "unlearn"):

        def learnt(group: Group) -> Group:
            if not set(group.records) <= set(move.records):
                return group
            where = group.where | LORA if move.kind == "learn" else group.where - LORA
            return dataclasses.replace(group, where=where)

        return dataclasses.replace(snapshot, groups=tuple(map(learnt, snapshot.groups)))
    if move.kind in ("prime", "evict", "distil", "drop"):
        state: State = "pages" if move.kind in ("prime", "evict") else "prefix"
        if core is not None:
            up = move.kind in ("prime", "distil")
            # Pages take what the costs say of a token, whatever lay there before.
            size = {"prime": int(core.tokens * snapshot.costs.token_bytes), "evict": 0}.get(move.kind, core.bytes)
            core = dataclasses.replace(core, where=core.where | {state} if up else core.where - {state}, bytes=size)
        unprimed = {"prime": 0, "evict": move.tokens}.get(move.kind, snapshot.unprimed)
        return dataclasses.replace(snapshot, core=core, unprimed=unprimed)
    if move.kind == "retrain":
        return dataclasses.replace(snapshot, owed=tuple(one for one in snapshot.owed if one not in move.records))
    if move.kind == "seal":
        kept = tuple(one for one in snapshot.unsealed if one not in move.records)
        return dataclasses.replace(snapshot, unsealed=kept)
    assert move.kind in ("extract", "reconcile")
    return dataclasses.replace(snapshot, unread=0)


def of(found: ConsolidationPlan, *kinds: str) -> list[Move]:
    return [move for move in found.moves if move.kind in kinds]


@settings(max_examples=300, deadline=None)
@given(snapshot=snapshots())
def test_the_same_snapshot_gives_the_same_plan_and_every_move_a_key_of_its_own(snapshot: Snapshot) -> None:
    found = plan(snapshot)
    assert found == plan(dataclasses.replace(snapshot))
    assert found == ConsolidationPlan.model_validate_json(found.model_dump_json())
    keys = [move.key for move in found.moves]
    assert len(set(keys)) == len(keys)
    later = plan(dataclasses.replace(snapshot, at=2e9))
    assert [move.key for move in later.moves] == keys, "the same work has the same key, whenever it is planned"
    assert not found.left


@settings(max_examples=300, deadline=None)
@given(snapshot=snapshots())
def test_a_move_pays_within_the_time_that_its_saving_lasts_or_is_owed(snapshot: Snapshot) -> None:
    for move in plan(snapshot).moves:
        assert move.cost >= 0
        if move.saves:
            weight = snapshot.costs.waiting if move.kind == "prime" else 1.0
            assert weight * move.saves * move.holds >= places.HYSTERESIS * move.cost * (1 - 1e-9), move
            assert 0 < move.holds <= places.MOST_DAYS * (1 + 1e-9)
            assert snapshot.requests_day > 0, "a prior alone moved something"
            assert move.requests > 0
        else:
            assert move.kind in ("retrain", "seal", "extract", "reconcile", "unlearn"), move


@settings(max_examples=300, deadline=None)
@given(snapshot=snapshots())
def test_made_once_nothing_is_left_to_do_and_nothing_goes_to_and_fro(snapshot: Snapshot) -> None:
    made: set[str] = set()
    taught: set[str] = set()
    for _ in range(3):
        found = plan(snapshot)
        for move in found.moves:
            assert move.key not in made, f"{move.kind} again"
            made.add(move.key)
            if move.kind == "learn":
                assert not taught & set(move.records)
                taught |= set(move.records)
            if move.kind == "unlearn":
                assert not taught & set(move.records), "unlearnt what was just learnt"
        snapshot = moved(snapshot, found.moves)
    assert not plan(snapshot).moves


@settings(max_examples=300, deadline=None)
@given(
    snapshot=snapshots(),
    seconds=st.one_of(st.none(), st.floats(0, 20)),
    dollars=st.one_of(st.none(), st.floats(0, 0.01)),
    size=st.one_of(st.none(), st.integers(0, 2 * 10**7)),
)
def test_a_budget_is_kept_and_nothing_is_forgotten(
    snapshot: Snapshot, seconds: float | None, dollars: float | None, size: int | None
) -> None:
    whole = plan(snapshot)
    found = plan(snapshot, Budget(seconds=seconds, dollars=dollars, bytes=size))
    for unit, limit in (("seconds", seconds), ("dollars", dollars)):
        if limit is not None:
            assert sum(move.cost for move in found.moves if move.unit == unit) <= limit + 1e-12
    if size is not None:
        assert sum(max(0, move.bytes) for move in found.moves) <= size
    assert {move.key for move in (*found.moves, *found.left)} == {move.key for move in whole.moves}
    assert fit(whole.moves, Budget(seconds=seconds, dollars=dollars, bytes=size)) == (found.moves, found.left)


@settings(max_examples=300, deadline=None)
@given(
    worths=st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.01, 100)), max_size=8),
    low=st.floats(0, 20),
    more=st.floats(0, 20),
)
def test_more_money_never_buys_less_saving(worths: list[tuple[float, float]], low: float, more: float) -> None:
    moves = [
        Move(key=f"{number}", kind="learn", scope=ANA, cost=cost, saves=saves, holds=1.0)
        for number, (cost, saves) in enumerate(worths)
    ]
    bought = [sum(move.saves for move in fit(moves, Budget(seconds=limit))[0]) for limit in (low, low + more)]
    assert bought[0] <= bought[1] * (1 + 1e-9)


@settings(max_examples=400, deadline=None)
@given(snapshot=snapshots(), number=st.integers(0, 5), more=st.floats(0, 500))
def test_more_uses_never_take_a_record_out_of_where_it_is_or_keep_it_from_being_learnt(
    snapshot: Snapshot, number: int, more: float
) -> None:
    if number >= len(snapshot.groups):
        return
    one = snapshot.groups[number]
    used = dataclasses.replace(one, uses=one.uses + more)
    groups = (*snapshot.groups[:number], used, *snapshot.groups[number + 1 :])
    few, many = plan(snapshot), plan(dataclasses.replace(snapshot, groups=groups))
    if any(one.key in move.records for move in of(few, "learn")):
        assert any(one.key in move.records for move in of(many, "learn"))
    if "lora" in one.where and not any(one.key in move.records for move in of(few, "unlearn")):
        assert not any(one.key in move.records for move in of(many, "unlearn"))
    if snapshot.core is not None:
        core = dataclasses.replace(snapshot.core, uses=snapshot.core.uses + more)
        busier = plan(dataclasses.replace(snapshot, core=core))
        if not of(few, "shrink", "collapse"):
            assert not of(busier, "shrink", "collapse"), "a core that is needed more was given up"


@settings(max_examples=300, deadline=None)
@given(snapshot=snapshots())
def test_only_what_may_and_can_be_learnt_is_learnt(snapshot: Snapshot) -> None:
    found = plan(snapshot)
    groups = {group.key: group for group in snapshot.groups}
    for move in of(found, "learn"):
        assert snapshot.able.lora
        assert snapshot.costs.learn is not None
        assert len(move.records) <= snapshot.able.shard
        for record in move.records:
            assert groups[record].teachable
            assert groups[record].sightings >= SIGHTINGS
            assert groups[record].uses > 0
            assert "lora" not in groups[record].where
    wrong = {key for key, group in groups.items() if "lora" in group.where and not group.teachable}
    if not snapshot.busy:
        assert wrong <= {record for move in of(found, "unlearn") for record in move.records}
    assert snapshot.able.prefix or not of(found, "distil")
    assert (snapshot.able.pages and snapshot.head_known) or not of(found, "prime")
    assert snapshot.head_known or not of(found, "distil")
    assert snapshot.able.core or not of(found, "collapse", "shrink")
    assert snapshot.able.writes or not of(found, "extract", "reconcile")
    if snapshot.costs.unit == "dollars":
        assert not of(found, "prime"), "a host writes a prefix with the request that marks it"


@settings(max_examples=300, deadline=None)
@given(snapshot=snapshots())
def test_no_saving_is_promised_twice(snapshot: Snapshot) -> None:
    found = plan(snapshot)
    rewritten = {record for move in of(found, "collapse", "shrink") for record in move.records}
    learnt = [record for move in of(found, "learn") for record in move.records]
    assert not rewritten & set(learnt)
    assert len(set(learnt)) == len(learnt)


@settings(max_examples=200, deadline=None)
@given(snapshot=snapshots())
def test_while_somebody_chats_the_head_stands_still(snapshot: Snapshot) -> None:
    busy = plan(dataclasses.replace(snapshot, busy=True))
    assert {move.kind for move in busy.moves} <= {"seal", "extract", "reconcile"}
    free = plan(dataclasses.replace(snapshot, busy=False))
    assert {move.key for move in busy.moves} <= {move.key for move in free.moves}


@settings(max_examples=200, deadline=None)
@given(snapshot=snapshots())
def test_a_verdict_knows_each_place_and_agrees_with_its_own_numbers(snapshot: Snapshot) -> None:
    for group in snapshot.groups:
        told = explain(group, snapshot)
        assert "plain" in told.costs
        assert all(cost >= 0 and math.isfinite(cost) for cost in told.costs.values())
        assert told.low <= told.uses * (1 + 1e-9)
        assert told.low < told.high
        assert told.best in {*told.costs, told.now}
        assert told.best != "lora" or "lora" in group.where or (group.teachable and group.sightings >= SIGHTINGS)
        for state, at in told.moves_at.items():
            if at is not None:  # so many uses a day and recalling costs what the place costs
                each = group.tokens * snapshot.costs.prefill
                acts = places.answering(group, snapshot) if state == "lora" else 0.0  # of what it costs, by the use
                there = told.costs[state] + acts * (at / told.uses - 1)
                assert math.isclose(at * each, there, rel_tol=1e-9, abs_tol=1e-12)
        assert str(told)


@given(uses=st.floats(0, 1e4), days=st.floats(0, 1e4), more=st.floats(0, 1e4))
def test_a_rate_rises_with_what_was_counted_and_falls_with_the_days(uses: float, days: float, more: float) -> None:
    one = rate(uses, days)
    assert 0 <= one.lower < one.upper
    assert one.lower <= one.mean
    assert rate(uses + more, days).mean >= one.mean
    assert rate(uses, days + more).mean <= one.mean
    assert 0 <= one.none_in(more) <= 1


@given(edits=st.floats(0, 100), days=st.floats(0, 1000), more=st.floats(0.1, 100))
def test_what_is_edited_more_lasts_less(edits: float, days: float, more: float) -> None:
    assert lifetime(edits + more, days) < lifetime(edits, days)
    assert lifetime(edits, days + more) > lifetime(edits, days)
    assert unedited(edits + more, days, 5.0) < unedited(edits, days, 5.0)
    assert unedited(edits, days, 5.0 + more) < unedited(edits, days, 5.0)
    assert unedited(edits, days, 0.0) == 1.0
