"""What prompts cost by hosts' cache rules: our layouts against fixed ones, on real conversations and on agent runs.

    python tests/benchmarks/cache_economics.py [--json results/cache_economics.json] [--only A512/.05 --only DS.02]

Prints, per class of host and variant of the trace, the price of a request in uncached input tokens under each policy,
the shares read, written and uncached, the evidence in the prompt, and whether the bars hold. Every policy recalls by
the same gate what its history doesn't hold. Needs ../shared/data; the first run searches for a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cache_traces import Asked, Trace, agent, locomo  # type: ignore[import-not-found]

from agentmem.activation.cache_model import Bill
from agentmem.activation.layouts import Turn
from agentmem.activation.replays import Policy, Recall, Sent, fixed, planned
from agentmem.cache_rules import CacheRules, Lifetime
from agentmem.plaintext.fusion import taken

SYSTEMS = (1500, 200)
#: Records and tokens recalled at most: for a turn that may ask, and for one that only tells.
ASKS, TELLS = (6, 500), (3, 150)
#: How many times below full cached history a run of 200 steps has to be, by the price of reading.
AGENTS = {0.1: 2.5, 0.05: 1.8, 0.02: 1.2}
#: The baselines' core block.
CORE = 1000


def _marked(minimum: int, read: float, *lives: tuple[str, float, float], lookback: int | None = None) -> CacheRules:
    lifetimes = tuple(Lifetime(name=name, seconds=seconds, write=write) for name, seconds, write in lives)
    return CacheRules(
        kind="breakpoints", minimum=minimum, read=read, lifetimes=lifetimes, marked=True, marks=4, lookback=lookback
    )


def _automatic(minimum: int, step: int, read: float, hours: float) -> CacheRules:
    life = Lifetime(name=f"{hours:g}h", seconds=hours * 3600, write=1.0)
    return CacheRules(kind="automatic", minimum=minimum, step=step, read=read, lifetimes=(life,))


_OPENAI = (("30m", 1800.0, 1.25), ("12h", 43200.0, 2.5))
_ANTHROPIC = (("5m", 300.0, 1.25), ("1h", 3600.0, 2.0))
#: Classes of hosts: minimum, read price, lifetimes and write prices.
CLASSES = {
    "O56": _marked(1024, 0.1, *_OPENAI),
    "O61": _marked(1024, 0.05, *_OPENAI),
    "A512/.05": _marked(512, 0.05, *_ANTHROPIC, lookback=20),
    "A512/.1": _marked(512, 0.1, *_ANTHROPIC, lookback=20),
    "A1024": _marked(1024, 0.1, *_ANTHROPIC, lookback=20),
    "A4096": _marked(4096, 0.1, *_ANTHROPIC, lookback=20),
    "DS.02": _automatic(64, 64, 0.02, 6),
    "DS.1": _automatic(64, 64, 0.1, 6),
    "Oauto.1": _automatic(1024, 128, 0.1, 24),
    "Oauto.25": _automatic(1024, 128, 0.25, 24),
    "Oauto.5": _automatic(1024, 128, 0.5, 1 / 6),
}


@dataclass(frozen=True)
class Outcome:
    """A policy on one trace: what its requests cost together, and the share of evidence that stood in the prompts."""

    cost: float
    requests: int
    bill: Bill
    evidence: float
    recalled: float  # tokens a request

    @property
    def each(self) -> float:
        return self.cost / self.requests


def gated(asked: Asked, hits: Sequence[tuple[str, int, float]]) -> list[tuple[str, int]]:
    """What chat takes of these hits."""
    most, budget = TELLS if asked.tells else ASKS
    chosen: list[tuple[str, int]] = []
    for id_, tokens, _ in hits[: min(taken([p for *_, p in hits[:10]], asking=not asked.tells), most)]:
        if tokens <= budget:
            chosen.append((id_, tokens))
            budget -= tokens
    return chosen


def ten(_: Asked, hits: Sequence[tuple[str, int, float]]) -> list[tuple[str, int]]:
    """The ten best, whatever they are."""
    return [(id_, tokens) for id_, tokens, _ in hits[:10]]


Gate = Callable[[Asked, Sequence[tuple[str, int, float]]], list[tuple[str, int]]]


def turns_of(trace: Trace, system: int) -> list[Turn]:
    return [
        Turn(id=r.id, at=r.at, session=r.session, system=system, core=0, message=r.message, reply=r.reply)
        for r in trace.requests
    ]


def recall_of(trace: Trace, gate: Gate) -> Recall:
    number = {request.id: place for place, request in enumerate(trace.requests)}
    held = {record: number[home] for record, home in trace.home.items()}

    def recall(place: int, first: int, kept: set[str]) -> list[tuple[str, int]]:
        asked = trace.requests[place]
        return gate(asked, [hit for hit in asked.hits if held[hit[0]] < first and hit[0] not in kept])

    return recall


def outcome(trace: Trace, rules: CacheRules, sent: Iterable[Sent], *, uncached: bool = False) -> Outcome:
    number = {request.id: place for place, request in enumerate(trace.requests)}
    cost, recalled, shares = 0.0, 0, []
    bill = Bill(0, (0,) * len(rules.lifetimes), 0)
    for asked, one in zip(trace.requests, sent, strict=True):
        cost += one.bill.tokens if uncached else one.bill.cost(rules)
        bill += one.bill
        recalled += sum(tokens for _, tokens in one.recalled)
        if asked.evidence:
            shown = {id_ for id_, _ in one.recalled} | one.kept
            there = [e in shown or (e in trace.home and number[trace.home[e]] >= one.first) for e in asked.evidence]
            shares.append(sum(there) / len(there))
    count = len(trace.requests)
    return Outcome(cost, count, bill, sum(shares) / len(shares) if shares else 1.0, recalled / count)


def marks_of(rules: CacheRules) -> list[tuple[int | None, int | None]]:
    """What may be marked with which lifetime: the system part and the history."""
    return [(0, 0), (1, 1), (1, 0)] if rules.marked else [(0, 0)]


def baselines(trace: Trace, rules: CacheRules, system: int, gate: Gate) -> dict[str, Outcome]:
    """The fixed policies, each with the lifetimes that are best for this very trace."""
    turns, recall = turns_of(trace, system), recall_of(trace, gate)

    def run(policy: Policy, *, uncached: bool = False) -> Outcome:
        return outcome(trace, rules, fixed(rules, turns, policy, recall), uncached=uncached)

    def best(**how: object) -> Outcome:
        return min((run(Policy(marks=marks, **how)) for marks in marks_of(rules)), key=lambda o: o.cost)  # type: ignore[arg-type]

    system_only = [(life, None) for life in range(len(rules.lifetimes))]
    none = (None, None)
    return {
        "a full, uncached": run(Policy(start="scope", recalled="none", marks=none), uncached=True),
        "b full, cached": best(start="scope", recalled="none"),
        "c memories first": run(Policy(recalled="before", marks=none), uncached=True),
        "c-sys": min((run(Policy(recalled="before", marks=m)) for m in system_only), key=lambda o: o.cost),
        "c+roll": best(recalled="before"),
        "cc core first": run(Policy(recalled="before", marks=none, core=CORE), uncached=True),
        "d tail": best(),
        "e core, tail": best(core=CORE),
        "no memory": best(recalled="none"),
    }


def ours(trace: Trace, rules: CacheRules, system: int, gate: Gate) -> Outcome:
    return outcome(trace, rules, planned(rules, turns_of(trace, system), recall_of(trace, gate)))


def together(parts: Sequence[Outcome]) -> Outcome:
    count = sum(part.requests for part in parts)
    bill = parts[0].bill
    for part in parts[1:]:
        bill += part.bill
    return Outcome(
        sum(part.cost for part in parts),
        count,
        bill,
        sum(part.evidence for part in parts) / len(parts),
        sum(part.recalled * part.requests for part in parts) / count,
    )


@cache
def traces(variant: str) -> tuple[Trace, ...]:
    found = locomo()
    return tuple(trace.busy() for trace in found) if variant == "busy" else tuple(found)


def bars(name: str, variant: str, system: int, each: dict[str, float]) -> list[tuple[str, float, float]]:
    """What the issue demands here, as (what, measured ratio, most)."""
    if variant != "days":
        return []
    read, planned_ = CLASSES[name].read, each["planned"]
    found: list[tuple[str, float, float]] = []
    if system == 1500:
        found.append(("of a", planned_ / each["a full, uncached"], 1 / 8))
        if read <= 0.1:
            found.append(("of b", planned_ / each["b full, cached"], 0.6 if read == 0.02 else 0.5))
        most = 0.5 if name in ("A4096", "DS.02") else 0.9 if name.startswith("Oauto") and read > 0.1 else 0.65
        found.append(("of c-sys", planned_ / each["c-sys"], most))
        if read <= 0.1:
            found.append(("of c (aim)", planned_ / each["c memories first"], 1 / 3))
    else:
        of_c = {"A512/.05": 0.55, "O56": 0.6, "A1024": 0.6, "A4096": 1.0}
        if name in of_c:
            found.append(("of c", planned_ / each["c memories first"], of_c[name]))
    return found


def verdict(what: str, ratio: float, most: float) -> str:
    """A bar that was missed, and an aim that was."""
    return "" if ratio <= most else " missed" if "aim" in what else " FAILS"


def chats(names: Sequence[str], gate: Gate) -> tuple[list[dict[str, object]], bool]:
    """All classes, days and busy, both system parts; True if every bar holds."""
    rows: list[dict[str, object]] = []
    good = True
    for variant in ("days", "busy"):
        for system in SYSTEMS:
            print(f"\n== {variant}, system {system}: price of a request")
            for name in names:
                rules = CLASSES[name]
                by_policy: dict[str, list[Outcome]] = {}
                worst, where = 0.0, ""
                for trace in traces(variant):
                    found = baselines(trace, rules, system, gate)
                    mine = ours(trace, rules, system, gate)
                    least = min((o.cost, p) for p, o in found.items() if p != "no memory")
                    if mine.cost / least[0] > worst:
                        worst, where = mine.cost / least[0], f"{least[1]} of {trace.name}"
                    for policy, one in {**found, "planned": mine}.items():
                        by_policy.setdefault(policy, []).append(one)
                totals = {policy: together(parts) for policy, parts in by_policy.items()}
                each = {policy: total.each for policy, total in totals.items()}
                tests = [*bars(name, variant, system, each), ("of the cheapest", worst, 1.02)]
                held = all(ratio <= most for what, ratio, most in tests if "aim" not in what)
                good &= held
                plan, tail = totals["planned"], totals["d tail"]
                shares = [plan.bill.read, sum(plan.bill.written), plan.bill.uncached]
                print(f"{name:9}" + "  ".join(f"{p.split()[0].rstrip(',')} {v:,.0f}" for p, v in each.items()))
                print(
                    "         read/written/uncached "
                    + "/".join(f"{share / plan.bill.tokens:.2f}" for share in shares)
                    + f"  evidence {plan.evidence:.3f} (d {tail.evidence:.3f})"
                    + f"  recalled {plan.recalled:.0f} (d {tail.recalled:.0f})  "
                    + "  ".join(f"{what} {ratio:.3f}{verdict(what, ratio, most)}" for what, ratio, most in tests)
                    + f" ({where})",
                    flush=True,
                )
                rows.append(
                    {
                        "class": name,
                        "variant": variant,
                        "system": system,
                        "price": {policy: round(value, 1) for policy, value in each.items()},
                        "evidence": round(plan.evidence, 4),
                        "evidence_later": round(totals["d tail"].evidence, 4),
                        "recalled": round(plan.recalled, 1),
                        "bars": {what: [round(ratio, 4), round(most, 4)] for what, ratio, most in tests},
                        "held": held,
                    }
                )
    return rows, good


def agents(names: Sequence[str]) -> tuple[list[dict[str, object]], bool]:
    """One run of 40 and one of 200 turns against full cached history."""
    rows: list[dict[str, object]] = []
    good = True
    print("\n== agent runs: full cached history over ours")
    for count in (40, 200):
        trace = agent(count)
        for name in names:
            rules, turns = CLASSES[name], turns_of(trace, 200)
            recall = recall_of(trace, ten)
            everything = (Policy(start="scope", recalled="none", marks=marks) for marks in marks_of(rules))
            full = min(outcome(trace, rules, fixed(rules, turns, policy, recall)).each for policy in everything)
            mine = ours(trace, rules, 200, ten)
            ratio = full / mine.each
            least = 1 / 1.02 if count == 40 else AGENTS.get(rules.read, 1.0)
            good &= ratio >= least
            longest = max(one.bill.tokens for one in planned(rules, turns, recall))
            print(
                f"{count:4} {name:9} full {full:,.0f}  planned {mine.each:,.0f}  {ratio:.2f}x"
                f"{'' if ratio >= least else ' FAILS'}  recalled {mine.recalled:.0f}  longest prompt {longest:,}",
                flush=True,
            )
            rows.append({"class": name, "turns": count, "full": round(full, 1), "planned": round(mine.each, 1)})
    return rows, good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=list(CLASSES), help="a class; may be given again")
    parser.add_argument("--ungated", action="store_true", help="recall ten records always")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = options.only or list(CLASSES)
    rows, good = chats(names, ten if options.ungated else gated)
    runs, held = agents(names)
    print("\nall bars hold" if good and held else "\nsome bars FAIL")
    if options.json:
        options.json.write_text(json.dumps({"chats": rows, "agents": runs}, indent=1) + "\n", encoding="utf-8")
    return 0 if good and held else 1


if __name__ == "__main__":
    sys.exit(main())
