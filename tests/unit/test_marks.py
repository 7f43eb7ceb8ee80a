from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentmem.activation.cache_model import Block, PromptCache
from agentmem.activation.marks import Level, MarkPlanner, keep_warm, prewarm_pays
from agentmem.cache_rules import CacheRules, Lifetime, rules_for
from agentmem.errors import InvalidInput

MODELS = ["anthropic:claude-opus-5-5", "anthropic:claude-opus-4-6", "openai:gpt-5.6-sol", "openai:gpt-6.1-sol"]


def rules_of(model: str) -> CacheRules:
    rules = rules_for(model)
    assert rules is not None
    return rules


ANTHROPIC = rules_of("anthropic:claude-opus-5")
#: One lifetime; three of them and two marks only; and entries that a read does not renew.
ODD = [
    replace(ANTHROPIC, lifetimes=ANTHROPIC.lifetimes[:1]),
    replace(ANTHROPIC, lifetimes=(*ANTHROPIC.lifetimes, Lifetime(name="1d", seconds=86_400, write=3.0)), marks=2),
    replace(ANTHROPIC, renewed=False, lookback=None),
]


def prompt(turns: int, *, system: int = 1500, core: int = 1000, version: int = 0, turn: int = 100) -> list[Level]:
    """A system part of one block, a core of one, and turns of two blocks each."""
    levels = [Level("system", "s", system, 1), Level("core", f"c{version}", system + core, 2)]
    history = Level("history", f"h{version}", system + core + turns * turn, 2 + 2 * turns)
    return [*levels, history] if turns else levels


