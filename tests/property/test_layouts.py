"""Whatever turns come: choices are a function of the state, the state survives JSON, the prefix only grows."""

from __future__ import annotations

import dataclasses
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.activation.layouts import Coming, Layouts, Turn
from agentmem.activation.replays import planned, replay
from agentmem.cache_rules import CacheRules, Lifetime

_LIVES = (Lifetime(name="5m", seconds=300, write=1.25), Lifetime(name="1h", seconds=3600, write=2.0))
RULES = [
    CacheRules(kind="breakpoints", minimum=1024, read=0.1, lifetimes=_LIVES, marked=True, marks=4, lookback=20),
    CacheRules(kind="breakpoints", minimum=4096, read=0.05, lifetimes=_LIVES, marked=True, marks=4),
    CacheRules(
        kind="automatic", minimum=64, step=64, read=0.02, lifetimes=(Lifetime(name="h", seconds=3600, write=1.0),)
    ),
    CacheRules(kind="engine", minimum=16, step=16, read=0.0, lifetimes=(Lifetime(name="h", seconds=3600, write=1.0),)),
    CacheRules(
        kind="engine",
        minimum=256,
        step=256,
        read=0.02,
        lifetimes=(Lifetime(name="kept", seconds=float("inf"), write=1.03),),
    ),
]

_SIZE = st.integers(0, 3000)
_STEP = st.tuples(
    st.sampled_from([0.0, 20.0, 299.0, 301.0, 1200.0, 90_000.0]),
    st.integers(0, 2),  # session
    _SIZE,
    _SIZE,
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 400)), max_size=3),
)


def made(steps: list[tuple[float, int, int, int, list[tuple[str, int]]]]) -> list[Turn]:
    turns = []
    clock = 0.0
    for number, (gap, session, message, reply, recalled) in enumerate(steps):
        clock += gap
        turns.append(
            Turn(
                id=f"t{number}",
                at=clock,
                session=f"s{session}",
                system=700,
                core=0,
                message=message,
                reply=reply,
                recalled=tuple(dict(recalled).items()),
            )
        )
    return turns


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(_STEP, max_size=25), rules=st.sampled_from(RULES), window=st.sampled_from([None, 3000]))
def test_a_state_through_json_chooses_the_same_and_choosing_changes_nothing(
    steps: list[tuple[float, int, int, int, list[tuple[str, int]]]], rules: CacheRules, window: int | None
) -> None:
    layouts = Layouts(rules, core_tokens=500, window=window)
    for turn in made(steps):
        coming = Coming(turn.at, turn.session, turn.system, turn.message, turn.recalled)
        before = json.dumps(layouts.state())
        layout = layouts.choose(coming)
        assert layouts.choose(coming) == layout
        assert json.dumps(layouts.state()) == before
        again = Layouts(rules, core_tokens=500, window=window, state=json.loads(before))
        assert again.choose(coming) == layout
        assert layouts.choose(dataclasses.replace(coming, recalled=None)).start == layout.start
        layouts.done(turn.model_copy(update={"core": layout.core}), layout)
        again.done(turn.model_copy(update={"core": layout.core}), layout)
        assert again.state() == layouts.state()


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(_STEP, max_size=25), rules=st.sampled_from(RULES))
def test_a_history_begins_with_a_turn_that_was(
    steps: list[tuple[float, int, int, int, list[tuple[str, int]]]], rules: CacheRules
) -> None:
    layouts = Layouts(rules)
    turns = made(steps)
    numbers = {turn.id: number for number, turn in enumerate(turns)}
    for number, turn in enumerate(turns):
        layout = layouts.choose(Coming(turn.at, turn.session, turn.system, turn.message))
        assert layout.start is None or numbers[layout.start] < number
        assert layout.core == 0, "no core was allowed"
        layouts.done(turn, layout)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(_STEP, min_size=1, max_size=40), rules=st.sampled_from(RULES), paid=st.integers(0, 400))
def test_a_prompt_stays_within_its_window_and_a_warm_one_keeps_its_core(
    steps: list[tuple[float, int, int, int, list[tuple[str, int]]]], rules: CacheRules, paid: int
) -> None:
    window = 6000
    layouts = Layouts(rules, core_tokens=500, window=window)
    start: str | None = None
    core = 0
    for turn in made(steps):
        layout = layouts.choose(Coming(turn.at, turn.session, turn.system, turn.message, core=paid))
        assert not layout.behind or layout.behind + turn.system + turn.message <= window
        assert layout.core >= min(paid, core)
        if not layout.cold:  # what is cached behind the core stays as it is
            assert layout.core == core
            assert start is None or layout.start == start
        start, core = layout.start, layout.core
        layouts.done(turn.model_copy(update={"core": layout.core}), layout, base=paid)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(_STEP, min_size=1, max_size=20), rules=st.sampled_from(RULES))
def test_bills_are_whole_and_never_negative(
    steps: list[tuple[float, int, int, int, list[tuple[str, int]]]], rules: CacheRules
) -> None:
    turns = made(steps)
    for name, bill in replay(rules, turns).items():
        assert bill.read >= 0, name
        assert min(bill.written) >= 0, name
        assert bill.uncached >= 0, name
        assert bill.tokens >= 700 * len(turns), name


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(_STEP, min_size=2, max_size=20))
def test_while_the_beginning_stands_still_the_prefix_only_grows(
    steps: list[tuple[float, int, int, int, list[tuple[str, int]]]],
) -> None:
    turns = made(steps)
    forever = Lifetime(name="forever", seconds=1e12, write=1.0)
    exact = CacheRules(kind="automatic", minimum=1, read=0.05, lifetimes=(forever,))

    def recall(number: int, first: int, kept: set[str]) -> list[tuple[str, int]]:
        return [(id_, tokens) for id_, tokens in turns[number].recalled if id_ not in kept]

    before = None
    for sent in planned(exact, turns, recall):
        if before is not None and sent.first == before.first:
            # All of the last request but what it recalled stands in this one, byte for byte, so it is read.
            assert sent.bill.read >= before.bill.tokens - sum(tokens for _, tokens in before.recalled)
        before = sent
