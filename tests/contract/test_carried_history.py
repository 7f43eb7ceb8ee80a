"""What a hosted prompt carries of earlier sessions: only what its handle may see, only what came before it, and nothing
that was forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentmem import Memory
from agentmem.cache_rules import rules_for
from agentmem.provider import Capabilities, Request
from agentmem.testing import FakeClock, ScriptedProvider

#: Reading costs a fiftieth there, so a young memory is carried whole.
RULES = rules_for("deepseek:deepseek-v4-flash")
SYSTEM = " ".join(f"Rule {number} of the house stands." for number in range(200))


class Host:
    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock(1_767_600_000.0)
        can = Capabilities(chat=True, tools=True, kv="auto", cache=RULES, holds_prefix_s=300, context_tokens=100_000)
        self.provider = ScriptedProvider("Noted.", name="host:model", capabilities=can)
        self.memory = Memory(folder, model=self.provider, embedder="hash", clock=self.clock, system=SYSTEM)

    def say(self, handle: Any, text: str) -> list[str]:
        """Chat, and what of the user's own words stood in the history before it."""
        handle.chat(text)
        self.clock.advance(20)
        return history(self.provider.requests[-1])


def history(request: Request) -> list[str]:
    messages = [m for segment in request.segments if segment.name == "history" for m in segment.messages]
    return [m.content for m in messages if m.role == "user" and not m.content.startswith("<memories>")]


@pytest.fixture
def host(tmp_path: Path) -> Any:
    made = Host(tmp_path / "m")
    with made.memory:
        yield made


def test_a_users_handle_carries_her_earlier_sessions_in_their_order(host: Host) -> None:
    first = host.memory.scope(user="ana")
    host.say(first, "My boat is called Wanda.")
    host.say(first, "I keep it in Lisbon.")
    host.clock.advance(3600)
    second = host.memory.scope(user="ana")
    assert host.say(second, "Good morning.") == ["My boat is called Wanda.", "I keep it in Lisbon."]
    assert host.say(second, "And good night.")[-1] == "Good morning."


def test_what_is_said_beside_a_running_session_stays_out_of_it(host: Host) -> None:
    running, beside = host.memory.scope(user="ana"), host.memory.scope(user="ana")
    host.say(running, "One.")
    host.say(beside, "Meanwhile elsewhere.")
    assert "Meanwhile elsewhere." not in host.say(running, "Two.")
    assert host.say(running, "Three.") == ["One.", "Two."]


def test_neither_other_users_nor_bound_sessions_are_carried(host: Host) -> None:
    host.say(host.memory.scope(user="ben"), "Ben's secret.")
    host.say(host.memory.scope(user="ana", agent="cook"), "To the cook.")
    host.say(host.memory.scope(user="ana"), "To nobody.")
    host.clock.advance(60)
    assert host.say(host.memory.scope(user="ana"), "Hello.") == ["To nobody."]
    assert host.say(host.memory.scope(user="ana", session="s"), "Hello.") == []
    assert host.say(host.memory, "Hello.") == []


def test_without_recall_only_the_own_session_stands_there(host: Host) -> None:
    host.say(host.memory.scope(user="ana"), "Long ago.")
    ana = host.memory.scope(user="ana")
    ana.chat("Now.", recall=False)
    assert history(host.provider.requests[-1]) == []
    ana.chat("Later.", recall=False)
    assert history(host.provider.requests[-1]) == ["Now."]


def test_a_forgotten_turn_leaves_the_history_that_begins_with_it(host: Host) -> None:
    ana = host.memory.scope(user="ana")
    host.say(ana, "First of all.")
    host.say(ana, "Second.")
    [first] = [record for record in ana.list() if record.text == "First of all."]
    ana.forget(first.id)
    said = host.say(ana, "Third.")
    assert "First of all." not in said
    assert said[-1] == "Second."


def test_the_layout_outlives_the_process_and_a_damaged_one_costs_a_rebuild_only(host: Host, tmp_path: Path) -> None:
    ana = host.memory.scope(user="ana", session="s")
    host.say(ana, "One.")
    host.say(ana, "Two.")
    host.memory.close()
    again = Host(tmp_path / "m")
    with again.memory:
        assert again.say(again.memory.scope(user="ana", session="s"), "Three.") == ["One.", "Two."]
        with again.memory._engine.database.write() as connection:
            connection.execute('UPDATE layouts SET state = \'{"layouts": {"form": 0}}\'')
    once_more = Host(tmp_path / "m")
    with once_more.memory:
        once_more.say(once_more.memory.scope(user="ana", session="s"), "Four.")
