"""The same turns at hosts that sell tokens: what each way to remember would have been billed, request by request.

    python tests/benchmarks/efficiency_money.py [--conversations 0 1 2 3] [--models deepseek:…] [--busy]

agentmem is the real thing: `Memory.chat` with a provider that has the host's cache rules, bills every request that it
is sent by them (`PromptCache`, with the marks that were asked for) and says what was said in the conversation. The
others are (a) full history, uncached; (b) full history, cached; (c) the ten best records before the session's history,
uncached; (d) the same, cached; (b) and (d) with the marks and lifetimes that are best for this very conversation. The
system part has 1,500 tokens; clocks are the recorded ones, or with ``--busy`` all sessions lie twenty minutes apart.
Input only: what is answered costs the same everywhere. Results: tests/benchmarks/results/efficiency_money.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from efficiency_talk import DATA, Said, Talk, bare, both, talk  # type: ignore[import-not-found]

from agentmem import Memory
from agentmem.activation.cache_model import Block, PromptCache
from agentmem.cache_rules import CacheRules, rules_for
from agentmem.ledger.costs import input_price
from agentmem.provider import Capabilities, Generation, Request
from agentmem.testing import ScriptedProvider
from agentmem.tokens import PER_MESSAGE, counter_for
from agentmem.types import Message, Usage

__all__ = ["MODELS", "money"]

RESULTS = Path(__file__).parent / "results" / "efficiency_money.json"
#: Price lists: OpenAI's (1,024, .1), Anthropic's (1,024, .1) and DeepSeek's (64, .02) of cache-economics.md.
MODELS = ("openai:gpt-5.6", "anthropic:claude-sonnet-5", "deepseek:deepseek-v4-flash")
SYSTEM_TOKENS, TOP, BUSY_S = 1500, 10, 1200.0


@dataclass
class Bills:
    """What one way to remember was billed, in uncached input tokens, and what evidence its prompts held."""

    costs: list[float] = field(default_factory=list)
    evidence: dict[str, list[float]] = field(default_factory=lambda: {"now": [], "later": []})
    tokens: int = 0
    beside: float = 0.0  # requests that no turn asked for

    def note(self, said: Said, shown: str) -> None:
        if said.evidence:
            shown = bare(shown)
            self.evidence[said.kind].append(sum(bare(text) in shown for text in said.evidence) / len(said.evidence))

    @property
    def total(self) -> float:
        return sum(self.costs) + self.beside


class Paid(ScriptedProvider):
    """A host that bills by its rules."""

    def __init__(self, model: str, rules: CacheRules) -> None:
        kv: Any = "breakpoints" if rules.marked else "auto"
        capabilities = Capabilities(chat=True, kv=kv, context_tokens=rules.context_tokens, cache=rules)
        super().__init__("", name=model, capabilities=replace(capabilities, holds_prefix_s=rules.lifetimes[-1].seconds))
        self.rules, self.cache, self.at = rules, PromptCache(rules), 0.0
        self.count = counter_for(model).count
        self.reply, self.bills, self.shown, self.turns = "", Bills(), "", 0

    def count_tokens(self, text: str) -> int:
        return self.count(text)

    def generate(self, request: Request) -> Generation:
        messages = [message for segment in request.segments for message in segment.messages]
        blocks = [Block((said.role, said.content), self.count(said.content) + PER_MESSAGE) for said in messages]
        names = [life.name for life in self.rules.lifetimes]
        marks: list[tuple[int, int]] = []
        if request.cache is not None:
            marks = [(mark.messages, names.index(mark.lifetime or names[0])) for mark in request.cache.marks]
        elif self.rules.marked:  # the adapters' own way
            ends = itertools.accumulate(len(segment.messages) for segment in request.segments)
            stable = [end for end, segment in zip(ends, request.segments, strict=True) if segment.stable]
            marks = [(end, 0) for end in stable[-self.rules.marks :]]
        bill = self.cache.request(blocks, marks if self.rules.marked else [], self.at)
        if request.options.max_tokens == 0:
            self.bills.beside += bill.cost(self.rules)
        else:
            self.bills.costs.append(bill.cost(self.rules))
            self.bills.tokens += bill.tokens
            self.shown = "\n".join(said.content for said in messages)
        usage = Usage(
            input_tokens=bill.tokens,
            cached_tokens=bill.read,
            written_tokens=sum(bill.written),
            output_tokens=self.count(self.reply),
        )
        return Generation(text=self.reply, usage=usage, finish_reason="stop")


def system_text(count: Any) -> str:
    """A system part of 1,500 tokens."""
    text = "You are a good friend of the user. You listen, you remember, and you answer briefly and warmly."
    for number in itertools.count(1):
        line = f"\n{number}. When the user speaks of matter {number}, follow rule {number * 7 % 101} of the house."
        if count(text + line) + PER_MESSAGE > SYSTEM_TOKENS:
            return text
        text += line
    raise AssertionError


def ours(model: str, rules: CacheRules, talk_: Talk, turns: Sequence[Said], settings: dict[str, Any]) -> Bills:
    """`Memory.chat` through the whole conversation."""
    host = Paid(model, rules)
    system = system_text(host.count)
    with Memory(":memory:", model=host, clock=lambda: host.at, **settings) as memory:
        chat = memory.scope(user=talk_.name)
        for said, after in itertools.zip_longest(turns, turns[1:]):
            host.at, host.reply = said.at, said.reply
            if said.first:
                chat = memory.scope(user=talk_.name)
            asked = {"role": "user", "content": said.message, "name": talk_.user, "at": said.day_at}
            chat.chat(asked, system=system, remember=said.kind == "chat")
            host.bills.note(said, host.shown)
            if after is None or after.session != said.session:
                consolidate = getattr(chat, "consolidate", None)
                if consolidate is not None:
                    consolidate()
    return host.bills


@dataclass(frozen=True)
class Sent:
    """A turn as the fixed ways send it: the history of its session and before, and what is recalled beside it."""

    said: Said
    before: tuple[Message, ...]
    session: tuple[Message, ...]
    memories: str


def sent(talk_: Talk, turns: Sequence[Said]) -> Iterator[Sent]:
    """The turns with what is known before each; the search is agentmem's."""
    history: list[Message] = []
    start, here, now = 0, set[str](), [0.0]
    with Memory(":memory:", clock=lambda: now[0]) as memory:
        user = memory.scope(user=talk_.name)
        for said in turns:
            now[0] = said.at
            if said.first:
                start, here = len(history), set()
            hits = user.search(said.message, k=TOP + len(here)) if history else []
            records = [hit.record for hit in hits if hit.record.id not in here][:TOP]
            lines = "\n".join(
                f"- {record.at:%d %B %Y} {record.name or record.role}: {record.text}" for record in records
            )
            yield Sent(said, tuple(history[:start]), tuple(history[start:]), lines)
            if said.kind == "chat":
                told = both(talk_, said)
                history += [Message(role=one["role"], content=one["content"]) for one in told]
                here |= {record.id for record in user.scope(session=said.session).add(told)}


