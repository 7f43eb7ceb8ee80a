"""However a conversation grows and wherever it is marked, what OpenAI's formats send begins with what they sent."""

from __future__ import annotations

import importlib
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.cache_rules import rules_for
from agentmem.provider import CachePlan, Mark, Request
from agentmem.types import Image, Message, Segment, ToolCall

chat = importlib.import_module("agentmem.adapters.providers._openai_chat")
responses = importlib.import_module("agentmem.adapters.providers._openai_responses")
hosts = importlib.import_module("agentmem.adapters.providers._openai_hosts")

NAME = "openai:gpt-5.6-sol"
NEW = hosts.Served(model="gpt-5.6-sol", name=NAME, host=hosts.OPENAI, rules=rules_for(NAME))
OTHER = hosts.Served(model="m", name="openai_compatible:m")
WORDS = st.text("aü☃\n ", max_size=8)
THOUGHT = {"type": "reasoning", "id": "rs", "encrypted_content": "x"}


@st.composite
def exchanges(draw: st.DrawFn, number: int) -> list[Message]:
    """A user's message and the answer to it, perhaps with a tool's result between them."""
    image = Image(url="https://example.org/a.png")
    asked = Message(role="user", content=draw(WORDS) or "x", images=draw(st.sampled_from([(), (image,)])))
    said = [asked]
    if draw(st.booleans()):
        call = ToolCall(id=f"c{number}", name="f", arguments=draw(st.dictionaries(WORDS, st.integers(), max_size=3)))
        blocks = draw(st.sampled_from([(), (THOUGHT, {"type": "function_call", "call_id": call.id})]))
        wanted = Message(role="assistant", content=draw(WORDS), tool_calls=(call,), blocks=blocks, blocks_of=NAME)
        said += [wanted, Message(role="tool", content=draw(WORDS), tool_call_id=call.id)]
    return [*said, Message(role="assistant", content=draw(WORDS) or "y")]


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    parts = [draw(exchanges(number)) for number in range(draw(st.integers(1, 5)))]
    return [Message(role="system", content="S"), *(message for part in parts for message in part)]


def request(messages: list[Message], marks: list[int]) -> Request:
    plan = CachePlan(marks=tuple(Mark(messages=mark, lifetime=("12h", None)[mark % 2]) for mark in sorted(marks)))
    return Request(segments=(Segment(name="history", messages=tuple(messages), stable=True),), cache=plan)


def bare(value: Any) -> Any:
    """Without the breakpoints."""
    if isinstance(value, dict):
        return {key: bare(inner) for key, inner in value.items() if key != "prompt_cache_breakpoint"}
    return [bare(inner) for inner in value] if isinstance(value, list) else value


@settings(deadline=None, max_examples=150)
@given(st.data(), conversations())
def test_a_longer_conversation_begins_with_the_shorter_ones_bytes(data: st.DataObject, said: list[Message]) -> None:
    ends = [at + 1 for at, message in enumerate(said) if message.role == "assistant" and not message.tool_calls]
    shorter = said[: data.draw(st.sampled_from(ends))]
    marks = st.lists(st.integers(0, len(said) + 1), max_size=6)
    for build, field, served in (
        (responses.build_request, "input", NEW),
        (chat.build_request, "messages", NEW),
        (chat.build_request, "messages", OTHER),
    ):
        bodies = [build(request(messages, data.draw(marks)), served) for messages in (shorter, said)]
        first, second = (bare(body[field]) for body in bodies)
        assert json.dumps(second[: len(first)]) == json.dumps(first)


@settings(deadline=None, max_examples=150)
@given(conversations(), st.lists(st.integers(0, 20), max_size=8))
def test_breakpoints_stand_only_where_the_host_takes_them(said: list[Message], marks: list[int]) -> None:
    for build, field in ((responses.build_request, "input"), (chat.build_request, "messages")):
        found = []
        for item in build(request(said, marks), NEW)[field]:
            content = item.get("content", item.get("output"))
            parts = content if isinstance(content, list) else []
            assert "prompt_cache_breakpoint" not in json.dumps(parts[:-1])  # only on the last part
            found += [item for part in parts if "prompt_cache_breakpoint" in part]
        assert len(found) <= 4
        assert field == "messages" or all(item.get("role") != "assistant" for item in found)
        assert found or not [mark for mark in marks if mark > 0]
