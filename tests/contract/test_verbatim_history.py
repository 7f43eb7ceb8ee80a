"""What a hosted prompt's verbatim history holds: recalled records that stay where they were sent, until they are
forgotten, and no more tokens than the settings let it have."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from agentmem import Memory
from agentmem.cache_rules import rules_for
from agentmem.provider import Capabilities, Request
from agentmem.testing import FakeClock, ScriptedProvider
from agentmem.types import Message

#: Reading costs a fiftieth there and writing nothing: recalled records are kept in the history.
RULES = rules_for("deepseek:deepseek-v4-flash")
SYSTEM = " ".join(f"Rule {number} of the house stands." for number in range(300))
CAN = Capabilities(chat=True, kv="auto", cache=RULES, holds_prefix_s=300, context_tokens=100_000)
QUESTION = "Where does the boat Wanda lie, near which lighthouse?"


class Host:
    def __init__(self, folder: Path, clock: FakeClock, **settings: Any) -> None:
        self.clock = clock
        self.provider = ScriptedProvider("Noted.", name="host:model", capabilities=CAN)
        how: dict[str, Any] = {"embedder": "hash", "clock": clock, "system": SYSTEM, **settings}
        self.memory = Memory(folder, model=self.provider, **how)

    def ask(self, turns: int) -> list[Request]:
        for number in range(turns):
            self.memory.scope(user="ana", session="s").chat(QUESTION if number % 2 else f"Boat {number}, what colour?")
            self.clock.advance(20)
        return self.provider.requests[-turns:]


def stable(request: Request) -> list[Message]:
    return [message for segment in request.segments if segment.stable for message in segment.messages]


def memories(request: Request) -> list[str]:
    """The blocks of recalled records in the history."""
    said = [message for segment in request.segments if segment.name == "history" for message in segment.messages]
    return [message.content for message in said if message.content.startswith("<memories>")]


def test_kept_records_stay_byte_equal_across_restarts_until_they_are_forgotten(tmp_path: Path) -> None:
    clock = FakeClock(1_767_600_000.0)
    first = Host(tmp_path / "m", clock)
    with first.memory:
        boats = [f"The boat Wanda number {n} lies in harbour {n} near the lighthouse of Cascais." for n in range(20)]
        added = first.memory.scope(user="ana").add(boats)
        sent = first.ask(8)
    second = Host(tmp_path / "m", clock)
    with second.memory:
        sent += second.ask(4)
        for before, now in itertools.pairwise(sent):
            texts = [[(m.role, m.content) for m in stable(request)] for request in (before, now)]
            assert texts[1][: len(texts[0])] == texts[0]
        kept = "".join(memories(sent[-1]))
        assert sum(text in kept for text in boats) >= 5
        assert all(kept.count(text) <= 1 for text in boats)  # what stands there is not recalled again
        gone = next(record for record in added if record.text in kept)
        second.memory.forget(gone.id)
        [after] = second.ask(1)
        assert all(gone.text not in message.content for segment in after.segments for message in segment.messages)
        assert sum(text in "".join(memories(after)) for text in boats) >= 4


def test_the_history_has_no_more_tokens_than_the_settings_give_it(tmp_path: Path) -> None:
    longest = {}
    for limit in (None, 400, 0):
        host = Host(tmp_path / str(limit), FakeClock(1_767_600_000.0), recall_k=0, history_tokens=limit)
        with host.memory:
            count = host.memory._engine.count
            longest[limit] = max(
                sum(count(m.content) + 4 for s in request.segments if s.name == "history" for m in s.messages)
                for request in host.ask(40)
            )
    assert (longest[None] or 0) > 700
    assert 100 < longest[400] <= 400
    assert longest[0] == 0
