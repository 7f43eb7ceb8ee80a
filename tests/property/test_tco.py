"""What holds of every workload's bill: it grows with what is asked, and caches cost no more than their writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.cache_rules import CacheRules, Lifetime
from agentmem.tco.billing import billed, cheapest
from agentmem.tco.offers import HOSTED_SPEED, Machine, Offer, Prices, own
from agentmem.tco.placing import placed
from agentmem.tco.policies import FIRST, FIRST_CACHED, FULL, FULL_CACHED, LAYERS, LEARNT, NAMES, OURS, bills, ways
from agentmem.tco.traces import people
from agentmem.tco.workload import Workload


def marked(read: float, minimum: int) -> Offer:
    lives = (Lifetime(name="5m", seconds=300, write=1.25), Lifetime(name="1h", seconds=3600, write=2.0))
    rules = CacheRules(
        kind="breakpoints", minimum=minimum, read=read, lifetimes=lives, marked=True, marks=4, context_tokens=20_000
    )
    prices = Prices(input=2e-6, read=read * 2e-6, written=(2.5e-6, 4e-6), output=1e-5)
    return Offer(name="marked", rules=rules, speed=HOSTED_SPEED, prices=prices)


def automatic(read: float, minimum: int) -> Offer:
    life = Lifetime(name="1h", seconds=3600, write=1.0)
    rules = CacheRules(kind="automatic", minimum=minimum, step=64, read=read, lifetimes=(life,), context_tokens=20_000)
    prices = Prices(input=2e-6, read=read * 2e-6, written=(2e-6,), output=1e-5)
    return Offer(name="automatic", rules=rules, speed=HOSTED_SPEED, prices=prices)


def here(read: float, minimum: int) -> Offer:
    return own(
        "here",
        Machine(
            prefill_s=0.002, cached_s=0.002 * read, decode_s=0.04, page_tokens=minimum, context_tokens=20_000,
            learn_s=0.5, lora_bytes=1e5,
        ),
    )  # fmt: skip


OFFERS = st.builds(
    lambda kind, read, minimum: kind(read, minimum),
    st.sampled_from([marked, automatic, here]),
    st.sampled_from([0.02, 0.1, 0.5]),
    st.sampled_from([64, 256, 1024, 4096]),
)
WORKLOADS = st.builds(
    Workload.of,
    sessions_day=st.floats(0.05, 20),
    turns_session=st.floats(1, 40),
    gap_s=st.floats(5, 2_000),
    system_tokens=st.integers(0, 3_000),
    message_tokens=st.floats(5, 300),
    reply_tokens=st.floats(5, 300),
    recalled_tokens=st.floats(0, 500),
    standing_share=st.floats(0, 1),
    standing_facts=st.integers(1, 60),
    months=st.floats(0.1, 24),
    spread=st.floats(0, 2),
)


@settings(max_examples=40, deadline=None)
@given(WORKLOADS, OFFERS, st.integers(0, 99), st.sampled_from(NAMES))
def test_a_bill_has_all_tokens_of_the_prompt_and_stays_in_the_window(
    work: Workload, offer: Offer, seed: int, policy: str
) -> None:
    person = people(work, 3, seed)[1]
    for way in ways(policy, offer.rules):
        sent = bills(person, offer.rules, way)
        turns = person.turns[person.warm :]
        assert len(sent) == len(turns)
        for bill, turn in zip(sent, turns, strict=True):
            assert min(bill.read, bill.uncached, *bill.written) >= 0
            assert bill.tokens >= turn.system + turn.message
            recalled = sum(tokens for _, tokens in turn.recalled) + work.top_k * 400
            assert bill.tokens <= max(20_000, turn.system + turn.message + recalled)


@settings(max_examples=40, deadline=None)
@given(WORKLOADS, OFFERS, st.integers(0, 99))
def test_a_cache_costs_at_most_what_it_writes(work: Workload, offer: Offer, seed: int) -> None:
    """Where writing is free the cached policy is never dearer; else by the shortest write's premium at most."""
    persons = people(work, 4, seed)
    premium = offer.rules.lifetimes[0].write
    for cached, plain in ((FULL_CACHED, FULL), (FIRST_CACHED, FIRST)):
        with_cache = cheapest(work, persons, offer, cached)[1]
        without = cheapest(work, persons, offer, plain)[1]
        assert sum(one.cost for one in with_cache) <= premium * sum(one.cost for one in without) * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(WORKLOADS, OFFERS, st.integers(0, 99), st.sampled_from([FULL, FIRST]))
def test_uncached_bills_grow_with_what_is_sent(work: Workload, offer: Offer, seed: int, policy: str) -> None:
    more = work.model_copy(update={"system_tokens": work.system_tokens + 500})
    for one, other in zip(people(work, 3, seed), people(more, 3, seed), strict=True):
        less = cheapest(work, [one], offer, policy)[1][0].cost
        # Near the window's end a longer system part leaves less room for history.
        longest = max(bill.tokens for bill in bills(other, offer.rules, ways(policy, offer.rules)[0]))
        if longest < 10_000:
            assert cheapest(more, [other], offer, policy)[1][0].cost > less


@settings(max_examples=30, deadline=None)
@given(WORKLOADS, OFFERS, st.integers(0, 99))
def test_the_planner_places_a_fact_once_and_only_where_it_pays(work: Workload, offer: Offer, seed: int) -> None:
    for person in people(work, 3, seed):
        where = placed(work, person, offer, learn=True)
        known = dict(person.standing)
        assert not where.core & where.learnt
        assert where.core | where.learnt <= set(known)
        assert where.core_tokens == sum(known[id_] for id_ in where.core)
        assert where.day >= 0
        if offer.machine is None:
            assert not where.learnt
        if not work.recalled_tokens or not work.standing_share:
            assert not where.learnt
        assert placed(work, person, offer, learn=False).learnt == frozenset()


@settings(max_examples=20, deadline=None)
@given(WORKLOADS, OFFERS, st.integers(0, 99), st.integers(2, 8))
def test_a_sample_of_the_same_seed_is_the_same(work: Workload, offer: Offer, seed: int, count: int) -> None:
    def costs() -> list[Any]:
        return [one.cost for one in cheapest(work, people(work, count, seed), offer, LAYERS)[1]]

    assert costs() == costs()


def test_a_lora_that_costs_nothing_is_taught_and_a_dear_one_is_not() -> None:
    work = Workload.of(sessions_day=10, standing_share=0.8, standing_facts=10, spread=0, edits_day=0)
    person = people(work, 4, day=100.0)[2]
    offer = here(0.5, 64)
    assert offer.machine is not None
    cheap, dear = (own("here", replace(offer.machine, learn_s=cost)) for cost in (1e-6, 1e6))
    assert placed(work, person, cheap, learn=True).learnt
    assert not placed(work, person, dear, learn=True).learnt
    one = billed(work, person, cheap, ways(LEARNT, cheap.rules)[0])
    two = billed(work, person, cheap, ways(OURS, cheap.rules)[0])
    assert one.cost < two.cost
    assert sum(bill.tokens for bill in one.bills) < sum(bill.tokens for bill in two.bills)
    with_days = placed(work, person, dear, learn=True).lora_days
    without = placed(work, person, cheap, learn=True).lora_days
    assert with_days == pytest.approx(1e12 * (without or 0))
