"""What the planner says that a move will save, against what the next session then costs with the move and without it.

    python tests/benchmarks/planner_prediction.py [--model local|anthropic:claude-sonnet-5|…] [--conversation 0]
        [--every 2] [--kinds collapse shrink prime learn]

A development conversation of LoCoMo is chatted session by session; from the third on each also asks ``--ask`` of the
``--standing`` questions about its beginning, drawn anew, among at most ``--chat`` turns: what somebody needs again and
again. With ``--facts`` it is no recorded conversation: so many invented facts are added, and each session asks about
them between small talk (what a LoRA version can be taught). After every
``--every``-th session the folder is planned (``consolidate(dry_run=True)``); for each move of these kinds the folder is
copied twice, the move is made in one of the copies, and the next session is chatted in both. Measured: what its
requests cost without the move less what they cost with it; predicted: the saving of a request that the move was planned
with, as many times. What the move itself costs is no part of either: of a rewritten core block the first request of the
session, which computes it, is left out on both sides. A prime spares the first request alone, so that much is
predicted, and the first four are measured; it is planned once a core block was rewritten, so both copies are made of
a folder in which that was done. The folder itself goes on without any move, and chat's own
collapses are held off in all copies, so that the move is all that differs. Costs are CPU-seconds to the first token
with the local model (answers have one token, so nothing is decoded behind it; the ledger is told CPU-seconds too), and
what a request is billed at a host, with a system part of 1,500 tokens (efficiency_money.py). One thread computes, as in
efficiency.py: threads that wait for each other use CPU-seconds too. ``priced`` are the tokens of both sides at the
prices that the move was planned with: what it differs from ``measured`` by is the machine's.
Results: tests/benchmarks/results/planner_prediction.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from efficiency_money import Paid, busy, system_text  # type: ignore[import-not-found]
from efficiency_systems import SYSTEM, Script, Told  # type: ignore[import-not-found]
from efficiency_talk import DATA, Said, Talk, talk  # type: ignore[import-not-found]
from invented_facts import Fact, draw  # type: ignore[import-not-found]
from small_talk import SMALL_TALK  # type: ignore[import-not-found]

from agentmem import Memory, economics, moving, recalling
from agentmem import chat as chats
from agentmem.cache_rules import rules_for
from agentmem.flow import run
from agentmem.plaintext.asking import asks
from agentmem.planner.values import Costs, Move

RESULTS = Path(__file__).parent / "results" / "planner_prediction.json"
KINDS = ("collapse", "shrink", "prime", "distil", "learn")
HEADS = ("collapse", "shrink")
#: Turns that are chatted behind a prime: it spares the first, and the others only add what a machine's times vary by.
BEHIND = 4


class Here:
    """The local model; costs are CPU-seconds."""

    unit = "seconds"
    system = SYSTEM

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.script = Script(answer=1)
        self._told = Told(self.script)
        self._told.provider.close = lambda: None  # it outlives the memories that use it
        self.provider, self.at = self._told.provider, 0.0
        self._generate, self.provider.generate = self.provider.generate, self._timed

    def _timed(self, request: Any) -> Any:
        """The ledger is told CPU-seconds, as they are measured here: on a busy machine a wall clock tells how busy."""
        begun = time.process_time()
        generation = self._generate(request)
        usage, total = generation.usage, time.process_time() - begun
        first = max(0.0, self.script.first_cpu - begun) or total  # a prime has no first token
        usage = usage.model_copy(update={"first_token_s": first, "total_s": total})
        return replace(generation, usage=usage)

    def ask(self, chat: Any, asked: dict[str, Any], said: Said) -> dict[str, float]:
        self._told.reply = said.reply
        self.script.begin(self._told.encode(said.reply), judged=False)
        begun = time.process_time()
        reply = chat.chat(asked, remember=said.kind == "chat", max_tokens=1)
        usage = reply.usage
        return {
            "cost": self.script.first_cpu - begun,
            "computed": usage.input_tokens - usage.cached_tokens,
            "cached": usage.cached_tokens,
        }

    def copied(self) -> Here:
        return self  # what it keeps is in the folder


class There:
    """A host that bills by its rules; costs are dollars."""

    unit = "dollars"

    def __init__(self, model: str) -> None:
        rules = rules_for(model)
        if rules is None:
            raise SystemExit(f"nothing is known of {model}'s prompt cache")
        self._model, self._rules = model, rules
        self.provider = Paid(model, rules)
        self.system = system_text(self.provider.count)

    @property
    def at(self) -> float:
        return float(self.provider.at)

    @at.setter
    def at(self, now: float) -> None:
        self.provider.at = now

    def ask(self, chat: Any, asked: dict[str, Any], said: Said) -> dict[str, float]:
        self.provider.reply = said.reply
        reply = chat.chat(asked, remember=said.kind == "chat")
        usage, prefill = reply.usage, price(chat)
        cost = self.provider.bills.costs[-1] * prefill
        return {"cost": cost, "computed": usage.input_tokens - usage.cached_tokens, "cached": usage.cached_tokens}

    def copied(self) -> There:
        other = There(self._model)
        other.provider.cache = copy.deepcopy(self.provider.cache)
        other.provider.at = self.provider.at
        return other


def price(chat: Any) -> float:
    """Dollars of an uncached prompt token, as the planner has it."""
    return float(economics.costs(chat._engine).prefill)


def opened(folder: Path, host: Any, given: argparse.Namespace) -> Memory:
    settings = {"system": host.system} | json.loads(given.settings)
    return Memory(folder, model=host.provider, clock=lambda: host.at, **settings)


def session(memory: Memory, host: Any, one: Talk, turns: Sequence[Said]) -> list[dict[str, float]]:
    """Chat these turns in a handle of their own; what each cost."""
    chat = memory.scope(user=one.name)
    rows = []
    for said in turns:
        host.at = said.at
        asked = {"role": "user", "content": said.message, "name": one.user, "at": said.day_at}
        rows.append(host.ask(chat, asked, said))
    return rows


def held_off() -> None:
    """No collapse by chat itself: the core block stands as it is, or is none."""
    chats.__dict__["core_of"] = lambda *_, stands, **__: recalling.Core(stands or [])


def sessions(one: Talk, standing: int, ask: int, chat: int) -> list[list[Said]]:
    """The turns by session, with the standing questions among those of the third session on."""
    names = list(dict.fromkeys(said.session for said in one.turns))
    parts = [[said for said in one.turns if said.session == name and said.kind == "chat"][:chat] for name in names]
    chance = random.Random(8)
    known = list({said.message: said for said in one.turns if said.kind == "now"}.values())[:standing]
    for number, part in enumerate(parts[2:], 2):
        drawn = chance.choices(known, k=ask)
        asked = [(chance.randrange(1, len(part) + 1), said) for said in drawn]
        for place, said in sorted(asked, key=lambda one: -one[0]):
            at = part[place - 1].at + 1.0
            part.insert(place, replace(said, kind="later", session=names[number], at=at))
        part.sort(key=lambda said: said.at)
    return parts


def about(facts: Sequence[Fact], ask: int, chat: int, count: int) -> list[list[Said]]:
    """Sessions an hour apart of ``ask`` questions about these facts, between ``chat`` turns of small talk."""
    chance = random.Random(8)
    talks = [small for small in SMALL_TALK if not asks(small)]
    found = []
    for number in range(count):
        name, at, turns = f"session_{number + 1}", 1.7e9 + number * 3600.0, []
        for place, now in enumerate(chance.sample([True] * ask + [False] * chat, ask + chat)):
            fact = chance.choice(facts)
            message, reply = (fact.natural, fact.value) if now else (chance.choice(talks), "All right.")
            turns.append(Said("later" if now else "chat", name, at + 30.0 * place, message, reply, place == 0))
        found.append(turns)
    return found


def rewritten(
    folder: Path, host: Any, one: Talk, turns: Sequence[Said], planned: Any, given: Any
) -> Iterator[dict[str, Any]]:
    """What is planned next where the core blocks of this plan were rewritten, weighed in the same way."""
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(folder, name, dirs_exist_ok=True)
        with opened(Path(name), host, given) as memory:
            for move in planned.moves:
                if move.kind in HEADS:
                    run(moving.make(memory._engine, move))
            again = memory.scope(user=one.name).consolidate(dry_run=True)
        known = {move.key for move in planned.moves}
        for move in again.moves:
            if move.kind in given.kinds and move.kind not in HEADS and move.key not in known:
                yield weighed(Path(name), host, one, turns, move, given)


def paid(prices: Costs, row: dict[str, float]) -> float:
    """A request's tokens at these prices."""
    return prices.computing(row["cached"], row["cached"] + row["computed"]) + prices.loading(row["cached"])


