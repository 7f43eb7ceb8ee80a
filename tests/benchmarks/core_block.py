"""What a core block costs and what it brings: the planner's own, none, and fixed ones of which the best is known after.

    python tests/benchmarks/core_block.py [--conversations 0 1] [--models anthropic:claude-sonnet-5 deepseek:…] [--busy]
        [--standing 3 --ask 14 --chat 8]

Development conversations of LoCoMo go through `Memory.chat` at hosts that bill by their cache rules, with a system part
of 1,500 tokens (efficiency_money.py): with defaults, where the planner says which core pays and when it is rewritten;
with ``core_tokens=0``; and with a core of a fixed size, chosen anew at the start of each session from what is ranked
best. Printed: the bill of a turn in uncached input tokens, the share of gold evidence in the prompt "now" and "later",
and the planner's bill beside the best of the others, which only hindsight knows. With ``--standing`` each session also
asks the same few questions again and again (planner_prediction.py): there a core has something to spare. Results:
tests/benchmarks/results/core_block.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from efficiency_money import Bills, busy, ours  # type: ignore[import-not-found]
from efficiency_talk import DATA, Talk, talk  # type: ignore[import-not-found]
from planner_prediction import sessions  # type: ignore[import-not-found]

from agentmem import chat as chats
from agentmem import cores, recalling
from agentmem.cache_rules import rules_for

RESULTS = Path(__file__).parent / "results" / "core_block.json"
#: Tokens of the fixed cores.
SIZES = (150, 300, 500)


@contextmanager
def fixed(size: int) -> Generator[None]:
    """Chats have a core of so many tokens, chosen at the start of each session."""
    held = chats.__dict__["core_of"]

    def core_of(engine: Any, conversation: Any, plan: Any, layout: Any, *, stands: Any, present: Any, hits: Any) -> Any:
        if engine.records.count_turns(conversation.session) and stands is not None:
            return recalling.Core(stands)
        chosen = cores.review(engine, conversation.scope, plan.rules, present, stands, fill=size).chosen
        return recalling.Core(cores.collapse(engine, conversation.scope, [one.id for one in chosen.records]))

    chats.__dict__["core_of"] = core_of
    try:
        yield
    finally:
        chats.__dict__["core_of"] = held


def told(bills: Sequence[Bills]) -> dict[str, float]:
    """A way's bill and evidence over the conversations."""
    row = {"tokens a turn": sum(one.total for one in bills) / sum(len(one.costs) for one in bills)}
    for when in ("now", "later"):
        shares = [share for one in bills for share in one.evidence[when]]
        row |= {f"evidence {when}": statistics.fmean(shares)} if shares else {}
    return row


def measured(model: str, talks: Sequence[Talk]) -> dict[str, Any]:
    rules = rules_for(model)
    if rules is None:
        raise SystemExit(f"nothing is known of {model}'s prompt cache")
    by = {
        "planned": [ours(model, rules, one, one.turns, {}) for one in talks],
        "none": [ours(model, rules, one, one.turns, {"core_tokens": 0}) for one in talks],
    }
    for size in SIZES:
        with fixed(size):
            by[f"fixed {size}"] = [ours(model, rules, one, one.turns, {"core_tokens": size}) for one in talks]
    found: dict[str, Any] = {name: told(bills) for name, bills in by.items()}
    best = [min(by[name][at].total for name in by if name != "planned") for at in range(len(talks))]
    found["planned to the best"] = sum(one.total for one in by["planned"]) / sum(best)
    found["worst conversation"] = max(one.total / least for one, least in zip(by["planned"], best, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--conversations", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--models", nargs="+", default=["anthropic:claude-sonnet-5", "deepseek:deepseek-v4-flash"])
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--standing", type=int, default=0)
    parser.add_argument("--ask", type=int, default=14)
    parser.add_argument("--chat", type=int, default=8)
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not Path(given.data).is_file():
        raise SystemExit(f"skipped: there is no {given.data}; give --data")
    talks = [talk(Path(given.data), number, given.questions) for number in given.conversations]
    if given.busy:
        talks = [busy(one) for one in talks]
    if given.standing:
        parts = [sessions(one, given.standing, given.ask, given.chat) for one in talks]
        talks = [
            replace(one, turns=tuple(said for part in its for said in part))
            for one, its in zip(talks, parts, strict=True)
        ]
    result = {model: measured(model, talks) for model in given.models}
    for model, found in result.items():
        print(model)
        for name, row in found.items():
            value = row if isinstance(row, float) else {what: round(number, 3) for what, number in row.items()}
            print(f"  {name:20} {value}")
    kept = json.loads(given.json.read_text("utf-8")) if given.json.is_file() else {}
    kept[("busy" if given.busy else "days") + (" standing" if given.standing else "")] = result
    given.json.parent.mkdir(exist_ok=True)
    given.json.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
