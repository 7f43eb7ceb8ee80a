"""What a token costs, measured from ledgers whose truth is known, and what is said where nothing was measured."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from agentmem import Memory
from agentmem.economics import MEASURED_USES, costs, local_rules, regressed
from agentmem.provider import Capabilities
from agentmem.testing import FakeClock, ScriptedProvider
from agentmem.types import Scope, Usage

REQUEST, PACE, LOAD, BEHIND, TOKEN, ATTEND, KEEP = 0.05, 4e-3, 5e-5, 8e-7, 0.012, 4e-7, 2e-4


def ledger(count: int, seed: int = 0, noise: float = 0.1) -> list[tuple[float, ...]]:
    """Uses of a machine with these costs, each measured with some noise."""
    chance = random.Random(seed)
    found: list[tuple[float, ...]] = []
    for _ in range(count):
        total, output = chance.randint(300, 6000), chance.randint(5, 90)
        cached = chance.choice((0, total // 2, total - chance.randint(30, 250)))
        written = chance.choice((0, 256))
        first = _first(total, cached)
        after = output * (TOKEN + ATTEND * total) + KEEP * written
        noisy = (value * chance.lognormvariate(0, noise) for value in (first, after))
        first, after = noisy
        found.append((float(total), float(cached), float(written), float(output), first, first + after))
    return found


def _first(total: float, cached: float) -> float:
    return REQUEST + (total - cached) * (PACE + BEHIND * (total + cached) / 2) + LOAD * cached


@pytest.mark.parametrize("seed", range(5))
def test_costs_are_found_in_a_noisy_ledger(seed: int) -> None:
    uses = ledger(300, seed)
    found = regressed(uses)
    answer = sum(use[3] for use in uses) / len(uses)
    computed = sum(use[0] - use[1] for use in uses)
    behind = sum((use[0] - use[1]) * (use[0] + use[1]) / 2 for use in uses) / computed
    assert found["first"] == pytest.approx(PACE + ATTEND * answer, rel=0.1)
    assert found["each"] == pytest.approx(BEHIND, rel=0.3)
    assert found["prefill"] == pytest.approx(PACE + BEHIND * behind + ATTEND * answer, rel=0.1)
    assert found["cached"] == pytest.approx(LOAD + BEHIND * computed / len(uses) + ATTEND * answer, rel=0.3)
    # What a whole prompt takes follows from them.
    for total, cached in ((400, 0), (6000, 0), (6000, 5900), (3000, 1500)):
        told = (
            REQUEST
            + (total - cached) * (found["first"] + found["each"] * (total + cached) / 2)
            + found["read"] * cached
        )
        assert told == pytest.approx(_first(total, cached) + ATTEND * answer * total, rel=0.2)
    assert found["answer"] == pytest.approx(TOKEN, rel=0.2)
    assert 0 < found["write"] < 0.2 * PACE


def test_a_few_uses_move_the_prior_and_no_cost_is_negative() -> None:
    nothing = regressed([])
    assert all(value > 0 for value in nothing.values())
    for count in range(1, 20):
        found = regressed(ledger(count, count, noise=1.0))
        assert all(value > 0 for value in found.values())
        assert found["cached"] < found["prefill"]
    # One use says what a computed token takes: that is no prior any more.
    [use] = ledger(1)
    assert regressed([use])["prefill"] == pytest.approx(use[4] / (use[0] - use[1]), rel=0.3)


def test_a_use_that_was_held_up_makes_nothing_dearer() -> None:
    usual = [(500.0, 300.0, 0.0, 20.0, 0.2, 0.5)] * 100
    for slow in ((500.0, 300.0, 0.0, 20.0, 3600.0, 3600.3), (500.0, 300.0, 0.0, 20.0, 0.2, 3600.0)):
        assert regressed([*usual, slow]) == pytest.approx(regressed(usual), rel=0.05)
    for seed in range(5):  # a few in a hundred, in a ledger of all lengths
        uses = ledger(100, seed)
        held = [(*use[:4], use[4] + 900, use[5] + 1800) for use in ledger(5, seed)]
        assert regressed([*uses, *held]) == pytest.approx(regressed(uses), rel=0.1)


def test_the_slow_first_call_of_a_process_hides_no_depth() -> None:
    for seed in range(5):
        uses = [use for use in ledger(300, seed, noise=0.1) if use[0] - use[1] > 100][:60]
        first = (137.0, 0.0, 0.0, 1.0, 6 * _first(137, 0), 7 * _first(137, 0))
        found, usual = regressed([*uses, first]), regressed(uses)
        assert found["each"] == pytest.approx(usual["each"], rel=0.15)
        assert found["first"] == pytest.approx(usual["first"], rel=0.15)


def test_a_cache_that_is_slow_to_load_is_measured_and_not_left_out() -> None:
    waits = 30 * PACE + 5970 * PACE / 2
    slow = [(6000.0, 5970.0, 0.0, 10.0, waits, waits + 0.12)] * 60
    fresh = [(1000.0, 0.0, 0.0, 10.0, 1000 * PACE, 1000 * PACE + 0.12)] * 80
    assert regressed([*fresh, *slow])["read"] == pytest.approx(PACE / 2, rel=0.2)


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    here = Capabilities(chat=True, kv="tensors", context_tokens=8192, trains=True)
    provider = ScriptedProvider(name="scripted:here", capabilities=here)
    return Memory(tmp_path / "memory", model=provider, embedder="hash", clock=FakeClock())


def test_a_prior_is_called_one_until_enough_was_measured(memory: Memory) -> None:
    engine = memory._engine
    with memory:
        first = costs(engine)
        assert first.unit == "seconds"
        assert first.source["prefill"].startswith("prior")
        assert costs(engine) is first
        for use in ledger(MEASURED_USES + 30):
            usage = Usage(
                input_tokens=int(use[0]), cached_tokens=int(use[1]), written_tokens=int(use[2]),
                output_tokens=int(use[3]), first_token_s=use[4], total_s=use[5],
            )  # fmt: skip
            engine.ledger.note("chat", "scripted:here", Scope(user="ana"), usage, here=True)
        now = costs(engine)
        assert now.source["prefill"] == f"measured, {MEASURED_USES + 30} uses"
        assert now.prefill == pytest.approx(PACE + BEHIND * 2000, rel=0.2)
        assert now.depth is not None
        assert now.depth.first == pytest.approx(PACE, rel=0.2)
        assert now.learn is not None
        assert now.source["learn"] == "prior"
        rules = local_rules(engine)
        assert rules is not None
        assert not rules.priced
        assert rules.depth is not None
        assert 0 < rules.depth.read < 0.1
        assert rules.depth.read < rules.read < 0.5  # with what it costs those that are computed behind it
        assert rules.depth.first * now.prefill == pytest.approx(now.depth.first)
        assert rules.minimum == engine.settings.page_tokens


def test_a_server_that_tells_no_waiting_time_leaves_the_prior() -> None:
    found = regressed([(100.0, 0.0, 0.0, 10.0, 0.0, 0.0)] * 20)
    assert found["prefill"] > found["cached"] > 0


def test_an_engine_that_keeps_nothing_for_us_has_no_rules(tmp_path: Path) -> None:
    for can in (
        Capabilities(chat=True, kv="auto", context_tokens=8192),
        Capabilities(chat=True, kv="tensors"),
        Capabilities(chat=True, kv="slots", context_tokens=8192, holds_prefix_s=60),
    ):
        with Memory(tmp_path / "memory", model=ScriptedProvider(capabilities=can), embedder="hash") as memory:
            assert local_rules(memory._engine) is None


def test_a_host_has_the_prices_of_the_day(tmp_path: Path) -> None:
    with Memory(tmp_path / "memory", model=ScriptedProvider(name="nobody:knows"), embedder="hash") as memory:
        found = costs(memory._engine)
        assert found.unit == "seconds"  # it holds nothing elsewhere
    can = Capabilities(chat=True, kv="auto", context_tokens=100_000, holds_prefix_s=300)
    provider = ScriptedProvider(name="openai:gpt-4o", capabilities=can)
    with Memory(tmp_path / "hosted", model=provider, embedder="hash") as memory:
        found = costs(memory._engine)
        assert found.unit == "dollars"
        assert found.prefill == pytest.approx(2.5e-6)
        assert found.source["prefill"].startswith("prices of")
