"""Two models of a host's prompt cache, written apart, agree: the one that plans and the one that serves."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.activation.cache_model import Block, PromptCache
from agentmem.cache_rules import CacheRules, Lifetime, rules_for
from agentmem.testing.host_cache import HostCaches, Piece, Prompt, Visit, tokens_of

#: Sizes of blocks around the minimums and steps of the rules below.
SIZES = (1, 2, 7, 31, 64, 127, 128, 129, 300, 511, 512, 700, 1023, 1024, 1500)
GAPS = (0.0, 1.0, 299.0, 300.0, 301.0, 599.0, 600.0, 1800.0, 3599.0, 3600.0, 21600.0, 43200.0)
RULES = {
    "anthropic": "anthropic:claude-opus-5-5",
    "anthropic 4,096": "anthropic:claude-haiku-4-5",
    "openai, marked": "openai:gpt-6.1-sol",
    "openai, automatic": "openai:gpt-4o",
    "deepseek": "deepseek:deepseek-v4-flash",
}


@cache
def content(key: int, size: int) -> bytes:
    """Bytes that begin with another token for each key and count exactly ``size`` tokens."""
    text = f"{key}" + " a" * (size - tokens_of(f"{key}"))
    assert tokens_of(text) == size
    return text.encode()


def rules(name: str) -> CacheRules:
    found = rules_for(RULES[name])
    assert found is not None
    return found


@st.composite
def histories(
    draw: st.DrawFn, marks: int, lifetimes: int
) -> list[tuple[float, list[tuple[int, int]], list[tuple[int, int]]]]:
    """Requests of a conversation that grows, is edited and begins anew: (gap, [(key, size)], [(blocks, lifetime)])."""
    blocks: list[tuple[int, int]] = []
    requests = []
    key = 0
    for _ in range(draw(st.integers(1, 12))):
        kept = draw(st.one_of(st.just(len(blocks)), st.integers(0, len(blocks))))
        blocks = blocks[:kept]
        for _ in range(draw(st.one_of(st.integers(0, 3), st.integers(18, 23)))):
            key += draw(st.integers(0, 1))
            blocks = [*blocks, (key % 900, draw(st.sampled_from(SIZES)))]
        if not blocks:
            blocks = [(0, 600)]
        ends = sorted(draw(st.sets(st.integers(1, len(blocks)), max_size=marks)))
        chosen = sorted((draw(st.integers(0, lifetimes - 1)) for _ in ends), reverse=True)
        requests.append((draw(st.sampled_from(GAPS)), blocks, list(zip(ends, chosen, strict=True))))
    return requests


def visit(
    caches: HostCaches, told: CacheRules, blocks: list[tuple[int, int]], marks: list[tuple[int, int]], at: float
) -> Visit:
    marked = dict(marks)
    pieces = tuple(
        Piece(content(key, size), "messages", lifetime=marked.get(i + 1)) for i, (key, size) in enumerate(blocks)
    )
    result = caches.visit(told, Prompt(model="m", owner="o", pieces=pieces), at)
    result.began()
    return result


@pytest.mark.parametrize("name", [name for name in RULES if "marked" in name or "anthropic" in name])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_marked_hosts_agree_to_the_token(name: str, data: st.DataObject) -> None:
    told = rules(name)
    model, caches, at = PromptCache(told), HostCaches(), 0.0
    for gap, blocks, marks in data.draw(histories(told.marks, len(told.lifetimes))):
        at += gap
        bill = model.request([Block((key, size), size) for key, size in blocks], marks, at)
        seen = visit(caches, told, blocks, marks, at)
        assert (seen.read, seen.written, seen.uncached) == (bill.read, bill.written, bill.uncached)


@pytest.mark.parametrize("name", [name for name in RULES if "automatic" in name or "deepseek" in name])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_automatic_hosts_agree_but_for_the_block_in_which_a_prompt_departs(name: str, data: st.DataObject) -> None:
    told = rules(name)
    model, caches, at = PromptCache(told), HostCaches(), 0.0
    blockwise = PromptCache(replace(told, minimum=1, step=1))
    for gap, blocks, _ in data.draw(histories(0, 1)):
        at += gap
        keyed = [Block((key, size), size) for key, size in blocks]
        bill, common = model.request(keyed, [], at), blockwise.request(keyed, [], at).read
        seen = visit(caches, told, blocks, [], at)
        # A host matches tokens, so it may read a part of a block whose end differs; the model knows whole blocks.
        assert bill.read <= seen.read <= common + max(size for _, size in blocks)
        assert seen.read == bill.read or seen.read % told.step == told.minimum % told.step
        assert seen.read + sum(seen.written) + seen.uncached == bill.tokens


def test_automatic_hosts_agree_to_the_token_where_prompts_only_grow() -> None:
    for name in ("openai, automatic", "deepseek"):
        told = rules(name)
        model, caches, blocks = PromptCache(told), HostCaches(), []
        for turn in range(30):
            blocks.append((turn, SIZES[turn % len(SIZES)]))
            bill = model.request([Block(block, block[1]) for block in blocks], [], turn * 60.0)
            assert visit(caches, told, blocks, [], turn * 60.0).read == bill.read


def test_an_entry_that_no_read_renews_goes_at_its_time_in_both() -> None:
    told = CacheRules(
        kind="breakpoints",
        minimum=1,
        read=0.1,
        lifetimes=(Lifetime(name="s", seconds=10, write=1.25),),
        marked=True,
        marks=4,
        renewed=False,
    )
    model, caches, blocks = PromptCache(told), HostCaches(), [(1, 64)]
    reads = []
    for at in (0.0, 9.0, 11.0):
        bill = model.request([Block(block, block[1]) for block in blocks], [(1, 0)], at)
        reads.append(bill.read)
        assert visit(caches, told, blocks, [(1, 0)], at).read == bill.read
    assert reads == [0, 64, 0]