def fixed(
    rules: CacheRules, count: Any, asked: Sequence[Sent], *, full: bool, marks: tuple[int | None, int | None] | None
) -> Bills:
    """One of today's ways; ``marks``: the lifetimes of the system part's end and the history's; None pays it all."""
    cache, bills = PromptCache(rules), Bills()
    system = Block("system", SYSTEM_TOKENS)
    for one in asked:
        past = [*one.before, *one.session] if full else list(one.session)
        blocks = [system]
        if one.memories and not full:
            blocks.append(Block(("memories", one.memories), count(one.memories) + PER_MESSAGE))
        blocks += [Block((said.role, said.content), count(said.content) + PER_MESSAGE) for said in past]
        end = len(blocks) + (one.said.kind == "chat")
        blocks.append(Block(("user", one.said.message), count(one.said.message) + PER_MESSAGE))
        placed = {} if marks is None else dict(zip((1, end), marks, strict=True))
        bill = cache.request(blocks, [(at, life) for at, life in placed.items() if life is not None], one.said.at)
        bills.costs.append(float(bill.tokens) if marks is None else bill.cost(rules))
        bills.tokens += bill.tokens
        bills.note(one.said, "\n".join([one.memories * (not full), *(said.content for said in past)]))
    return bills


def ways(rules: CacheRules, count: Any, asked: Sequence[Sent]) -> dict[str, Bills]:
    """(a) to (d)."""
    lives = [None, *range(len(rules.lifetimes))]
    pairs = itertools.product(lives, lives)  # hosts take no longer lifetime behind a shorter one
    fitting = [(one, two) for one, two in pairs if one is None or two is None or one >= two]
    marks = fitting if rules.marked else [(0, 0)]

    def best(*, full: bool) -> Bills:
        return min((fixed(rules, count, asked, full=full, marks=pair) for pair in marks), key=lambda bills: bills.total)

    return {
        "a": fixed(rules, count, asked, full=True, marks=None),
        "b": best(full=True),
        "c": fixed(rules, count, asked, full=False, marks=None),
        "d": best(full=False),
    }


