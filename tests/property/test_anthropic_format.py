"""Anthropic's format over any request and any way of cutting a stream: what must hold whatever comes."""

from __future__ import annotations

import importlib
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.provider import CachePlan, Mark, Request
from agentmem.types import Message, Segment, ToolCall

adapter = importlib.import_module("agentmem.adapters.providers.anthropic")

TEXTS = st.text(max_size=12)
CALLS = st.builds(
    ToolCall, id=st.sampled_from("abc"), name=st.just("f"), arguments=st.dictionaries(TEXTS, st.integers())
)
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
MESSAGES = st.one_of(
    st.builds(Message, role=st.sampled_from(["system", "user"]), content=TEXTS),
    st.builds(
        Message,
        role=st.just("assistant"),
        content=TEXTS,
        tool_calls=st.lists(CALLS, max_size=2).map(tuple),
        blocks=st.sampled_from([(), (THOUGHT,)]),
        blocks_of=st.just("anthropic:claude"),
    ),
    st.builds(Message, role=st.just("tool"), content=TEXTS, tool_call_id=st.sampled_from("abc")),
)
LIFETIMES = st.sampled_from([None, "5m", "1h"])


def marked(body: Any) -> list[dict[str, Any]]:
    """Every marker, in the order of the prompt."""
    blocks = [*body.get("tools", ()), *body.get("system", ()), *(b for m in body["messages"] for b in m["content"])]
    assert not any("cache_control" in block for block in blocks if block.get("type") == "thinking")
    return [block.pop("cache_control") for block in blocks if "cache_control" in block]


@given(st.lists(MESSAGES, max_size=8), st.booleans(), st.data())
@settings(max_examples=150)
def test_marks_are_at_most_four_sorted_and_change_no_other_byte(
    messages: list[Message], with_tools: bool, data: st.DataObject
) -> None:
    tools = ({"name": "f", "parameters": {"type": "object"}},) if with_tools else ()
    segment = Segment(name="history", messages=tuple(messages), stable=True)
    places = sorted(data.draw(st.lists(st.integers(0, len(messages)), max_size=6)))
    plan = CachePlan(marks=tuple(Mark(messages=at, lifetime=data.draw(LIFETIMES)) for at in places))
    bare = adapter.build_request(Request(segments=(segment,), tools=tools, cache=CachePlan()), model="claude")
    body = adapter.build_request(Request(segments=(segment,), tools=tools, cache=plan), model="claude")
    found = [marker.get("ttl", "5m") for marker in marked(body)]
    assert len(found) <= min(4, len(set(places)))
    assert found == sorted(found)  # "1h" before "5m"
    assert json.dumps(body) == json.dumps(bare)


PARTS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, TEXTS),
    st.builds(lambda text: {"type": "thinking", "thinking": text, "signature": "c2ln"}, TEXTS),
    st.just({"type": "redacted_thinking", "data": "eA=="}),
    st.builds(
        lambda given: {"type": "tool_use", "id": "a", "name": "f", "input": given},
        st.dictionaries(TEXTS, st.integers(), max_size=2),
    ),
)


def deltas(part: dict[str, Any], cut: int) -> list[dict[str, Any]]:
    """The part as the vendor streams it: empty at first, then in pieces of ``cut`` characters."""
    kind = part["type"]
    field, whole = {
        "text": ("text", part.get("text")),
        "thinking": ("thinking", part.get("thinking")),
        "tool_use": ("partial_json", json.dumps(part.get("input"))),
    }.get(kind, ("", ""))
    pieces = [whole[at : at + cut] for at in range(0, len(whole or ""), cut)] if whole else []
    empty: dict[str, dict[str, Any]] = {
        "text": {"text": ""},
        "thinking": {"thinking": "", "signature": ""},
        "tool_use": {"input": {}},
    }
    delta = "input_json_delta" if kind == "tool_use" else f"{field}_delta"
    grown = [{"type": delta, field: piece} for piece in pieces]
    if kind == "thinking":
        grown.append({"type": "signature_delta", "signature": part["signature"]})
    return [{**part, **empty.get(kind, {})}, *grown]


@given(st.lists(PARTS, max_size=5), st.integers(1, 5))
@settings(max_examples=150)
def test_a_stream_is_the_whole_however_it_is_cut(parts: list[dict[str, Any]], cut: int) -> None:
    usage = {"input_tokens": 3, "cache_read_input_tokens": 5, "output_tokens": 7}
    whole = {"id": "msg_1", "content": parts, "stop_reason": "tool_use", "usage": usage}
    reader = adapter.Reader()
    pieces = [reader.add({"type": "message_start", "message": {**whole, "content": [], "stop_reason": None}})]
    for index, part in enumerate(parts):
        start, *grown = deltas(part, cut)
        pieces.append(reader.add({"type": "content_block_start", "index": index, "content_block": start}))
        pieces += [reader.add({"type": "content_block_delta", "index": index, "delta": delta}) for delta in grown]
    reader.add({"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 7}})
    reader.add({"type": "message_stop"})
    expected = adapter.parse_reply(whole)
    assert reader.end() == expected
    assert "".join(pieces) == expected.text
