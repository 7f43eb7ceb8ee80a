"""What a hosted prompt carries of earlier sessions: only what its handle may see, only what came before it, and nothing
that was forgotten."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from agentmem import Memory
from agentmem.cache_rules import rules_for
from agentmem.provider import Capabilities, Generation, Request
from agentmem.testing import FakeClock, ScriptedProvider
from agentmem.types import ToolCall, Usage

#: Reading costs a fiftieth there, so a young memory is carried whole.
RULES = rules_for("deepseek:deepseek-v4-flash")
TOOLS = [{"name": "write", "description": "d", "parameters": {"type": "object", "properties": {}}}]
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


def test_a_history_whose_only_turn_was_forgotten_is_empty(host: Host) -> None:
    for session in range(3):
        ana = host.memory.scope(user="ana")
        for number in range(12):
            host.say(ana, f"Session {session}, {number}: " + "what was said then. " * 100)
        host.clock.advance(86400 * 3)
    ana = host.memory.scope(user="ana")
    reply = ana.chat("Only this.")
    assert history(host.provider.requests[-1]) == []
    for record in reply.records:
        ana.forget(record)
    assert host.say(ana, "And now?") == []


def limited(folder: Path, clock: FakeClock, model: str = "host:model", replies: Any = "Noted.") -> Any:
    can = Capabilities(chat=True, tools=True, kv="auto", cache=RULES, holds_prefix_s=300, context_tokens=100_000)
    provider = ScriptedProvider(replies, name=model, capabilities=can)
    return provider, Memory(folder, model=provider, embedder="hash", clock=clock, system=SYSTEM, history_tokens=3000)


def words(request: Request) -> int:
    messages = [m for segment in request.segments if segment.name == "history" for m in segment.messages]
    return sum(len(f"{m.content} {m.tool_calls}".split()) for m in messages)


def test_what_another_model_was_told_counts_against_the_historys_limit(tmp_path: Path) -> None:
    clock = FakeClock(1_767_600_000.0)
    for model, turns in (("host:a", 3), ("host:b", 30), ("host:a", 3)):
        provider, memory = limited(tmp_path, clock, model)
        with memory:
            ana = memory.scope(user="ana", session="s")
            for _ in range(turns):
                ana.chat("hi " * 300)
                clock.advance(20)
                assert words(provider.requests[-1]) <= 3000
    assert words(provider.requests[-1]) >= 300


def test_turns_of_two_handles_at_once_count_in_the_next_process(tmp_path: Path) -> None:
    clock = FakeClock(1_767_600_000.0)
    provider, memory = limited(tmp_path, clock)
    with memory:
        one, other = memory.scope(user="ana"), memory.scope(user="ana")
        for _ in range(20):
            one.chat("hi " * 300)
            other.chat("ho.")
            clock.advance(5)
    provider, memory = limited(tmp_path, clock)
    with memory:
        memory.scope(user="ana").chat("Hello.")
        assert words(provider.requests[-1]) <= 3000


@pytest.mark.parametrize("size", [300, 6000])
def test_what_tools_are_called_with_counts_and_no_result_stands_without_its_call(tmp_path: Path, size: int) -> None:
    def write(request: Request) -> Generation:
        call = ToolCall(id=f"c{len(provider.requests)}", name="write", arguments={"text": "word " * size})
        return Generation(text="", usage=Usage(), tool_calls=(call,))

    clock = FakeClock(1_767_600_000.0)
    provider, memory = limited(tmp_path, clock, replies=write)
    with memory:
        ana = memory.scope(user="ana")
        ana.chat("Write it.", tools=TOOLS)
        for number in range(1, 15):
            clock.advance(5)
            ana.chat({"role": "tool", "content": "ok", "tool_call_id": f"c{number}"}, tools=TOOLS)
            request = provider.requests[-1]
            calls = {call.id for part in request.segments for said in part.messages for call in said.tool_calls}
            assert f"c{number}" in calls
            said = [said for part in request.segments for said in part.messages if said.role != "system"]
            assert (said[0].role, said[0].content) == ("user", "Write it.")  # vendors refuse another beginning
            assert words(request) <= 3000 or size > 3000
            assert len(calls) == 1 or size < 3000


def test_a_layout_is_read_where_the_rules_know_fewer_lifetimes_now(host: Host, tmp_path: Path) -> None:
    host.say(host.memory.scope(user="ana", session="s"), "One.")
    with host.memory._engine.database.write() as connection:
        connection.execute("UPDATE layouts SET state = json_set(state, '$.layouts.life', 1)")
    host.memory.close()
    again = Host(tmp_path / "m")
    with again.memory:
        assert again.say(again.memory.scope(user="ana", session="s"), "Two.") == ["One."]


def test_an_answer_by_a_schema_is_expected_to_share_no_prefix_with_one_without(host: Host) -> None:
    ana = host.memory.scope(user="ana")
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    can = host.provider.capabilities
    host.provider.capabilities = dataclasses.replace(can, schemas=True)
    host.provider._always = '{"a": "b"}'
    ana.chat("One.")
    assert ana.chat("Two.", schema=schema).cache.expected_tokens == 0
    assert ana.chat("Three.", schema=schema).cache.expected_tokens > 0
    assert ana.chat("Four.").cache.expected_tokens > 0


def test_a_run_of_tools_whose_question_was_forgotten_still_begins_with_the_user(tmp_path: Path) -> None:
    def write(request: Request) -> Generation:
        call = ToolCall(id=f"c{len(provider.requests)}", name="write", arguments={})
        return Generation(text="", usage=Usage(), tool_calls=(call,))

    provider, memory = limited(tmp_path, FakeClock(), replies=write)
    with memory:
        ana = memory.scope(user="ana")
        question = ana.chat("Write it.", tools=TOOLS).records[0]
        with ana._engine.database.write():  # not its answer, which forget would take along
            ana._engine.records.delete([question])
        ana.chat({"role": "tool", "content": "ok", "tool_call_id": "c1"}, tools=TOOLS)
        roles = [said.role for part in provider.requests[-1].segments for said in part.messages]
        assert roles == ["system", "user", "assistant", "tool"]
