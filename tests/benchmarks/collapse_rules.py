"""The collapse rule by whole bills, against the best schedule in hindsight: random traces, and recorded conversations.

    python tests/benchmarks/collapse_rules.py [--traces 10000] [--seed 9] [--only random|recorded] [--out FILE]

A prompt is system | core | history of the session | recalled records and the message. Each request pays for all of it
by the rules of a host's cache or of an engine of one's own, in uncached input tokens: what is kept is read, the rest of
the prefix is written, the tail is computed; nothing is kept below the host's minimum, nor longer than its lifetime.
Records that stand in the core need not be recalled for a request that needs them. A collapse puts the core that would
be chosen now at the head, and everything behind it has to be written again.

The rule decides before each request and knows the past only: `Collapse.due`, told the differences of whole bills. The
best schedule is found by dynamic programming over which core stands, exactly: what a request pays depends on when the
last collapse was and on whether there is one now. All schedules choose their core in the same way, from what earlier
requests needed, as `agentmem.cores` does it: the chance that a request needs a record is a Beta posterior over the
requests since it was stored; those stand in the core that are needed more often than reading (and after each pause
writing) them at the head costs, as many as 512 tokens hold, and more where only they reach the host's minimum.

Random traces, five kinds in turn: "steady" demand (Zipf over records that come to be known one by one), "pareto" (heavy
tails in sizes and popularity), "phases" (what is needed changes every 5-30 requests), "bursts" (one record at a time,
some requests in a row, then long none), "mixed" (these after one another). 2-100 requests in sessions of 1-30, 20-120 s
apart, sessions 10 minutes to 5 days; system 100-4,000 tokens, log-uniform; message and reply 20-600 tokens together,
log-uniform for the trace; a record 10-300. Each trace has one of the price classes, in turn. Seed 8 was looked at while
this was written, seed 9 was not.

"never": no core at all. "each": a collapse whenever another core would be chosen. "after": the rule told of the carry
only when it is paid, as a check behind the request would do it.

Recorded: the four conversations of ../shared/data/locomo as requests (cache_traces.py) with the ten records that a
search found for each; "days" as recorded, "busy" with the sessions twenty minutes apart.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cache_traces import DATA, locomo  # type: ignore[import-not-found]
from cache_traces import Trace as Talk

from agentmem.cache_rules import CacheRules, Lifetime, rules_for
from agentmem.planner.collapse import Account, Collapse

RESULTS = Path(__file__).parent / "results" / "collapse_rules.json"

#: Price classes, by a model that has them; engines of one's own read for a small part of what computing costs.
CLASSES = {
    "O56 30m .1": "openai:gpt-5.6-sol",
    "A512 5m .1": "anthropic:claude-opus-5",
    "A512 5m .05": "anthropic:claude-opus-5-5",
    "DS .02": "deepseek:deepseek-chat",
}
LOCAL = CacheRules(
    kind="engine", minimum=256, step=256, read=0.03, lifetimes=(Lifetime(name="endless", seconds=math.inf, write=1.02),)
)
KINDS = ("steady", "pareto", "phases", "bursts", "mixed")
#: How a core is chosen, as in cores.py and plaintext/salience.py: the weight and the mean of the prior, what a request
#: counts once another came after it, the requests believed to find the head kept before any were seen, its tokens.
PRIOR, BELIEF, FADING, AHEAD, MOST = 12.0, 0.02, 0.98, 9, 512
#: Of the recorded conversations: tokens of the system part, and records recalled for a request.
SYSTEMS, RECALLED = (200, 1500), 10

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trace:
    """Requests: when, history of the session before each and how much of it the last request had, message, and which
    records it needs (a row of tokens by record, 0: not)."""

    system: int
    at: list[float]
    history: list[int]
    before: list[int]
    message: list[int]
    needs: Numbers
    #: Of each record the request before which it was stored.
    stored: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bills:
    """What each request costs: by the core that stands (``stay[i, c]``, core 0 is none, c was chosen before request
    c - 1), with a collapse before it (``anew[i]``), and if the core chosen now had stood there already (``ideal[i]``).
    ``gain[i, c]`` is what a request is expected to gain by a core.
    """

    stay: Numbers
    anew: Numbers
    ideal: Numbers
    gain: Numbers
    cold: list[bool]
    #: Whether another core than the standing one would be chosen: by the standing one.
    differs: npt.NDArray[np.bool_]


def bills(rules: CacheRules, trace: Trace) -> Bills:
    """All bills of a trace."""
    count = len(trace.at)
    sizes = trace.needs.max(axis=0) if count else np.zeros(0)
    life, read = rules.lifetimes[0], rules.read
    cores = np.zeros((count + 1, len(sizes)), dtype=bool)
    chances = np.zeros((count, len(sizes)))
    needed, trials = np.zeros(len(sizes)), np.zeros(len(sizes))
    cold = [at == 0 or trace.at[at] - trace.at[at - 1] > life.seconds for at in range(count)]
    runs = [(at + AHEAD) / (sum(cold[: at + 1]) + 1) for at in range(count)]
    for at in range(count):
        chances[at] = np.where(trace.stored <= at, (needed + BELIEF * PRIOR) / (trials + PRIOR), 0.0)
        cores[at + 1] = chosen(rules, trace.system, sizes, chances[at], runs[at])
        needed = FADING * needed + (trace.needs[at] > 0)
        trials = np.maximum(FADING * trials + (trace.stored <= at), needed)
    tokens = cores @ sizes
    recalled = trace.needs @ (~cores).T.astype(float)

    def bill(core: Numbers, tail: Numbers, at: int, held: Numbers) -> Numbers:
        prefix = trace.system + core + trace.history[at]
        held = np.where(held >= rules.minimum, held, trace.system if trace.system >= rules.minimum else 0)
        held = np.zeros_like(held) if cold[at] else held
        cached = read * held + life.write * (prefix - held)
        found: Numbers = np.where(prefix >= rules.minimum, cached, prefix) + tail + trace.message[at]
        return found

    heads = np.array([[head(rules, trace.system + size, run) for size in tokens] for run in runs])
    gain = chances @ (cores * sizes).T - heads
    stay, anew, ideal = np.zeros((count, count + 1)), np.zeros(count), np.zeros(count)
    for at in range(count):
        stay[at] = bill(tokens, recalled[at], at, trace.system + tokens + trace.before[at])
        mine, tail = tokens[at + 1 : at + 2], recalled[at, at + 1 : at + 2]
        anew[at] = bill(mine, tail, at, np.full(1, float(trace.system)))[0]
        ideal[at] = stay[at, at + 1]
    differs = (cores[:, None, :] != cores[None, :, :]).any(axis=2)
    return Bills(stay, anew, ideal, gain, cold, differs)


def head(rules: CacheRules, tokens: float, run: float) -> float:
    """What so many tokens at the head are expected to cost a request, of which ``run`` find it kept in a row."""
    if tokens < rules.minimum:
        return tokens
    return tokens * (rules.read + (rules.lifetimes[0].write - rules.read) / run)


def chosen(rules: CacheRules, system: int, sizes: Numbers, chances: Numbers, run: float) -> npt.NDArray[np.bool_]:
    """The core that gains the most: none, the records that pay, or as many as reach the host's minimum."""
    price = rules.read + (rules.lifetimes[0].write - rules.read) / run
    found, most = np.zeros(len(sizes), dtype=bool), -head(rules, system, run)
    for least in (0, max(0, rules.minimum - system)):
        core, tokens = np.zeros(len(sizes), dtype=bool), 0.0
        for record in np.argsort(-chances, kind="stable"):
            fills = tokens < least <= MOST and chances[record] > 0
            if fills or (chances[record] > price and tokens + sizes[record] <= MOST):
                core[record] = True
                tokens += float(sizes[record])
        gain = float(chances[core] @ sizes[core]) - head(rules, system + tokens, run)
        if gain > most:
            found, most = core, gain
    return found


