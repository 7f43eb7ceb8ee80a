from __future__ import annotations

import random

import pytest

from agentmem.activation.keeping import GOING_ON, keeping
from agentmem.cache_rules import CacheRules, Lifetime, rules_for

ALL = [True, True, True]


def rules_of(model: str) -> CacheRules:
    rules = rules_for(model)
    assert rules is not None
    return rules


def one_life(write: float, read: float) -> CacheRules:
    life = Lifetime(name="x", seconds=300, write=write)
    return CacheRules(kind="breakpoints", minimum=1, read=read, lifetimes=(life,), marked=True, marks=4)


@pytest.mark.parametrize(("write", "read"), [(1.25, 0.1), (2.0, 0.1), (2.5, 0.05), (1.1, 0.5)])
def test_a_prefix_is_written_from_the_chance_on_that_the_formula_names(write: float, read: float) -> None:
    rules, parts = one_life(write, read), [1000.0, 0.0, 0.0, 1.0]
    least = (write - 1) / (write - read) / GOING_ON
    for chance, written in ((least * 0.99, False), (min(least * 1.01, 1.0), True)):
        chances = [0.0, 0.0, 0.0, chance, 0.0, 0.0, 0.0, 1 - chance]
        found = keeping(1).solve([0, 0, 0], parts, parts, ALL, chances, rules)
        assert any(life is not None for life in found) == written


def test_no_lifetime_stands_behind_a_shorter_one_and_what_is_read_is_not_marked_again() -> None:
    for (state, _), end in zip(keeping(2).states, range(99), strict=False):
        kept = [life for life in state if life]
        assert kept == sorted(kept, reverse=True), end
    found = keeping(2).solve(
        [1, 0, 0],
        [2000, 500, 500, 50],
        [2000, 500, 500, 50],
        ALL,
        [0.0] * 7 + [1.0] + [0.0] * 4,
        rules_of("anthropic:claude-opus-5"),
    )
    assert found[0] is None
    assert 1 not in found


def test_nothing_is_marked_below_the_minimum() -> None:
    rules, sure = one_life(1.25, 0.1), [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    parts = [100.0, 100.0, 900.0, 50.0]
    assert keeping(1).solve([0, 0, 0], parts, parts, [False, False, True], sure, rules) == [None, None, 0]


@pytest.mark.parametrize("seed", range(12))
def test_the_move_is_the_one_that_long_value_iteration_finds(seed: int) -> None:
    chance = random.Random(seed)
    model = chance.choice(["anthropic:claude-opus-5-5", "openai:gpt-5.6-sol"])
    rules, process = rules_of(model), keeping(2)
    weights = [chance.random() ** 3 for _ in range(12)]
    chances = [weight / sum(weights) for weight in weights]
    parts = [chance.uniform(1, 4000) for _ in range(4)]
    again = [sum(chances[3 : 4 * bucket + 4 : 4]) for bucket in range(2)]
    prices = [rules.read, 1.0, *(life.write for life in rules.lifetimes)]

    def cost(move: int) -> float:
        sizes, keeps = process.sizes[move], int(process.keeps[move])
        paid = [
            prices[price] * size * part for price, size, part in zip(process.prices[move], sizes, parts, strict=True)
        ]
        extra = again[keeps] * (prices[2 + keeps] - rules.read) * parts[3] * GOING_ON if keeps >= 0 else 0.0
        return float(sum(paid)) + extra

    moves: dict[int, list[int]] = {}
    for move, begin in enumerate(process.begin):
        moves.setdefault(int(begin), []).append(move)
    costs = [cost(move) for move in range(len(process.begin))]
    worth, ahead = [0.0] * len(process.states), [0.0]
    for _ in range(400):
        ahead = [
            GOING_ON * sum(p * worth[after] for p, after in zip(chances, row, strict=True)) for row in process.following
        ]
        worth = [min(costs[move] + ahead[process.end[move]] for move in moves[state]) for state in range(len(worth))]
    for state, (held, grown) in enumerate(process.states):
        if not grown:
            continue
        found = process.solve(held, parts, parts, ALL, chances, rules)
        result = tuple(before if life is None else life + 1 for before, life in zip(held, found, strict=True))
        values = {
            (process.states[process.end[move]][0], bool(process.writes[move].any())): costs[move]
            + ahead[process.end[move]]
            for move in moves[state]
        }
        chosen = values[result, any(life is not None for life in found)]
        assert chosen == pytest.approx(min(values.values()), rel=1e-6)
