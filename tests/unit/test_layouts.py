"""Where a history begins, on traces whose bills can be worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import random
import time

import pytest

from agentmem.activation.layouts import Coming, Layout, Layouts, Turn
from agentmem.activation.replays import Policy, Recall, fixed, planned, replay
from agentmem.cache_rules import CacheRules, Depth, Lifetime
from agentmem.errors import InvalidInput

DAY = 86400.0


def marked(minimum: int = 512, read: float = 0.1) -> CacheRules:
    lives = (Lifetime(name="5m", seconds=300, write=1.25), Lifetime(name="1h", seconds=3600, write=2.0))
    return CacheRules(kind="breakpoints", minimum=minimum, read=read, lifetimes=lives, marked=True, marks=4)


def automatic(read: float = 0.02, minimum: int = 64, seconds: float = 21600) -> CacheRules:
    life = Lifetime(name="6h", seconds=seconds, write=1.0)
    return CacheRules(kind="automatic", minimum=minimum, step=64, read=read, lifetimes=(life,))


def turn(number: int, at: float, session: str = "s", *, message: int = 40, reply: int = 60, system: int = 1500) -> Turn:
    return Turn(id=f"t{number}", at=at, session=session, system=system, core=0, message=message, reply=reply)


def coming(like: Turn) -> Coming:
    return Coming(like.at, like.session, like.system, like.message)


def sessions(count: int, requests: int, gap: float, **sizes: int) -> list[Turn]:
    """So many sessions, half a minute between their requests and ``gap`` seconds between them."""
    turns: list[Turn] = []
    clock = 0.0
    for session in range(count):
        for _ in range(requests):
            turns.append(turn(len(turns), clock, f"s{session}", **sizes))
            clock += 30
        clock += gap
    return turns


def told(layouts: Layouts, turns: list[Turn], recalled: int = 0, *, again: int = 1) -> list[Layout]:
    """The layouts of these turns; as soon as anything is out of sight each recalls a record of ``recalled`` tokens, the
    same one ``again`` times in a row."""
    found = []
    for number, one in enumerate(turns):
        layout = layouts.choose(coming(one))
        hidden = recalled and layout.start != turns[0].id and number
        known = ((f"r{number // again}", recalled),) if hidden else ()
        layout = layouts.choose(dataclasses.replace(coming(one), recalled=known))
        layouts.done(one.model_copy(update={"recalled": known}), layout)
        found.append(layout)
    return found


def recalls(tokens: int) -> Recall:
    def recall(number: int, first: int, kept: set[str]) -> list[tuple[str, int]]:
        return [(f"r{number}", tokens)] if first and number else []

    return recall


def test_a_young_memory_is_sent_whole() -> None:
    # Two sessions of five turns of 100 tokens: 500 tokens read at .02 are 10 a request, recalling would be some 250.
    turns = sessions(2, 5, 600)
    layouts = told(Layouts(automatic()), turns)
    assert layouts[0].start is None
    assert {layout.start for layout in layouts[1:]} == {"t0"}


def test_an_old_memory_is_left_behind_when_the_cache_is_cold() -> None:
    # After 20 sessions of 1,000 tokens a new day would write 20,000 tokens at 1.25 and read them at .1.
    turns = sessions(20, 10, DAY)
    layouts = Layouts(marked())
    told(layouts, turns, recalled=200)
    assert layouts.choose(coming(turn(999, turns[-1].at + DAY, "new"))).start is None


def test_a_warm_history_is_kept_where_reading_costs_next_to_nothing() -> None:
    # 3,000 tokens at .02 are 60 a request; leaving them would recall 250.
    turns = sessions(3, 10, 1200)
    assert told(Layouts(automatic()), turns, recalled=250)[-1].start == "t0"


def test_a_warm_history_is_left_when_reading_it_costs_more_than_recalling() -> None:
    # 60 sessions of 1,000 tokens: 60,000 * .02 = 1,200 a request against 250.
    turns = sessions(60, 10, 1200)
    layouts = told(Layouts(automatic()), turns, recalled=250)
    starts = [turns.index(next(t for t in turns if t.id == layout.start)) for layout in layouts if layout.start]
    assert starts == sorted(starts), "a history that was left is not fetched back while the cache is warm"
    assert starts[-1] > len(turns) - 100


def test_a_long_session_is_folded_and_keeps_its_tail() -> None:
    turns = [turn(n, n * 20.0, message=600, reply=80, system=200) for n in range(120)]
    layouts = told(Layouts(marked()), turns, recalled=400)
    folds = [n for n in range(2, 120) if layouts[n].start != layouts[n - 1].start]
    assert 4 <= len(folds) <= 16, folds
    for number in folds:
        begin = next(n for n, t in enumerate(turns) if t.id == layouts[number].start)
        assert number - begin >= 5


def test_a_session_is_folded_no_earlier_than_its_rebuild_has_been_carried() -> None:
    # Reading at .1: the excess of turn n over its last five is .1 * 680 * (n - 5) less what the fold would recall; the
    # rebuild writes five turns at 1.25 instead of reading them: 1.15 * 3,400 = 3,910. Sum(68 k - 250) passes that at
    # k = 15 with the belief of 250 recalled tokens, and no fold can pay before k * 68 > 250, at turn 9.
    turns = [turn(n, n * 20.0, message=600, reply=80, system=200) for n in range(40)]
    layouts = told(Layouts(marked()), turns, recalled=250)
    first = next(n for n in range(2, 40) if layouts[n].start != "t0")
    assert 10 <= first <= 22


def computed(layouts: Layouts, turns: list[Turn], depth: Depth, recalled: int) -> tuple[float, float]:
    """What the turns really cost on an engine of one's own, rebuilds with them, where each recalls in proportion to
    what is out of sight; and the mean tokens of their histories."""
    total, behind, before, order = 0.0, 0.0, None, [one.id for one in turns]
    for number, one in enumerate(turns):
        layout = layouts.choose(coming(one))
        first = number if layout.start is None else order.index(layout.start)
        tokens = recalled * first // max(number, 1)
        known = ((f"r{number}", tokens),) if tokens else ()
        history = sum(t.message + t.reply for t in turns[first:number])
        held = one.system + history * (layout.start == before)
        end = one.system + history + one.message + tokens
        total += (end - held) * (depth.first + depth.each * (end + held) / 2) + depth.read * held
        layouts.done(one.model_copy(update={"recalled": known}), layout)
        before, behind = layout.start or one.id, behind + history
    return total, behind / len(turns)


def test_where_each_computed_token_attends_to_all_before_it_less_history_is_kept() -> None:
    # A small model: a token behind 2,400 costs twice what it costs with none before it. By one price of reading, that
    # of loading it, the history would grow to the window.
    depth = Depth(first=0.4, each=1.7e-4, read=0.005)
    life = Lifetime(name="kept", seconds=1e12, write=1.01)
    flat = CacheRules(kind="engine", minimum=64, step=64, read=0.01, lifetimes=(life,), context_tokens=8192)
    turns = sessions(20, 12, DAY, system=200)
    bill, behind = computed(Layouts(dataclasses.replace(flat, depth=depth), window=6144), turns, depth, 300)
    before, more = computed(Layouts(flat, window=6144), turns, depth, 300)
    assert behind < 0.5 * more
    assert bill < 0.75 * before


def test_writing_a_head_anew_is_the_dearer_the_deeper_it_reaches() -> None:
    depth = Depth(first=0.5, each=2e-4, read=0.02)
    rules = dataclasses.replace(automatic(read=0.1), depth=depth)
    assert automatic(read=0.1).anew(100) == pytest.approx(90)
    assert rules.anew(100) == pytest.approx(100 * (0.5 + 2e-4 * 50 - 0.02))
    assert rules.anew(4000) > 2 * 20 * rules.anew(100) * 0.6
    assert depth.over(2.0) == Depth(first=0.25, each=1e-4, read=0.01)


def test_a_prefix_is_filled_to_the_minimum_by_what_was_said_before() -> None:
    # A system part of 200 and a minimum of 1,024: a session of ten turns of 100 tokens alone would be paid in full.
    turns = sessions(12, 14, DAY, system=200)
    layouts = Layouts(marked(minimum=1024))
    told(layouts, turns, recalled=250)
    new = turn(999, turns[-1].at + DAY, "new", system=200)
    start = layouts.choose(coming(new)).start
    assert start is not None
    held = sum(t.message + t.reply for t in turns[next(n for n, t in enumerate(turns) if t.id == start) :])
    assert 1024 <= 200 + held <= 1400


def test_a_minimum_far_away_is_left_alone() -> None:
    turns = sessions(12, 3, DAY, system=200)
    layouts = Layouts(marked(minimum=4096))
    told(layouts, turns, recalled=100)
    assert layouts.choose(coming(turn(999, turns[-1].at + DAY, "new", system=200))).start is None


def test_a_core_fills_the_prefix_where_nothing_was_said_yet() -> None:
    rules = marked(minimum=1024)
    # 1,024 and a margin of 2 % are 1,045 tokens.
    assert Layouts(rules, core_tokens=512).choose(coming(turn(0, 0.0, system=800))).core == 245
    assert Layouts(rules, core_tokens=100).choose(coming(turn(0, 0.0, system=800))).core == 0
    assert Layouts(rules, core_tokens=512).choose(coming(turn(0, 0.0, system=1500))).core == 0


def test_a_core_stands_still_while_the_history_grows() -> None:
    layouts = Layouts(marked(minimum=1024), core_tokens=512)
    cores = []
    for number in range(8):
        one = turn(number, number * 30.0, system=800)
        layout = layouts.choose(coming(one))
        cores.append(layout.core)
        layouts.done(one.model_copy(update={"core": layout.core}), layout)
    assert cores == [245] * 8


def test_a_core_that_came_smaller_than_wanted_is_not_wanted_again() -> None:
    layouts = Layouts(marked(minimum=1024), core_tokens=512)
    first = turn(0, 0.0, system=800)
    layout = layouts.choose(coming(first))
    assert layout.core == 245
    layouts.done(first.model_copy(update={"core": 80}), layout)
    later = turn(1, 1000.0, "s", system=800)
    assert layouts.choose(coming(later)).core <= 80


def test_a_prefix_that_the_host_never_keeps_is_not_filled_again_and_again() -> None:
    # The host keeps nothing (our counts may be off): what is sent beyond the session would be paid in full each time.
    layouts = Layouts(marked(minimum=1024))
    told(layouts, sessions(8, 14, DAY, system=200), recalled=250)
    starts = []
    for number in range(1000, 1018):
        one = turn(number, 30 * DAY + number * 30.0, "new", system=200)
        asked = dataclasses.replace(coming(one), held=0)
        layout = layouts.choose(asked)
        starts.append(layout.start)
        layouts.done(one, layout, held=0)
    assert len(set(starts)) <= 4, "a beginning that moves each time can never be kept"
    assert starts[-1] == "t1000", "in the end only the session itself is sent"


def test_the_history_fits_the_window() -> None:
    layouts = Layouts(automatic(), window=6000)
    turns = [turn(n, n * 20.0, message=200, reply=100) for n in range(200)]
    number = {one.id: place for place, one in enumerate(turns)}
    starts = []
    for place, one in enumerate(turns):
        layout = layouts.choose(coming(one))
        begin = number.get(layout.start or "", place)
        assert 1500 + 300 * (place - begin) + one.message <= 6000
        starts.append(begin)
        layouts.done(one, layout)
    assert len(set(starts)) < 40, "a history at the window's edge must not move at every turn"


def test_the_history_stays_below_what_it_may_have() -> None:
    layouts = Layouts(automatic(), history_tokens=1000)
    turns = [turn(n, n * 20.0, message=60, reply=40) for n in range(60)]
    number = {one.id: place for place, one in enumerate(turns)}
    sizes = []
    for place, one in enumerate(turns):
        layout = layouts.choose(coming(one))
        sizes.append(100 * (place - number.get(layout.start or "", place)))
        layouts.done(one, layout)
    assert max(sizes) == 1000
    assert min(sizes[10:]) >= 400


def test_a_window_too_small_for_any_history_leaves_none() -> None:
    layouts = Layouts(automatic(), window=1000)
    layouts.done(turn(0, 0.0), layouts.choose(coming(turn(0, 0.0))))
    assert layouts.choose(coming(turn(1, 30.0))).start is None


def test_records_stay_where_recalling_them_again_costs_more() -> None:
    # Each record is recalled twice in a row, so half of what is recalled was so before. Writing free, reading at .02:
    # keeping a token for nine more requests costs 1.18, recalling it anew 1.5. At 1.25 and .1 keeping costs 2.15.
    turns = sessions(30, 10, DAY)
    for rules, keeps in ((automatic(), True), (marked(), False)):
        layouts = Layouts(rules)
        told(layouts, turns, recalled=200, again=2)
        new = dataclasses.replace(coming(turn(999, turns[-1].at + DAY, "new")), recalled=(("r", 200),))
        assert layouts.choose(new).keep is keeps


def test_records_that_never_come_back_are_not_kept() -> None:
    turns = sessions(30, 10, DAY)
    layouts = Layouts(automatic())
    told(layouts, turns, recalled=200)
    assert not layouts.choose(
        dataclasses.replace(coming(turn(999, turns[-1].at + DAY, "new")), recalled=(("r", 200),))
    ).keep


def test_the_beginning_does_not_depend_on_what_is_recalled() -> None:
    turns = sessions(10, 10, DAY)
    layouts = Layouts(marked())
    told(layouts, turns, recalled=300)
    before = coming(turn(999, turns[-1].at + 60, "s9"))
    after = dataclasses.replace(before, recalled=(("r", 5000),))
    assert layouts.choose(before).start == layouts.choose(after).start


def test_a_session_that_is_going_on_beside_another_stays_in_the_history() -> None:
    layouts = Layouts(marked(read=0.5))
    layouts.done(turn(0, 0.0, "one"), layouts.choose(coming(turn(0, 0.0, "one"))))
    for number in range(1, 12):
        one = turn(number, number * 20.0, "one" if number % 2 else "two")
        assert layouts.choose(coming(one)).start == "t0"
        layouts.done(one, layouts.choose(coming(one)))


def test_what_the_host_no_longer_holds_is_cold() -> None:
    turns = sessions(12, 10, 60)
    layouts = Layouts(marked())
    told(layouts, turns, recalled=200)
    soon = Coming(turns[-1].at + 60, "new", 1500, 40, held=None)
    lost = dataclasses.replace(soon, held=0, at=turns[-1].at + 700)
    assert layouts.choose(lost).start is None


@pytest.mark.slow
def test_ten_thousand_turns_are_chosen_for_in_milliseconds_from_a_small_state() -> None:
    for rules in (automatic(read=0.0001), marked()):
        layouts = Layouts(rules)
        chance = random.Random(1)
        clock = 0.0
        for number in range(10_000):
            clock += chance.choice([20, 30, 60, 2000, DAY])
            session = f"{number // 20:032x}"  # ids as long as real ones
            one = turn(number, clock, session, message=chance.randint(5, 200), reply=chance.randint(5, 400))
            one = one.model_copy(update={"id": f"{number:032x}", "recalled": ((f"{number:032x}", 40),)})
            if number < 9_900 and number % 50:  # a long past is built up without asking each time
                layouts.done(one, Layout(None if rules.marked else f"{0:032x}"))
            else:
                layouts.done(one, layouts.choose(coming(one)))
        begun = time.process_time()
        for _ in range(20):
            layouts.choose(coming(turn(10_001, clock + 30, "s499")))
        assert (time.process_time() - begun) / 20 < 0.02  # about 1 ms where nothing else runs
        assert len(json.dumps(layouts.state())) < 8_000


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"form": 99},
        {"form": 1, "places": [["t", None, 1, 2.0]]},
        {"form": 1},
        {"form": 1, "places": [[1, 2]]},
        {"form": 1, "places": 7},
    ],
)
def test_a_state_that_cannot_be_read_is_named(broken: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="state"):
        Layouts(marked(), state=broken)


def test_replay_bills_the_same_turns_under_each_policy() -> None:
    # One session of three requests half a minute apart: system 1,500, message 40, reply 60, nothing recalled.
    # No cache: 1,540 + 1,640 + 1,740 = 4,920. Cached at 1.25/.1: 1,540 written; 1,540 read, 100 written; 1,640 read,
    # 100 written: 1,925 + 154 + 125 + 164 + 125 = 2,493.
    rules = marked()
    turns = [turn(n, n * 30.0) for n in range(3)]
    bills = {name: bill.cost(rules) for name, bill in replay(rules, turns).items()}
    assert bills["no cache"] == bills["full history uncached"] == 4920
    assert bills["full history"] == pytest.approx(2493)
    assert bills["no memory"] == pytest.approx(2493)
    assert bills["planned"] <= 1.02 * 2493


def test_a_record_of_a_turn_in_the_history_is_not_recalled_in_a_replay() -> None:
    turns = [turn(n, n * 30.0) for n in range(3)]
    turns[2] = turns[2].model_copy(update={"recalled": (("t0", 50), ("said in a reply", 30))})
    rules = automatic(read=0.1)
    bills = replay(rules, turns, home={"said in a reply": "t1"})
    assert bills["layered"] == bills["no memory"]
    assert replay(rules, turns)["layered"].tokens == bills["layered"].tokens + 30


def test_planned_is_never_dearer_than_the_fixed_ways_on_plain_traces() -> None:
    for rules in (marked(read=0.05), automatic(), automatic(read=0.5, minimum=1024)):
        for gap in (1200.0, DAY):
            turns = sessions(20, 15, gap)
            recall = recalls(200)
            mine = sum(one.bill.cost(rules) for one in planned(rules, turns, recall))
            for policy in (Policy(start="scope", recalled="none"), Policy(start="session")):
                theirs = sum(one.bill.cost(rules) for one in fixed(rules, turns, policy, recall))
                assert mine <= 1.03 * theirs, (rules.read, gap, policy.start)


def test_a_search_that_always_fills_its_budget_does_not_make_the_history_precious() -> None:
    # Whatever is out of sight, each turn recalls 500 tokens: that is all that a longer history can ever save.
    turns = sessions(24, 15, 1200.0)
    rules = marked(read=0.05)
    mine = sum(one.bill.cost(rules) for one in planned(rules, turns, recalls(500)))
    short_and_long = (Policy(start="session", marks=marks) for marks in ((0, 0), (1, 1), (1, 0)))
    theirs = min(sum(one.bill.cost(rules) for one in fixed(rules, turns, p, recalls(500))) for p in short_and_long)
    assert mine <= 1.1 * theirs


@pytest.mark.parametrize(("read", "times"), [(0.1, 2.5), (0.05, 1.8), (0.02, 1.2)])
def test_a_long_run_of_an_agent_costs_a_fraction_of_its_full_cached_history(read: float, times: float) -> None:
    turns = [turn(n, n * 20.0, message=600, reply=80, system=200) for n in range(200)]
    rules = marked(read=read)
    full = Policy(start="scope", recalled="none")
    theirs = sum(one.bill.cost(rules) for one in fixed(rules, turns, full, recalls(400)))
    sent = list(planned(rules, turns, recalls(400)))
    assert theirs >= times * sum(one.bill.cost(rules) for one in sent)
    assert max(one.bill.tokens for one in sent) < 40_000  # the full history has 136,000 at the end