def best(paid: Bills) -> float:
    """The least that any schedule of collapses pays, knowing the trace."""
    count = len(paid.anew)
    spent = np.full(count + 1, math.inf)
    spent[0] = 0.0
    for at in range(count):
        collapsed = spent.min() + paid.anew[at]
        spent += paid.stay[at]
        spent[at + 1] = collapsed
    return float(spent.min())


def by_rule(paid: Bills, *, late: bool = False) -> float:
    """What the rule pays; ``late``: it hears of a request's carry when that is paid."""
    account, core, spent = Account(), 0, 0.0
    for at in range(len(paid.anew)):
        carry = float(paid.stay[at, core] - paid.ideal[at])
        rebuild = float(paid.anew[at] - paid.ideal[at])
        if not paid.differs[core, at + 1]:
            due = False
        elif paid.cold[at]:  # nothing is left to pay but the block, which is a part of what it is expected to gain
            due = bool(paid.gain[at, at + 1] > paid.gain[at, core])
        else:
            due = Collapse.due(account, 0.0 if late else carry, rebuild)
        cost = float(paid.anew[at] if due else paid.stay[at, core])
        core = at + 1 if due else core
        spent += cost
        account = Collapse.note(account, carry, due, float(at), rebuild=rebuild, spent=cost - max(carry, 0.0))
    return spent


