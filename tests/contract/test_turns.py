"""Turns that are not plain: tools, answers that no store can hold, prompts given up half-way, hosts that keep them."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from agentmem import InvalidInput, Memory, Unavailable
from agentmem.plaintext.embed import HashEmbedder, HostedEmbedder
from agentmem.provider import Capabilities, Generation, Request
from agentmem.testing import FakeClock, ScriptedProvider
from agentmem.types import Message, ToolCall, Usage

HOSTED = Capabilities(chat=True, tools=True, kv="auto", embeds=True, holds_prefix_s=300)
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("weather", "clock")]


def calling(*names: str, text: str = "", **arguments: Any) -> Generation:
    calls = tuple(ToolCall(id=f"call-{name}", name=name, arguments=arguments) for name in names)
    return Generation(text=text, usage=Usage(), tool_calls=calls, finish_reason="tool_calls")


def result(name: str, text: str = "fine") -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"call-{name}"}


def said(request: Request) -> list[Message]:
    return [m for s in request.segments for m in s.messages if m.role != "system"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "m"


def opened(folder: Path, *replies: Any) -> tuple[Memory, ScriptedProvider]:
    provider = ScriptedProvider(replies, name="hosted:model", capabilities=HOSTED)
    return Memory(folder, model=provider, embedder="hash", clock=FakeClock()), provider


def test_several_tools_are_answered_in_one_turn_and_both_vendors_take_it(folder: Path) -> None:
    memory, provider = opened(folder, calling("weather", "clock", text="Let me look."), "Sunny at noon.", "Bye.")
    with memory:
        memory.chat("How is it?", tools=TOOLS)
        reply = memory.chat([result("weather", "sun"), result("clock", "12:00")], tools=TOOLS)
        assert reply.text == "Sunny at noon."
        assert len(reply.records) == 3
        memory.chat("Thanks", tools=TOOLS)
    second, third = said(provider.requests[1]), said(provider.requests[2])
    assert [m.role for m in second] == ["user", "assistant", "tool", "tool"]
    assert second[1].content == "Let me look."
    assert [call.name for call in second[1].tool_calls] == ["weather", "clock"]
    assert third[:4] == second
    openai, hosts, anthropic = (
        import_module(f"agentmem.adapters.providers.{name}")
        for name in ("_openai_chat", "_openai_hosts", "_anthropic_requests")
    )
    spoken = openai.build_request(provider.requests[2], hosts.Served(model="m"))["messages"]
    assert [m.get("tool_call_id") for m in spoken if m["role"] == "tool"] == ["call-weather", "call-clock"]
    blocks = anthropic.build_request(provider.requests[2], model="m")["messages"]
    assert [b["type"] for b in blocks[1]["content"]] == ["text", "tool_use", "tool_use"]
    assert [b["type"] for b in blocks[2]["content"]] == ["tool_result", "tool_result"]


def test_a_call_that_was_never_answered_is_told_as_text(folder: Path) -> None:
    memory, provider = opened(folder, calling("weather", "clock"), "Fine.", "Ok.", "Ok.")
    with memory:
        memory.chat("How is it?", tools=TOOLS)
        memory.chat("Never mind.", tools=TOOLS)
        assert [(m.content, m.tool_calls) for m in said(provider.requests[1])[1:2]] == [
            ("[calls weather][calls clock]", ())
        ]
        memory.chat("And now?")
        assert said(provider.requests[2])[:2] == said(provider.requests[1])[:2]


def test_a_result_whose_call_was_forgotten_is_left_out(folder: Path) -> None:
    memory, provider = opened(folder, calling("weather"), "Sun.", "Ok.")
    with memory:
        asked = memory.chat("How is it?", tools=TOOLS)
        memory.chat(result("weather"), tools=TOOLS)
        memory.forget(asked.records[1])
        memory.chat("And now?")
    assert [m.role for m in said(provider.requests[2])] == ["user", "assistant", "user"]


@pytest.mark.parametrize("odd", ["a\0b", "\ud800", float("nan"), float("inf"), [{"k\0": "\udfff"}]])
def test_odd_arguments_of_a_tool_call_do_not_lose_the_turn(folder: Path, odd: Any) -> None:
    memory, provider = opened(folder, calling("weather", where=odd), "Sun.")
    with memory:
        assert len(memory.chat("How is it?", tools=TOOLS).records) == 2
        memory.chat(result("weather"), tools=TOOLS)
        assert said(provider.requests[1])[1].tool_calls[0].name == "weather"


def test_foreign_metadata_does_not_break_a_session(folder: Path) -> None:
    memory, _ = opened(folder, "Ok.")
    with memory:
        session = memory.scope(session="s")
        odd = {"tool_calls": [7], "tool_call_id": 7}
        session.add({"role": "assistant", "content": "x", "metadata": odd}, source="chat")
        assert session.chat("Hello").text == "Ok."


@pytest.mark.parametrize("message", [[], ["a", "b"], ["a", {"role": "tool", "content": "x"}], [[]]])
def test_lists_that_are_no_turn_are_refused(folder: Path, message: Any) -> None:
    memory, provider = opened(folder, "Ok.")
    with memory:
        with pytest.raises(InvalidInput):
            memory.chat(message)
        assert provider.requests == []


def test_a_message_that_begins_with_much_white_space_is_answered(folder: Path) -> None:
    memory, _ = opened(folder, "Ok.")
    with memory:
        memory.add("I like tea")
        assert memory.chat("\n" * 5000 + "What do I like?").text == "Ok."


def test_a_stream_that_is_dropped_ends_at_once_and_not_when_the_collector_comes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, provider = opened(folder, "One two three.")
    ended: list[str] = []

    def source(_: object) -> Iterator[str]:
        try:
            yield from ("One", " two")
        finally:
            ended.append("ended")

    monkeypatch.setattr(provider, "stream", source)
    with memory:
        gc.disable()
        try:
            stream = memory.chat("Hello there", stream=True)
            assert next(stream) == "One"
            del stream
            assert ended == ["ended"]
            assert next(iter(memory.chat("Hello again", stream=True))) == "One"
            assert ended == ["ended", "ended"]
        finally:
            gc.enable()


# ---- what a host may hold ------------------------------------------------------------------------------------------


def left_early(memory: Memory) -> None:
    with memory.chat("What am I allergic to?", stream=True) as stream:
        next(stream)


def failed(memory: Memory) -> None:
    with pytest.raises(Unavailable):
        memory.chat("What am I allergic to?")


@pytest.mark.parametrize(("turn", "reply"), [(left_early, "One two three."), (failed, Unavailable("down"))])
def test_a_host_that_read_an_unfinished_turn_is_on_the_receipt(folder: Path, turn: Any, reply: Any) -> None:
    memory, _ = opened(folder, reply)
    with memory:
        [record] = memory.add("I'm allergic to peanuts.")
        turn(memory)
        assert "hosted:model" in memory.forget(record.id).hosted[0]


def test_a_host_that_reads_a_record_while_it_is_forgotten_is_on_the_receipt(folder: Path) -> None:
    memory, _ = opened(folder, "One two three.")
    with memory:
        [record] = memory.add("I'm allergic to peanuts.")
        with memory.chat("What am I allergic to?", stream=True) as stream:
            next(stream)
            assert "hosted:model" in memory.forget(record.id).hosted[0]
            assert stream.reply.records
        assert memory._engine.database.query("SELECT * FROM lineage WHERE record = ?", (record.id,)) == []


def test_a_host_that_was_primed_is_on_the_receipt(folder: Path) -> None:
    memory, _ = opened(folder)
    with memory:
        ana = memory.scope(user="ana")
        ana.add([f"I always take bus number {n} to my job in district {n}, and I like it." for n in range(60)])
        ana.activation.prime()
        receipt = ana.forget(where={})
        assert receipt.cores
        assert "hosted:model" in receipt.hosted[0]


# ---- the core and the report ---------------------------------------------------------------------------------------


def test_what_no_longer_holds_is_neither_core_nor_context(folder: Path) -> None:
    clock = FakeClock()
    provider = ScriptedProvider("Ok.")
    with Memory(folder, model=provider, embedder="hash", clock=clock) as memory:
        ana = memory.scope(user="ana")
        ana.add([f"I always take bus number {n} to my job in district {n}, and I like it." for n in range(60)])
        ends = clock.datetime().isoformat()
        [old] = ana.add("I live in Lisbon and I always liked my flat there.", valid_until=ends)
        clock.advance(10)
        assert old.id not in {hit.record.id for hit in ana.context(max_tokens=5000).hits}
        ana.chat("Hello")
        assert "Lisbon" not in json.dumps([m.content for m in said(provider.requests[-1])])


def test_a_core_is_chosen_again_in_a_new_session_when_one_of_its_records_ended(folder: Path) -> None:
    clock = FakeClock()
    provider = ScriptedProvider("Ok.")
    with Memory(folder, model=provider, embedder="hash", clock=clock) as memory:
        ana = memory.scope(user="ana")
        clock.advance(100)
        ends = clock.datetime().isoformat()
        clock.advance(-100)
        ana.add(
            [f"I always take bus number {n} to my job in district {n}, I like it." for n in range(60)], valid_until=ends
        )
        ana.chat("Hello")
        first = [s for s in provider.requests[-1].segments if s.name == "core"]
        clock.advance(200)
        ana.chat("And now?")  # a running session's prefix stands still
        assert [s for s in provider.requests[-1].segments if s.name == "core"] == first
        memory.scope(user="ana").chat("Hello again")
        assert [s for s in provider.requests[-1].segments if s.name == "core"] == []


def test_a_scoped_report_tells_nothing_of_other_scopes(folder: Path) -> None:
    memory, _ = opened(folder, "Ok.")
    with memory:
        memory.scope(user="ben").add("ben's")
        report = memory.scope(user="ana").report()
        assert (report.bytes, report.pages, report.loras, report.records) == ({}, 0, 0, 0)
        assert "on disk" not in str(report)
        assert "on disk" in str(memory.report())
        assert memory.report().bytes["records"] > 0


def test_an_update_of_a_record_that_nothing_was_made_from_rewrites_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, _ = opened(folder)
    with memory:
        [record] = memory.add("tea")
        monkeypatch.setattr(memory._engine.database, "scrub", lambda: pytest.fail("the whole index was rewritten"))
        memory.update(record.id, text="coffee")
        assert memory.search("coffee")[0].record.text == "coffee"


# ---- embedders behind a network ------------------------------------------------------------------------------------


class Counting(ScriptedProvider):
    asked = 0

    def embed(self, texts: Any) -> Any:
        self.asked += 1
        return super().embed(texts)


def test_every_use_of_a_hosted_embedder_is_noted_and_none_is_needless(folder: Path) -> None:
    model = Counting("Ok.", name="openai:text-embedding-3-small", capabilities=HOSTED)
    with Memory(folder, model=ScriptedProvider("Ok."), embedder=HostedEmbedder(model.name, model)) as memory:
        [record, _] = memory.add(["one two", "three"])
        assert model.asked == 1
        memory.search("two")
        memory.update(record.id, text="four")
        memory.chat("five?")
        assert model.asked == 5  # add, search, update, and in chat the question and the turn
        lines = {line.verb: line for line in memory.report().lines}
        assert (lines["embed"].uses, lines["embed"].model) == (5, "openai:text-embedding-3-small")
        assert lines["embed"].input_tokens >= 6
        assert lines["embed"].money is not None
        assert lines["chat"].uses == 1
    with Memory(folder, embedder=HostedEmbedder(model.name, model)) as memory:
        memory.search("two")
        assert model.asked == 6


def test_a_search_works_where_its_use_cannot_be_noted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentmem import Full

    model = ScriptedProvider("Ok.", name="hosted:e", capabilities=HOSTED)
    with Memory(folder, embedder=HostedEmbedder(model.name, model)) as memory:
        memory.add("tea")

        def full(*_: object, **__: object) -> None:
            raise Full("no room")

        monkeypatch.setattr(memory._engine.ledger, "note", full)
        assert memory.search("tea")


def test_other_settings_of_one_embedder_are_another_space() -> None:
    model = ScriptedProvider("Ok.", name="openai:text-embedding-3-small", capabilities=HOSTED)
    plain, small = HostedEmbedder(model.name, model), HostedEmbedder(model.name, model, {"embedding_dimensions": 256})
    assert plain.digest != small.digest


def test_on_a_full_disk_a_chat_that_stores_nothing_still_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentmem import Full

    memory, _ = opened(folder, "Ok.", "Ok.", "Ok.")
    with memory:
        memory.add("I like tea")
        memory.chat("Hello")

        def full(*_: object, **__: object) -> None:
            raise Full("no room")

        monkeypatch.setattr(memory._engine.ledger, "note", full)
        monkeypatch.setattr(memory._engine.ledger, "note_shown", full)
        assert memory.chat("What do I like?", remember=False).text == "Ok."
        with pytest.raises(Full):
            memory.chat("Remember this")
        assert len(memory.list()) == 3


def test_a_small_window_is_never_overrun_by_memory(tmp_path: Path) -> None:
    window = 600
    provider = ScriptedProvider("Noted.", capabilities=Capabilities(chat=True, context_tokens=window))
    with Memory(tmp_path / "m", model=provider, embedder="hash") as memory:
        memory.add([f"I always keep fact number {n} about tea in mind, and I like it." for n in range(200)])
        for n in range(40):
            memory.chat(f"Tell me number {n} of all the things about tea that I like, please.")
        for request in provider.requests:
            said = [m.content for segment in request.segments for m in segment.messages]
            assert sum(memory._engine.count(text) for text in said) < window


class Faltering(HashEmbedder):
    """Works until it is told not to."""

    down = False

    def embed(self, texts: Any, *, query: bool = False) -> Any:
        if self.down:
            raise Unavailable("the embedder is down")
        return super().embed(texts, query=query)


def test_a_chat_goes_on_by_words_while_its_embedder_is_down(tmp_path: Path) -> None:
    embedder = Faltering()
    with Memory(tmp_path / "m", model=ScriptedProvider("Noted."), embedder=embedder) as memory:
        [fact] = memory.add("I'm allergic to peanuts.")
        embedder.down = True
        reply = memory.chat("Are there peanuts in it?")
        assert [hit.record for hit in reply.recalled] == [fact]
        assert len(reply.records) == 2
        with pytest.raises(Unavailable):
            memory.search("peanuts")
        embedder.down = False
        assert len(memory.search("peanuts")) == 3
        assert memory.verify().ok
