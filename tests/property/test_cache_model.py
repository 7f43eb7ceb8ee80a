"""The model of a prompt cache against a slow one that keeps whole prefixes and follows the rules by the word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem.activation.cache_model import REMEMBERED, Bill, Block, PromptCache
from agentmem.cache_rules import CacheRules, Lifetime, rules_for
from agentmem.errors import InvalidInput

LIVES = (Lifetime(name="short", seconds=10, write=1.25), Lifetime(name="long", seconds=40, write=2.0))
MARKED = CacheRules(kind="breakpoints", minimum=100, read=0.1, lifetimes=LIVES, marked=True, marks=4, lookback=3)
ANYWHERE = CacheRules(kind="breakpoints", minimum=100, read=0.1, lifetimes=LIVES, marked=True, marks=4)
FIXED = CacheRules(kind="breakpoints", minimum=50, read=0.1, lifetimes=LIVES, marked=True, marks=2, renewed=False)
STEPS = CacheRules(
    kind="automatic", minimum=100, step=32, read=0.5, lifetimes=(Lifetime(name="x", seconds=10, write=1.0),)
)

Request = tuple[list[Block], list[tuple[int, int]], float]


@dataclass
class Slow:
    """One entry per stored prefix: its keys, its lifetime, and the time at which it is gone."""

    rules: CacheRules
    entries: dict[tuple[object, ...], tuple[int, float]] = field(default_factory=dict)

    def request(self, blocks: Sequence[Block], marks: Sequence[tuple[int, int]], at: float) -> Bill:
        rules, keys = self.rules, tuple(block.key for block in blocks)
        total = sum(block.tokens for block in blocks)

        def tokens(count: int) -> int:
            return sum(block.tokens for block in blocks[:count])

        alive = {count for count in range(1, len(blocks) + 1) if self.entries.get(keys[:count], (0, -1.0))[1] > at}
        if rules.marked:
            seen = {
                count
                for count in alive
                for mark, _ in marks
                if count <= mark and (rules.lookback is None or mark - count <= rules.lookback)
            }
        else:
            seen = alive
            marks = [(count, 0) for count in range(1, len(blocks) + 1)]
        found = max(seen, default=0)
        if rules.renewed:
            for count in alive:
                if count <= found:
                    life = self.entries[keys[:count]][0]
                    self.entries[keys[:count]] = (life, at + rules.lifetimes[life].seconds)
        written, done = [0] * len(rules.lifetimes), tokens(found)
        for count, life in marks:
            if count > found and tokens(count) >= rules.minimum:
                self.entries[keys[:count]] = (life, at + rules.lifetimes[life].seconds)
                written[life] += tokens(count) - done
                done = tokens(count)
        if rules.marked:
            return Bill(tokens(found), tuple(written), total - done)
        read = tokens(found)
        read = 0 if read < rules.minimum else read - (read - rules.minimum) % rules.step
        return Bill(read, (0,), total - read)


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    """Requests that share beginnings, with marks in a valid order, at growing times."""
    made: list[Request] = []
    at = 0.0
    for _ in range(draw(st.integers(1, 12))):
        at += draw(st.sampled_from([0.0, 1.0, 5.0, 9.0, 10.0, 11.0, 39.0, 40.0, 60.0]))
        keys = draw(st.lists(st.sampled_from([-1, -2, 3]), min_size=1, max_size=8))
        blocks = [Block(key, 20 + 30 * abs(key)) for key in keys]
        counts = sorted(draw(st.sets(st.integers(1, len(blocks)), max_size=2)))
        lives = sorted((draw(st.integers(0, 1)) for _ in counts), reverse=True)
        made.append((blocks, list(zip(counts, lives, strict=True)), at))
    return made


@pytest.mark.parametrize("rules", [MARKED, ANYWHERE, FIXED, STEPS], ids=["lookback", "anywhere", "fixed", "steps"])
@given(trace=requests(), forgetful=st.booleans())
def test_it_bills_as_the_rules_say(rules: CacheRules, trace: list[Request], forgetful: bool) -> None:
    cache, slow = PromptCache(rules), Slow(rules)
    for blocks, marks, at in trace:
        if forgetful:  # what can't be read any more may be dropped at any time
            cache._forget(at)
        told = cache.readable(blocks, at)
        bill = cache.request(blocks, marks, at)
        assert bill == slow.request(blocks, marks, at)
        assert bill.tokens == sum(block.tokens for block in blocks)
        if not rules.marked or (marks and marks[-1][0] == len(blocks)):
            assert told <= bill.read
        if not rules.marked:
            assert told == bill.read


def blocks_of(*tokens: int) -> list[Block]:
    return [Block(index, count) for index, count in enumerate(tokens)]


def anthropic() -> CacheRules:
    rules = rules_for("anthropic:claude-opus-5-5")
    assert rules is not None
    return rules


def test_below_the_minimum_nothing_is_cached_silently() -> None:
    cache = PromptCache(anthropic())
    for at in (0.0, 1.0):
        assert cache.request(blocks_of(511), [(1, 0)], at) == Bill(0, (0, 0), 511)
    assert cache.request(blocks_of(511, 1), [(1, 0), (2, 0)], 2.0) == Bill(0, (512, 0), 0)


def test_a_read_starts_the_lifetime_anew_and_its_end_is_too_late() -> None:
    cache = PromptCache(anthropic())
    assert cache.request(blocks_of(600), [(1, 0)], 0.0).written == (600, 0)
    assert cache.request(blocks_of(600), [(1, 0)], 299.0).read == 600
    assert cache.request(blocks_of(600), [(1, 0)], 598.9).read == 600
    assert cache.request(blocks_of(600), [(1, 0)], 898.9).read == 0


def test_more_than_twenty_blocks_after_an_entry_miss_it_unless_a_mark_stands_between() -> None:
    blocks = blocks_of(*[100] * 31)
    for marks, read in (([(30, 0)], 1000), ([(31, 0)], 0), ([(16, 0), (31, 0)], 1000)):
        cache = PromptCache(anthropic())
        cache.request(blocks[:10], [(10, 0)], 0.0)
        assert cache.request(blocks, marks, 1.0).read == read


def test_longer_lifetimes_come_first_and_each_token_is_paid_at_the_next_mark_s() -> None:
    cache = PromptCache(anthropic())
    assert cache.request(blocks_of(100, 500, 50, 7), [(1, 1), (2, 1), (3, 0)], 0.0) == Bill(0, (50, 600), 7)
    assert cache.request(blocks_of(100, 500, 50, 7), [(3, 0)], 400.0) == Bill(600, (50, 0), 7)
    with pytest.raises(InvalidInput, match="longer lifetimes come first"):
        cache.request(blocks_of(600, 600), [(1, 0), (2, 1)], 0.0)


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ([(n, 0) for n in range(1, 6)], "takes 4"),
        ([(0, 0)], "after block 0"),
        ([(7, 0)], "after block 7"),
        ([(1, 2)], "lifetime 2"),
        ([(2, 0), (2, 0)], "out of order"),
    ],
)
def test_marks_that_a_host_refuses_are_refused_and_change_nothing(marks: list[tuple[int, int]], said: str) -> None:
    cache = PromptCache(anthropic())
    with pytest.raises(InvalidInput, match=said):
        cache.request(blocks_of(*[600] * 6), marks, 0.0)
    assert cache.readable(blocks_of(*[600] * 6), 0.0) == 0


def test_a_marked_host_reads_nothing_without_marks() -> None:
    cache = PromptCache(anthropic())
    cache.request(blocks_of(600), [(1, 0)], 0.0)
    assert cache.request(blocks_of(600), [], 1.0) == Bill(0, (0, 0), 600)


def test_an_automatic_host_ignores_marks_and_keeps_every_end_in_steps() -> None:
    rules = rules_for("openai:gpt-4o")
    assert rules is not None
    cache = PromptCache(rules)
    assert cache.request(blocks_of(1000, 200, 90), [(1, 0)], 0.0) == Bill(0, (0,), 1290)
    assert cache.request([*blocks_of(1000, 200), Block("other", 90)], [], 1.0) == Bill(1152, (0,), 138)
    assert cache.readable(blocks_of(1000), 2.0) == 0
    assert cache.request(blocks_of(1000, 200, 90), [], 600.5).read == 1152


def test_bills_add_up_and_have_a_price() -> None:
    rules = anthropic()
    bill = Bill(100, (10, 20), 5) + Bill(0, (0, 1), 2)
    assert bill == Bill(100, (10, 21), 7)
    assert bill.cost(rules) == pytest.approx(100 * 0.05 + 12.5 + 42 + 7)


@pytest.mark.parametrize("rules", [MARKED, STEPS], ids=["marked", "automatic"])
def test_a_long_life_takes_no_more_memory_than_what_can_be_read(rules: CacheRules) -> None:
    cache = PromptCache(rules)
    for turn in range(5000):
        cache.request([Block(0, 5000), Block((turn, 0), 10), Block((turn, 1), 10)], [(1, 0)], float(turn))
    assert len(cache._nodes) <= 2 * REMEMBERED
    assert cache.readable([Block(0, 5000)], 5000.0) > 4000