def busy(talk_: Talk) -> Talk:
    """The same with all sessions on one day, twenty minutes after one another."""
    moved: list[Said] = []
    for said in talk_.turns:
        before = moved[-1].at if moved else said.at - BUSY_S
        moved.append(replace(said, at=before + (BUSY_S if said.first else 30.0)))
    return replace(talk_, turns=tuple(moved))


def money(given: argparse.Namespace, talks: Sequence[Talk]) -> dict[str, dict[str, float]]:
    """By model: what a turn costs under each way, and the ratios that the issue asks for, over all conversations and
    in the worst of them."""
    found: dict[str, dict[str, float]] = {}
    settings = json.loads(given.settings)
    known = [(one, one.turns[: given.turns]) for one in talks]
    asked = [list(sent(one, turns)) for one, turns in known]
    for model in getattr(given, "models", MODELS):
        rules = rules_for(model)
        assert rules is not None
        count = counter_for(model).count
        by: dict[str, list[Bills]] = {}
        for (one, turns), its in zip(known, asked, strict=True):
            for name, bills in ways(rules, count, its).items():
                by.setdefault(name, []).append(bills)
            by.setdefault("e", []).append(ours(model, rules, one, turns, settings))
        requests = sum(len(bills.costs) for bills in by["e"])
        total = {name: sum(bills.total for bills in several) for name, several in by.items()}
        row = {f"{name} tokens a turn": cost / requests for name, cost in total.items()}
        price = input_price(model, rules=rules)
        row |= {f"{name} dollars a turn": cost / requests * price for name, cost in total.items()} if price else {}
        row |= {f"{name} to e": total[name] / total["e"] for name in "abcd"}
        bests = [min(by[name][at].total for name in "abcd") for at in range(len(talks))]
        row["best to e"] = sum(bests) / total["e"]
        row["e to best, worst conversation"] = max(mine.total / best for mine, best in zip(by["e"], bests, strict=True))
        for when in ("now", "later"):
            for name in "ce":
                shares = [share for bills in by[name] for share in bills.evidence[when]]
                row |= {f"{name} evidence {when}": statistics.fmean(shares)} if shares else {}
        found[model] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--conversations", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--turns", type=int)
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--settings", default="{}")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not Path(given.data).is_file():
        raise SystemExit(f"skipped: there is no {given.data}; give --data")
    talks = [talk(Path(given.data), number, given.questions) for number in given.conversations]
    result = money(given, [busy(one) for one in talks] if given.busy else talks)
    for model, row in result.items():
        print(f"{model}\n  " + "  ".join(f"{name} {value:.5g}" for name, value in row.items()))
    kept = json.loads(given.json.read_text("utf-8")) if given.json.is_file() else {}
    kept["busy" if given.busy else "days"] = {"conversations": [one.name for one in talks], "models": result}
    given.json.parent.mkdir(exist_ok=True)
    given.json.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
