"""A real conversation of several sessions, with adds, recalls, forgets and collapses of the core, on every adapter.

What a cache may keep of a request begins the next one too, except where the core collapsed, the history was laid out
anew or a record was forgotten, and then exactly once."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentmem import Memory
from agentmem.cache_rules import CacheRules, rules_for
from agentmem.provider import Capabilities, Request
from agentmem.testing import FakeClock, ScriptedProvider

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from servers.bodies import BUILD, cacheable

LOCOMO = Path(__file__).resolve().parents[3] / "shared" / "data" / "locomo" / "locomo_dev.json"
#: Hosts whose prices lead to different layouts: marks, automatic and dear, automatic and nearly free.
HOSTS = (
    "anthropic:claude-sonnet-5-5",
    "anthropic:claude-haiku-4-5",
    "openai:gpt-6-sol",
    "openai:gpt-4o",
    "deepseek:v4",
)
SYSTEM = " ".join(f"House rule {number}: be kind and brief." for number in range(160))


def sessions() -> list[list[tuple[str, str]]]:
    """The first sessions of a conversation of LoCoMo: pairs of what was said and answered."""
    if not LOCOMO.exists():
        pytest.skip("the LoCoMo conversations are not here")
    talk = json.loads(LOCOMO.read_text(encoding="utf-8"))[0]["conversation"]
    found = []
    for number in range(1, 7):
        turns = [turn["text"] for turn in talk[f"session_{number}"]]
        found.append(list(zip(turns[::2], turns[1::2], strict=False))[:8])
    return found


class Talk:
    """A memory whose provider notes every request, and what happened between two of them."""

    def __init__(self, folder: Path, rules: CacheRules) -> None:
        self.clock = FakeClock(dt.datetime(2026, 1, 5, tzinfo=dt.UTC).timestamp())
        self.answers: Iterator[str] = iter(())
        kind: Any = "breakpoints" if rules.marked else "auto"
        can = Capabilities(chat=True, tools=True, kv=kind, cache=rules, holds_prefix_s=300, context_tokens=100_000)
        self.provider = ScriptedProvider(lambda _: next(self.answers), name="host:model", capabilities=can)
        self.memory = Memory(folder, model=self.provider, embedder="hash", clock=self.clock, system=SYSTEM)
        #: Of each request: the session it belongs to, and how often something of the prefix had been forgotten before.
        self.told: list[tuple[int, int]] = []

    def run(self) -> None:
        forgotten = 0
        for number, pairs in enumerate(sessions()):
            self.clock.advance((20 * 60, 86_400)[number % 2])
            ana = self.memory.scope(user="ana")
            for place, (said, answer) in enumerate(pairs):
                self.answers = iter([answer])
                reply = ana.chat(said)
                self.told.append((number, forgotten))
                self.clock.advance(30)
                if place == 2:
                    ana.add(f"Ana keeps {number + 3} bees and always calls them by name.")
                if place == 4:  # what stands in the prompt of the next turn, one way or the other
                    ana.forget(reply.records[0])
                    forgotten += 1
        self.memory.close()


def collapsed(before: Request, now: Request) -> bool:
    return _segment(before, "core") != _segment(now, "core")


def folded(before: Request, now: Request) -> bool:
    """The history begins at another message than before."""
    old, new = _segment(before, "history"), _segment(now, "history")
    return bool(old) and old[:1] != new[:1]


def _segment(request: Request, name: str) -> tuple[Any, ...]:
    return next((segment.messages for segment in request.segments if segment.name == name), ())


def prefix(build: Callable[[Request], dict[str, Any]], request: Request) -> str:
    """The rendering of all that a cache may keep of this request. A last message of one letter stands for what follows,
    since every API wants one."""
    turn = next(segment for segment in request.segments if segment.name == "turn")
    stable = [segment for segment in request.segments if segment.stable]
    return cacheable(build, replace(request, segments=(*stable, replace_turn(turn))))


def replace_turn(turn: Any) -> Any:
    return turn.model_copy(update={"messages": (turn.messages[0].model_copy(update={"content": "."}),)})


@pytest.fixture(scope="module", params=HOSTS)
def requests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    rules = rules_for(request.param)
    assert rules is not None
    talk = Talk(tmp_path_factory.mktemp("talk"), rules)
    talk.run()
    return rules, list(zip(talk.provider.requests, talk.told, strict=True))


@pytest.mark.parametrize("name", BUILD)
def test_a_prefix_breaks_only_where_something_of_it_went_and_then_once(name: str, requests: Any) -> None:
    rules, sent = requests
    build = BUILD[name]
    grew = broke = 0
    for (before, (session, forgotten)), (now, (session_now, forgotten_now)) in itertools.pairwise(sent):
        if rules.marked and not before.cache.marks:
            continue  # the host was asked to keep nothing of it: its prompt is below the minimum
        whole = cacheable(build, replace(now, segments=(*now.segments, _end())))
        if whole.startswith(prefix(build, before)):
            grew += 1
            continue
        broke += 1
        moved = collapsed(before, now) or folded(before, now)
        assert moved or forgotten_now > forgotten or session_now != session
    # What is laid out anew stays so: a host's cache has nothing of a layout that changes with every turn. Of eight
    # turns one forgets something and one begins a session.
    assert grew >= 2 * broke


def _end() -> Any:
    from agentmem.types import Message, Segment

    return Segment(name="turn", messages=(Message(role="user", content="."),), stable=False)