def each(paid: Bills) -> float:
    """A collapse whenever another core would be chosen."""
    core, spent = 0, 0.0
    for at in range(len(paid.anew)):
        due = bool(paid.differs[core, at + 1])
        spent += float(paid.anew[at] if due else paid.stay[at, core])
        core = at + 1 if due else core
    return spent


POLICIES: dict[str, Callable[[Bills], float]] = {
    "rule": by_rule,
    "after": lambda paid: by_rule(paid, late=True),
    "each": each,
    "never": lambda paid: float(paid.stay[:, 0].sum()),
}


# ---- traces ----------------------------------------------------------------------------------------------------------


def spread(chance: random.Random, low: float, high: float) -> float:
    """Log-uniform from low to high."""
    return math.exp(chance.uniform(math.log(low), math.log(high)))


def demand(chance: random.Random, kind: str, count: int, records: int) -> list[set[int]]:
    """Which records each request needs."""
    if kind == "mixed":
        made: list[set[int]] = []
        while len(made) < count:
            part = chance.choice(KINDS[:-1])
            made += demand(chance, part, chance.randint(3, 40), records)
        return made[:count]
    most = chance.randint(1, 10)
    if kind == "bursts":
        made = []
        while len(made) < count:
            one = chance.randrange(records)
            made += [{one}] * chance.randint(1, 12) + [set()] * round(spread(chance, 1, 30))
        return made[:count]
    order = list(range(records))
    chance.shuffle(order)
    weights = [chance.paretovariate(0.8) if kind == "pareto" else 1 / (rank + 1) for rank in range(records)]
    made, until = [], 0
    for at in range(count):
        if kind == "phases" and at == until:
            chance.shuffle(order)
            until += chance.randint(5, 30)
        known = max(1, round(records * (at + 1) / count)) if kind == "steady" else records
        made.append(set(chance.choices(order[:known], weights[:known], k=chance.randint(0, most))))
    return made


def random_trace(chance: random.Random, kind: str) -> Trace:
    """A trace of one kind."""
    count, records = chance.randint(2, 100), chance.randint(1, 40)
    sizes = np.array([spread(chance, 10, 300) for _ in range(records)])
    turn, at, left = spread(chance, 20, 600), 0.0, 0
    needs = np.zeros((count, records))
    times, history, before, message = [], [], [], []
    standing, last = 0, 0
    for number, wanted in enumerate(demand(chance, kind, count, records)):
        if left == 0:
            left, standing, last = chance.randint(1, 30), 0, 0
            at += spread(chance, 600, 5 * 86_400)
        else:
            at += chance.uniform(20, 120)
        left -= 1
        times.append(at)
        history.append(standing)
        before.append(last)
        message.append(round(0.3 * turn) + 1)
        last, standing = standing, standing + round(turn * chance.uniform(0.5, 1.5)) + 1
        needs[number, list(wanted)] = sizes[list(wanted)]
    stored = np.zeros(records, dtype=np.int64)
    return Trace(round(spread(chance, 100, 4000)), times, history, before, message, needs, stored)


