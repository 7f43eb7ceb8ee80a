"""The planner's numbers, counted by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from agentmem.errors import InvalidInput
from agentmem.planner import places
from agentmem.planner.explain import explain
from agentmem.planner.plan import fit, plan
from agentmem.planner.rates import lifetime, rate
from agentmem.planner.values import Able, Budget, Costs, Group, Move, Snapshot
from agentmem.types import Scope

ANA = Scope(user="ana")
#: An engine of one's own: a token costs 4 ms to compute and a fortieth of that to read.
LOCAL = Costs(
    unit="seconds", prefill=0.004, cached=0.0001, write=0.0, token_bytes=23_040, learn=1.5, distil=0.02, lora=0.001,
    swap=0.005, gate_fails=0.2, version_bytes=1.65e6, source={"prefill": "measured, 120 uses"},
)  # fmt: skip
HOSTED = Costs(unit="dollars", prefill=1e-6, cached=1e-7, write=0.25e-6, minimum=1024, lifetime_s=300.0)


def group(key: str = "r1", **fields: Any) -> Group:
    known: dict[str, Any] = {
        "key": key, "scope": ANA, "records": (key,), "tokens": 50, "uses": 300.0, "days": 30.0, "sightings": 5,
        "teachable": True,
    }  # fmt: skip
    return Group(**(known | fields))


def snapshot(**fields: object) -> Snapshot:
    known: dict[str, object] = {
        "at": 1e9, "scope": ANA, "model": "local:tiny", "costs": LOCAL, "able": Able(pages=True, lora=True),
        "requests_day": 20.0,
    }  # fmt: skip
    return Snapshot(**(known | fields))  # type: ignore[arg-type]


def kinds(found: tuple[Move, ...]) -> list[str]:
    return [move.kind for move in found]


def test_each_place_costs_what_the_formulas_say() -> None:
    used = group()
    asked = snapshot(groups=(used,), able=Able(pages=True, prefix=True, lora=True))
    requests = (20 * 30 + 0.1) / 31
    uses = (300 + 0.1) / 31
    assert places.requests(asked) == pytest.approx(requests)
    assert places.uses(used, asked) == pytest.approx(uses)
    costs = places.daily(used, asked)
    assert costs["plain"] == pytest.approx(uses * 50 * 0.004)
    assert costs["core"] == pytest.approx(requests * 50 * 0.004)
    assert costs["pages"] == pytest.approx(requests * 50 * 0.0001)
    assert costs["prefix"] == pytest.approx(requests * 50 * 0.0001 / 3)
    assert costs["lora"] == pytest.approx(requests * (0.001 + 0.005))
    once = places.once(used, asked)
    assert once == pytest.approx(
        {"plain": 0.0, "core": 0.0, "pages": 50 * 0.004, "prefix": 50 * 0.02 * 1.2, "lora": 1.5 * 1.2}
    )


def test_no_request_needs_a_record_twice() -> None:
    often = group(uses=5000.0)
    asked = snapshot(groups=(often,))
    assert places.uses(often, asked) == pytest.approx(places.requests(asked))


def test_at_a_host_what_is_kept_for_minutes_is_mostly_written_anew() -> None:
    asked = snapshot(costs=HOSTED, able=Able(pages=True), groups=(group(),))
    found = 1 - math.exp(-places.requests(asked) * 300 / 86_400)
    assert places.reading(asked) == pytest.approx(min(1e-6, found * 1e-7 + (1 - found) * 1.25e-6))
    known = dataclasses.replace(asked, warm=0.95)
    assert places.reading(known) == pytest.approx(0.95 * 1e-7 + 0.05 * 1.25e-6)


def test_a_core_that_spares_more_than_it_costs_is_built_and_then_primed() -> None:
    block = group("block", records=("r1", "r2"), tokens=200, uses=240.0)
    asked = snapshot(candidate=block, behind=1000, able=Able(pages=True), unprimed=0)
    [move] = plan(asked).moves
    requests, uses = (600 + 0.1) / 31, 240.1 / 31
    assert move.kind == "collapse"
    assert move.cost == pytest.approx((200 + 1000) * (0.004 - 0.0001))
    assert move.saves == pytest.approx(uses * 200 * 0.004 - requests * 200 * 0.0001)
    assert move.holds == 30.0
    assert move.requests == pytest.approx(requests)
    assert move.pays_after == pytest.approx(move.cost / move.saves)
    core = dataclasses.replace(block, where=frozenset({"plain", "core"}))
    built = dataclasses.replace(asked, core=core, unprimed=512)
    [primed] = plan(built).moves
    assert (primed.kind, primed.tokens, primed.bytes) == ("prime", 512, 512 * 23_040)
    assert primed.cost == pytest.approx(512 * 0.004)
    # One request is spared it: without the prime the next one would have computed and kept the head itself.
    assert (primed.requests, primed.holds) == (1.0, 1.0)
    assert primed.saves == pytest.approx(512 * (0.004 - 0.0001))
    unhurried = dataclasses.replace(LOCAL, waiting=1.0)
    assert not plan(dataclasses.replace(built, costs=unhurried)).moves


def test_a_core_that_nobody_needs_any_more_shrinks_to_nothing() -> None:
    core = group("core", records=("r1",), tokens=400, uses=0.0, where=frozenset({"plain", "core", "pages"}))
    [move] = plan(snapshot(core=core, able=Able(pages=False))).moves
    assert (move.kind, move.records, move.tokens) == ("shrink", (), 0)


def test_a_core_chosen_a_moment_ago_is_not_rewritten_for_one_that_is_a_little_better() -> None:
    core = group("core", records=("r1",), tokens=200, uses=240.0, where=frozenset({"plain", "core", "pages"}))
    better = group("candidate", records=("r1", "r2"), tokens=250, uses=260.0)
    asked = snapshot(core=core, candidate=better, behind=3000, able=Able(pages=True))
    assert kinds(plan(dataclasses.replace(asked, stood=20.0)).moves) == ["collapse"]
    assert not plan(dataclasses.replace(asked, stood=0.01)).moves
    free = dataclasses.replace(asked, stood=0.5, cold=True)
    assert kinds(plan(free).moves) == ["collapse"], "where nothing is cached, only the block itself is written"


def test_what_is_recalled_often_and_never_changes_is_learnt() -> None:
    asked = snapshot(groups=(group("r1"), group("r2"), group("r3", uses=1.0)))
    [move] = plan(asked).moves
    assert (move.kind, move.records) == ("learn", ("r1", "r2"))
    assert move.cost == pytest.approx(2 * 1.5 * 1.2)
    requests, uses = (600 + 0.1) / 31, 300.1 / 31
    assert move.saves == pytest.approx(2 * uses * 50 * 0.004 - requests * 0.006)
    assert move.bytes == 1_650_000
    assert plan(asked).costs == {"prefill": "measured, 120 uses"}
    refusals: tuple[dict[str, Any], ...] = (
        {"teachable": False},
        {"sightings": 1},
        {"edits": 60.0},
        {"uses": 0.0},
    )
    for refused in refusals:
        one = snapshot(groups=(group(**refused),))
        assert not plan(one).moves, refused
    assert not plan(snapshot(groups=(group(),), able=Able(pages=True))).moves


def test_a_version_that_acts_where_it_is_needed_costs_nothing_elsewhere() -> None:
    """The same price of acting on a request: too much on all of them, little on the few that need what was learnt."""
    dear, seldom = dataclasses.replace(LOCAL, lora=0.06, swap=0.0), group(tokens=150, uses=60.0)
    asked = snapshot(groups=(seldom,), costs=dear)
    assert not plan(asked).moves
    needed = dataclasses.replace(asked, able=Able(pages=True, lora=True, always=False))
    uses = 60.1 / 31
    [move] = plan(needed).moves
    assert move.kind == "learn"
    assert move.saves == pytest.approx(uses * (150 * 0.004 - 0.06))
    told = explain(seldom, needed)
    bringing = 1.5 * 1.2 / told.holds
    assert told.costs["lora"] == pytest.approx(uses * 0.06 + bringing)
    assert told.moves_at["lora"] == pytest.approx(bringing / (150 * 0.004 - 0.06))
    learnt = dataclasses.replace(seldom, where=frozenset({"plain", "lora"}))
    assert not plan(dataclasses.replace(needed, groups=(learnt,))).moves
    dearer = dataclasses.replace(dear, lora=0.7)
    [back] = plan(dataclasses.replace(needed, groups=(learnt,), costs=dearer)).moves
    assert back.kind == "unlearn"
    assert back.saves == pytest.approx(uses * (0.7 - 150 * 0.004))
    assert back.why.startswith("versions cost 1.36 CPU-s a day, they spare 1.16 CPU-s"), (
        "what acting costs is no saving"
    )
    assert explain(seldom, dataclasses.replace(needed, costs=dearer)).moves_at["lora"] is None


def test_versions_that_cost_more_than_they_spare_act_no_longer() -> None:
    dear = dataclasses.replace(LOCAL, lora=0.2)
    learnt = group(where=frozenset({"plain", "lora"}), bytes=1000)
    [move] = plan(snapshot(groups=(learnt,), costs=dear)).moves
    assert (move.kind, move.records, move.bytes) == ("unlearn", ("r1",), -1000)
    assert not plan(snapshot(groups=(learnt,))).moves
    [wrong] = plan(snapshot(groups=(dataclasses.replace(learnt, teachable=False),))).moves
    assert (wrong.kind, wrong.saves, wrong.pays_after) == ("unlearn", 0.0, None)


def test_nothing_is_taught_or_kept_for_the_sake_of_what_no_longer_holds() -> None:
    """What is unlearnt in the same plan pays for no version: the next plan would unlearn what was taught beside it."""
    dear = dataclasses.replace(LOCAL, lora=0.2)  # 3.97 s a day
    wrong = group("wrong", tokens=200, teachable=False, where=frozenset({"plain", "lora"}), bytes=10)  # 7.7 s a day
    pupil = group("pupil")  # 1.9 s a day
    asked = snapshot(groups=(wrong, pupil), costs=dear)
    assert places.spared(pupil, asked) * places.HYSTERESIS < places.acting(asked) < places.spared(wrong, asked)
    [move] = plan(asked).moves
    assert (move.kind, move.records, move.saves) == ("unlearn", ("wrong",), 0.0)
    beside = dataclasses.replace(pupil, where=wrong.where, bytes=5)
    [move] = plan(dataclasses.replace(asked, groups=(wrong, beside))).moves
    assert (move.kind, move.records, move.bytes) == ("unlearn", ("pupil", "wrong"), -15)
    assert move.saves == pytest.approx(places.acting(asked) - places.spared(beside, asked))


def test_a_version_is_trained_again_for_the_records_that_are_left() -> None:
    asked = snapshot(owed=("v1", "v2"), owed_records=(1,))
    first, second = sorted(plan(asked).moves, key=lambda move: move.records)
    assert first.cost == pytest.approx(1.5 * 1.2)
    assert second.cost == pytest.approx(20 * 1.5 * 1.2)


def test_what_a_model_writes_is_priced_and_needs_leave() -> None:
    asked = snapshot(
        unsealed=("s1",), unread=10, turn_tokens=40.0, answer_tokens=20.0, sessions_day=2.0,
        costs=dataclasses.replace(LOCAL, output=0.03),
    )  # fmt: skip
    assert kinds(plan(asked).moves) == ["seal"]
    assert plan(asked).moves[0].cost == 0
    writes = plan(dataclasses.replace(asked, able=Able(writes=True)))
    assert kinds(writes.moves) == ["seal", "extract", "reconcile"]
    assert writes.moves[0].cost == pytest.approx(10 * 40 * 0.004 + 20 * 0.03)
    assert writes.moves[1].cost == pytest.approx(10 * (40 * 0.004 + 20 * 0.03))


def test_owed_work_comes_first_and_the_best_for_its_cost_next() -> None:
    moves = [
        Move(key="a", kind="learn", scope=ANA, cost=10, saves=100, holds=1),
        Move(key="b", kind="collapse", scope=ANA, cost=1, saves=50, holds=1),
        Move(key="c", kind="retrain", scope=ANA, cost=5),
        Move(key="d", kind="prime", scope=ANA, cost=0, saves=1, holds=1, bytes=100),
        Move(key="e", kind="evict", scope=ANA, saves=1, holds=1, bytes=-100),
    ]
    made, left = fit(moves, None)
    assert [move.key for move in made] == ["c", "e", "d", "b", "a"]
    assert not left
    made, left = fit(moves, Budget(seconds=8, bytes=50))
    assert [move.key for move in made] == ["c", "e", "b"]
    assert [move.key for move in left] == ["d", "a"]
    assert fit(moves, Budget(dollars=0))[0] == fit(moves, None)[0], "no dollar is spent by seconds"


def test_a_verdict_says_what_would_move_a_record() -> None:
    often = group()
    told = explain(often, snapshot(groups=(often,)))
    assert told.now == "plain"
    assert told.best == "pages"
    requests = (600 + 0.1) / 31
    at = told.moves_at["core"]
    assert at is not None
    assert at == pytest.approx(requests)
    assert told.low < told.uses < told.high
    assert "recalled when it is needed" in str(told)
    once = group(uses=0.0, sightings=1)
    seldom = explain(once, snapshot(groups=(once,), able=Able(lora=True)))
    assert seldom.best == "plain"
    assert "1 times only" in seldom.why


def test_a_rate_is_between_the_prior_and_what_was_counted() -> None:
    assert rate(0, 0).mean == pytest.approx(0.1)
    assert rate(70, 7).mean == pytest.approx(70.1 / 8)
    # scipy.stats.gamma(70.1, scale=1/8).ppf([.05, .95]) = 7.115, 10.552
    assert rate(70, 7).lower == pytest.approx(7.115, rel=0.002)
    assert rate(70, 7).upper == pytest.approx(10.552, rel=0.002)
    assert lifetime(0, 0) == pytest.approx(100.0)
    assert lifetime(4, 20) == pytest.approx(25 / 4.05)
    with pytest.raises(InvalidInput, match="uses"):
        rate(-1, 1)
    with pytest.raises(InvalidInput, match="prior_days"):
        rate(1, 1, 1, 0)