def weighed(folder: Path, host: Any, one: Talk, turns: Sequence[Said], move: Move, given: Any) -> dict[str, Any]:
    """The next session with this move and without it."""
    rows: dict[str, list[dict[str, float]]] = {}
    note, now = None, host.at
    turns = turns[:BEHIND] if move.kind == "prime" else turns
    for side in ("without", "with"):
        with tempfile.TemporaryDirectory() as other:
            shutil.copytree(folder, other, dirs_exist_ok=True)
            mine = host.copied()
            mine.at = now
            with opened(Path(other), mine, given) as memory:
                prices = economics.costs(memory._engine)
                if side == "with":
                    outcome = run(moving.make(memory._engine, move))
                    note = None if outcome is None else f"{outcome.state} {outcome.note or ''}".strip()
                rows[side] = session(memory, mine, one, turns)
    skipped = 1 if move.kind in HEADS else 0
    without, with_ = (sum(row["cost"] for row in rows[side][skipped:]) for side in ("without", "with"))
    priced = {side: sum(paid(prices, row) for row in rows[side][skipped:]) for side in rows}
    requests = 1 if move.kind == "prime" else len(turns) - skipped
    expected = move.saves / move.requests * requests if move.requests else 0.0
    return {
        "kind": move.kind,
        "session": turns[0].session,
        "requests": requests,
        "predicted": expected,
        "measured": without - with_,
        "priced": priced["without"] - priced["with"],
        "first": rows["without"][0]["cost"] - rows["with"][0]["cost"],
        "without": without,
        "computed": [sum(row["computed"] for row in rows[side][skipped:]) for side in ("without", "with")],
        "tokens": move.tokens,
        "made": note,
        "why": move.why,
    }