def blocks_of(levels: list[Level]) -> list[Block]:
    """The same as content blocks, with a tail that is new each time."""
    found: list[Block] = []
    done = 0
    for level in levels:
        count, tokens = level.blocks - len(found), level.tokens - done
        if level.name == "history":
            found += [Block((level.key, index), tokens // count) for index in range(count)]
        else:
            found += [Block(level.key, tokens)]
        done = level.tokens
    return [*found, Block(object(), 50)]


def gaps(*values: float) -> Iterator[float]:
    yield from itertools.accumulate(values)


def after(planner: MarkPlanner, times: Iterator[float], turns: int = 3) -> float:
    """Send requests of one prompt; the last one's time."""
    at = 0.0
    for at in times:
        planner.done(prompt(turns), at)
    return at


def test_short_gaps_have_every_level_marked_for_the_shortest_time() -> None:
    planner = MarkPlanner(ANTHROPIC)
    at = after(planner, gaps(*[30.0] * 20))
    assert planner.plan(prompt(4), at + 30) == [(2, 0), (8, 0), (10, 0)] or planner.plan(prompt(4), at + 30) == [
        (1, 0), (2, 0), (8, 0), (10, 0),
    ]  # fmt: skip


def test_a_first_request_is_cached_for_the_shortest_time() -> None:
    marks = MarkPlanner(ANTHROPIC).plan(prompt(3), 0.0)
    assert marks[-1] == (8, 0)
    assert {life for _, life in marks} == {0}


def test_nothing_is_written_once_days_lie_between_requests() -> None:
    planner = MarkPlanner(ANTHROPIC)
    at = after(planner, gaps(*[86_400.0] * 12))
    assert planner.plan(prompt(3), at + 86_400) == []


def test_gaps_between_the_lifetimes_ask_for_the_longer_one() -> None:
    planner = MarkPlanner(ANTHROPIC)
    at = after(planner, gaps(*[1200.0] * 12))
    assert {life for _, life in planner.plan(prompt(3), at + 4000)} == {1}


def test_what_changes_with_every_pause_is_kept_for_less_long_than_what_stays() -> None:
    planner, at = MarkPlanner(ANTHROPIC), 0.0
    for session in range(12):
        at += 1200
        for turn in range(6):
            at += 30
            planner.done(prompt(turn, version=session), at)
    marks = dict(planner.plan(prompt(0, version=12), at + 4000))
    assert marks == {1: 1, 2: 0}


def test_a_busy_day_costs_little_more_than_the_best_fixed_marks_chosen_when_it_is_over() -> None:
    requests: list[tuple[list[Level], float]] = []
    at = 0.0
    for session in range(25):
        at += 1200
        for turn in range(18):
            requests.append((prompt(turn, system=3000, version=session), at))
            at += 30
    planner, cache, spent = MarkPlanner(ANTHROPIC), PromptCache(ANTHROPIC), 0.0
    for levels, at in requests:
        spent += cache.request(blocks_of(levels), planner.plan(levels, at), at).cost(ANTHROPIC)
        planner.done(levels, at)
    fixed = []
    for lives in ([0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]):
        cache, total = PromptCache(ANTHROPIC), 0.0
        for levels, at in requests:
            marks = [(level.blocks, life) for level, life in zip(levels, lives, strict=False)]
            total += cache.request(blocks_of(levels), marks, at).cost(ANTHROPIC)
        fixed.append(total)
    assert min(fixed) < 0.9 * fixed[0]
    assert spent < 1.02 * min(fixed)


@pytest.mark.parametrize("tokens", [100, 511])
def test_a_prompt_below_the_minimum_has_no_marks(tokens: int) -> None:
    assert MarkPlanner(ANTHROPIC).plan([Level("system", "s", tokens, 1)], 0.0) == []


def test_a_small_system_part_is_cached_with_what_follows_it() -> None:
    levels = prompt(5, system=100, core=200, turn=100)
    assert MarkPlanner(ANTHROPIC).plan(levels, 0.0) == [(12, 0)]


@pytest.mark.parametrize("model", ["openai:gpt-4o", "deepseek:deepseek-chat", "ollama:any"])
def test_hosts_without_marks_get_none(model: str) -> None:
    planner = MarkPlanner(rules_of(model))
    planner.done(prompt(3), 0.0)
    assert planner.plan(prompt(4), 10.0) == []


def test_more_new_blocks_than_the_lookback_still_find_the_entry() -> None:
    planner, cache, previous = MarkPlanner(ANTHROPIC), PromptCache(ANTHROPIC), 0
    for turns, at in ((5, 0.0), (25, 30.0), (60, 60.0)):
        levels = prompt(turns)
        bill = cache.request(blocks_of(levels), planner.plan(levels, at), at)
        planner.done(levels, at)
        assert bill.read == previous
        previous = levels[-1].tokens


def test_the_longest_time_that_the_caller_allows_is_kept() -> None:
    planner = MarkPlanner(ANTHROPIC)
    at = after(planner, gaps(*[1200.0] * 12))
    capped = [*prompt(3)[:2], Level("history", "h0", 2800, 8, longest=0)]
    assert dict(planner.plan(capped, at + 4000)) == {1: 1, 2: 1, 8: 0}


def test_it_says_what_the_host_still_holds_of_the_last_request() -> None:
    planner = MarkPlanner(ANTHROPIC)
    assert planner.held(0.0) is None
    planner.done(prompt(3), 0.0)
    assert (planner.held(299.0), planner.held(300.0)) == (2800, 0)
    other = [Level("system", "s", 1500, 1), Level("history", "of a second conversation", 2000, 4)]
    planner.done(other, 100.0)
    assert (8, 0) in planner.plan(prompt(4), 200.0)


def test_planning_changes_nothing_and_a_state_goes_on_as_it_was() -> None:
    planner = MarkPlanner(ANTHROPIC)
    at = after(planner, gaps(*[20.0, 1000.0, 400.0, 30.0, 9000.0] * 4))
    state = json.dumps(planner.state())
    first = planner.plan(prompt(4), at + 100)
    assert planner.plan(prompt(4), at + 100) == first
    assert json.dumps(planner.state()) == state
    assert len(state) < 2000
    assert MarkPlanner(ANTHROPIC, state=json.loads(state)).plan(prompt(4), at + 100) == first


def test_the_time_of_the_plan_counts_not_that_of_the_answer() -> None:
    planner = MarkPlanner(ANTHROPIC)
    planner.plan(prompt(3), 0.0)
    planner.done(prompt(3), 250.0)
    assert all(entry[5] == 300.0 for entry in planner.state()["ours"])


@pytest.mark.parametrize(
    "damage",
    [
        {"gaps": []},
        {"depths": [[1]]},
        {"gaps": ["x", 1, 1]},
        {"ours": [[1]]},
        {"last": [1]},
        {"account": [1]},
        {"gaps": [-1, 0, 0]},
    ],
)
def test_a_state_that_cannot_be_read_is_as_none(damage: dict[str, Any]) -> None:
    planner = MarkPlanner(ANTHROPIC)
    after(planner, gaps(*[1200.0] * 12))
    damaged = MarkPlanner(ANTHROPIC, state=planner.state() | damage)
    assert damaged.state() == MarkPlanner(ANTHROPIC).state()


def test_a_restart_forgets_the_cache_and_keeps_what_was_learnt() -> None:
    planner = MarkPlanner(ANTHROPIC)
    at = after(planner, gaps(*[30.0] * 20))
    planner.restart()
    state = planner.state()
    assert (state["ours"], state["last"], state["account"]) == ([], None, [0.0, 0.0, 0.0])
    assert state["gaps"][0] > 10
    assert (8, 0) in planner.plan(prompt(3), at + 30)


@pytest.mark.parametrize(
    "levels",
    [
        [Level("tools", "t", 600, 1)],
        [Level("history", "h", 600, 1), Level("system", "s", 700, 2)],
        [Level("system", "s", 600, 2), Level("core", "c", 500, 3)],
        [Level("system", "s", 600, 2), Level("core", "c", 700, 1)],
    ],
)
def test_levels_that_make_no_prompt_are_refused(levels: list[Level]) -> None:
    planner = MarkPlanner(ANTHROPIC)
    with pytest.raises(InvalidInput):
        planner.plan(levels, 0.0)
    assert planner.state() == MarkPlanner(ANTHROPIC).state()


@st.composite
def traces(draw: st.DrawFn) -> list[tuple[list[Level], float]]:
    """Requests at growing times; system and core change now and then, the history grows or begins anew."""
    at, system, core, start, turns = 0.0, 0, 0, 0, 0
    made: list[tuple[list[Level], float]] = []
    size = draw(st.sampled_from([100, 600, 3000]))
    for _ in range(draw(st.integers(1, 25))):
        at += draw(st.sampled_from([10.0, 200.0, 299.0, 301.0, 1700.0, 3500.0, 4000.0, 40_000.0, 90_000.0]))
        event = draw(st.integers(0, 9))
        system, core, start = system + (event == 0), core + (event == 1), start + (event == 2)
        turns = 0 if event == 2 else turns + draw(st.integers(0, 12))
        levels = [Level("system", f"s{system}", size, 1)]
        if draw(st.integers(0, 9)) or not made:
            levels.append(Level("core", f"c{system}.{core}", size + 700, 2))
            if turns:
                levels.append(Level("history", f"h{system}.{core}.{start}", size + 700 + 200 * turns, 2 + 2 * turns))
        made.append((levels, at))
    return made


#: Where a read does not renew: what is held of the system part ends before what always caching holds of the core.
ENDS_SOONER = [
    ([Level("system", "s1", 3000, 1), Level("core", f"c1.{core}", 3700, 2)], at)
    for core, at in ((0, 10.0), (1, 20.0), (1, 319.0))
]


@pytest.mark.parametrize("rules", [*map(rules_of, MODELS), *ODD], ids=[*MODELS, "one", "three", "once"])
@settings(max_examples=40, deadline=None)
@example(trace=ENDS_SOONER)
@given(trace=traces())
def test_the_planner_knows_what_the_host_charges_and_never_pays_half_more_than_the_simplest(
    rules: CacheRules, trace: list[tuple[list[Level], float]]
) -> None:
    planner, cache = MarkPlanner(rules), PromptCache(rules)
    regular = PromptCache(replace(rules, lookback=None, marks=4))
    spent = always = never = 0.0
    for levels, at in trace:
        blocks, tail = blocks_of(levels), 50
        marks = planner.plan(levels, at)
        assert len(marks) <= rules.marks
        spent += cache.request(blocks, marks, at).cost(rules) - tail
        always += regular.request(blocks, [(level.blocks, 0) for level in levels], at).cost(rules) - tail
        never += levels[-1].tokens
        planner.done(levels, at)
        account = planner.state()["account"]
        assert (account[0], account[2]) == pytest.approx((spent, never), abs=1)
        if rules.marks > 2:  # else it can't mark every end itself
            assert account[1] == pytest.approx(always, abs=1)
        assert spent <= 1.5 * min(never, account[1]) + 1


@pytest.mark.parametrize("model", [*MODELS, "openai:gpt-5.4"])
@pytest.mark.parametrize("parallel", [1, 2, 3, 8])
def test_prewarming_pays_where_a_simulation_says_so(model: str, parallel: int) -> None:
    rules, tokens = rules_of(model), 5000
    prefix = [Block("p", tokens)]
    for chance in (0.0, 0.1, 0.2, 0.5, 0.9, 1.0):
        caches = PromptCache(rules), PromptCache(rules)
        warm = caches[0].request(prefix, [(1, 0)], 0.0).cost(rules)
        read = caches[0].request(prefix, [(1, 0)], 1.0).cost(rules)
        cold = sum(PromptCache(rules).request(prefix, [(1, 0)], 1.0).cost(rules) for _ in range(parallel))
        pays = rules.prewarms and warm + chance * parallel * read < chance * cold
        assert prewarm_pays(rules, tokens, chance, parallel) == pays
    assert not prewarm_pays(rules, rules.minimum - 1, 1.0, 50)


@pytest.mark.parametrize("model", [*MODELS, "openai:gpt-4o", "deepseek:deepseek-v4-flash"])
@pytest.mark.parametrize("gap", [60, 299, 301, 500, 2000, 3600, 7000, 20_000, 60_000, 500_000, float("inf")])
def test_pings_pay_where_a_simulation_says_so(model: str, gap: float) -> None:
    rules, prefix = rules_of(model), [Block("p", 6400)]
    every = keep_warm(rules, gap, 6400)
    if gap == float("inf"):
        assert every is None
        return
    cache = PromptCache(rules)
    first = cache.request(prefix, [(1, 0)], 0.0)
    assert first.read == 0
    cold = PromptCache(rules)
    cold.request(prefix, [(1, 0)], 0.0)
    alone = cold.request(prefix, [(1, 0)], gap).cost(rules)
    step = 0.9 * rules.lifetimes[0].seconds
    times = [step * number for number in range(1, int(gap / step) + 1) if step * number < gap]
    bills = [cache.request(prefix, [(1, 0)], at) for at in (*times, gap)]
    assert all(bill.read for bill in bills)
    pinged = sum(bill.cost(rules) for bill in bills)
    assert (every is not None) == (pinged < alone - 1e-9)
    assert every in (None, pytest.approx(step))
    assert keep_warm(rules, gap, rules.minimum - 1) is None