def recorded(talk: Talk, system: int) -> Trace:
    """A recorded conversation; a session is its own history."""
    ids = sorted({record for asked in talk.requests for record, _, _ in asked.hits[:RECALLED]})
    column = {record: place for place, record in enumerate(ids)}
    needs = np.zeros((len(talk.requests), len(ids)))
    sessions = [asked.session for asked in talk.requests]
    told = {asked.id: asked.session for asked in talk.requests}
    # Its session is its history; a record can be recalled from the next one on.
    ends = {name: len(sessions) - sessions[::-1].index(name) for name in sessions}
    stored = np.array([ends[told[talk.home[record]]] for record in ids], dtype=np.int64)
    history, before, session, standing, last = [], [], "", 0, 0
    for row, asked in enumerate(talk.requests):
        if asked.session != session:
            session, standing, last = asked.session, 0, 0
        history.append(standing)
        before.append(last)
        last, standing = standing, standing + asked.message + asked.reply
        for record, tokens, _ in asked.hits[:RECALLED]:
            needs[row, column[record]] = tokens
    requests = talk.requests
    said = [asked.message for asked in requests]
    return Trace(system, [asked.at for asked in requests], history, before, said, needs, stored)


# ---- results ---------------------------------------------------------------------------------------------------------


def compared(cases: Sequence[tuple[CacheRules, Trace]]) -> dict[str, list[float]]:
    """Of each policy its bill for each trace, in bills of the best schedule."""
    found: dict[str, list[float]] = {name: [] for name in POLICIES}
    for rules, trace in cases:
        paid = bills(rules, trace)
        least = best(paid)
        for name, policy in POLICIES.items():
            ratio = policy(paid) / least
            assert ratio > 1 - 1e-9, f"{name} is cheaper than the best: the oracle is wrong"
            found[name].append(ratio)
    return found


def summed(ratios: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Mean, 95th percentile and worst of each policy."""
    return {
        name: {
            "mean": round(float(np.mean(values)), 4),
            "p95": round(float(np.percentile(values, 95)), 4),
            "max": round(max(values), 4),
        }
        for name, values in ratios.items()
    }


def told(name: str, found: dict[str, dict[str, float]]) -> str:
    """A line of results."""
    parts = [f"{policy} {one['mean']:.3f} ({one['max']:.2f})" for policy, one in found.items()]
    return f"{name:28} mean (max) to the best: {'  '.join(parts)}"


def classes() -> dict[str, CacheRules]:
    """The price classes."""
    found = {"own engine .03": LOCAL}
    for name, model in CLASSES.items():
        rules = rules_for(model)
        assert rules is not None, model
        found[name] = rules
    return found


def main() -> None:
    """Run what is asked for, print it, write it; what is not asked for stays as it was written before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=10_000, help="random traces in all")
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--only", choices=("recorded", "random"))
    parser.add_argument("--data", type=Path, default=DATA, help="a LoCoMo file; recorded ones are left out without it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    results: dict[str, Any] = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    rules = classes()

    if asked.only != "recorded":
        chance = random.Random(asked.seed)
        every: dict[str, list[float]] = {name: [] for name in POLICIES}
        by: dict[str, dict[str, list[float]]] = {}
        for number in range(asked.traces):
            kind, name = KINDS[number % len(KINDS)], list(rules)[number // len(KINDS) % len(rules)]
            ratios = compared([(rules[name], random_trace(chance, kind))])
            for policy, values in ratios.items():
                every[policy] += values
                for key in (kind, name):
                    by.setdefault(key, {one: [] for one in POLICIES})[policy] += values
        results["random"] = {"seed": asked.seed, "traces": asked.traces, "all": summed(every)}
        results["random"] |= {key: summed(values) for key, values in by.items()}
        for key in ("all", *by):
            print(told(f"random, {key}", results["random"][key]), flush=True)
    if asked.only != "random" and asked.data.exists():
        talks = locomo(asked.data)
        results["recorded"] = {}
        together: dict[str, list[float]] = {name: [] for name in POLICIES}
        for name, one in rules.items():
            for kind in ("days", "busy"):
                for system in SYSTEMS:
                    cases = [(one, recorded(talk if kind == "days" else talk.busy(), system)) for talk in talks]
                    ratios = compared(cases)
                    together = {policy: values + ratios[policy] for policy, values in together.items()}
                    label = f"{name}, {kind}, system {system}"
                    results["recorded"][label] = summed(ratios)
                    print(told(label, results["recorded"][label]), flush=True)
        results["recorded"]["all"] = summed(together)
        print(told("recorded, all", results["recorded"]["all"]), flush=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