def trials(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    host: Any = Here() if given.model == "local" else There(given.model)
    facts = draw(given.facts, 8)
    if facts:
        one = Talk("facts", "Ana", "Ben", ())
        parts = about(facts, given.ask, given.chat, given.sessions)
    else:
        one = talk(Path(given.data), given.conversation, given.questions)
        parts = sessions(busy(one) if given.busy else one, given.standing, given.ask, given.chat)
    held_off()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if facts:
            host.at = parts[0][0].at
            with opened(folder, host, given) as memory:
                memory.scope(user=one.name).add([fact.statement for fact in facts])
        for number, turns in enumerate(parts[: given.sessions]):
            with opened(folder, host, given) as memory:
                session(memory, host, one, turns)
                last = number + 1 == len(parts)
                gap = 7200.0 if last else parts[number + 1][0].at - host.at
                host.at += min(gap / 2, 7200.0)  # nobody has spoken for a while
                planned = memory.scope(user=one.name).consolidate(dry_run=True)
            if number % given.every == given.every - 1 and not last:
                for move in planned.moves:
                    if move.kind in given.kinds:
                        yield weighed(folder, host, one, parts[number + 1], move, given)
                if any(move.kind in HEADS for move in planned.moves):
                    yield from rewritten(folder, host, one, parts[number + 1], planned, given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="local")
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--conversation", type=int, default=0)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--facts", type=int, default=0, help="so many invented facts instead of a conversation")
    parser.add_argument("--sessions", type=int)
    parser.add_argument("--standing", type=int, default=3)
    parser.add_argument("--ask", type=int, default=14)
    parser.add_argument("--chat", type=int, default=8)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["collapse", "shrink", "prime"])
    parser.add_argument("--busy", action="store_true", help="sessions twenty minutes apart")
    parser.add_argument("--settings", default="{}")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.facts and not given.sessions:
        parser.error("--facts needs --sessions")
    if not given.facts and not Path(given.data).is_file():
        raise SystemExit(f"skipped: there is no {given.data}; give --data")
    rows = []
    for row in trials(given):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    result: dict[str, Any] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        predicted, measured = (sum(row[name] for row in mine) for name in ("predicted", "measured"))
        spread = statistics.stdev(row["measured"] for row in mine) * len(mine) ** 0.5 if len(mine) > 1 else None
        at_prices = sum(row["priced"] for row in mine)
        result[kind] = {
            "moves": len(mine), "predicted": predicted, "measured": measured, "spread": spread, "priced": at_prices,
        }  # fmt: skip
        ratio = f"{measured / predicted:.2f}" if predicted else "-"
        print(f"{kind}: {len(mine)} moves, predicted {predicted:.4g}, measured {measured:.4g}: {ratio}")
    kept = json.loads(given.json.read_text("utf-8")) if given.json.is_file() else {}
    kept[given.model + (" busy" if given.busy else "") + (" facts" if given.facts else "")] = {
        "arguments": shlex.join(sys.argv[1:]),
        "kinds": result,
        "rows": rows,
    }
    given.json.parent.mkdir(exist_ok=True)
    given.json.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
