"""What `adapters/providers/anthropic.py` makes of requests and replies: pure functions, no socket."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from agentmem.errors import ConfigError
from agentmem.provider import Options, Request, load
from agentmem.testing import chat_request
from agentmem.types import Message, Segment, ToolCall

adapter = importlib.import_module("agentmem.adapters.providers.anthropic")

MARK = {"type": "ephemeral"}


def text(value: str, *, marked: bool = False) -> dict[str, Any]:
    return {"type": "text", "text": value, **({"cache_control": MARK} if marked else {})}


def four_segments(**fields: Any) -> Request:
    exchange = (Message(role="user", content="Facts."), Message(role="assistant", content="Noted."))
    history = (Message(role="user", content="Hi", name="Ana"), Message(role="assistant", content="Hello"))
    return Request(
        segments=(
            Segment(name="system", messages=(Message(role="system", content="Be kind."),), stable=True),
            Segment(name="core", messages=exchange, stable=True),
            Segment(name="history", messages=history, stable=True),
            Segment(name="turn", messages=(Message(role="user", content="Now?"),), stable=False),
        ),
        **fields,
    )


def test_each_stable_segment_ends_with_a_marker_and_the_turn_with_none() -> None:
    body = adapter.build_request(four_segments(), model="claude")
    assert body["system"] == [text("Be kind.", marked=True)]
    assert body["messages"] == [
        {"role": "user", "content": [text("Facts.")]},
        {"role": "assistant", "content": [text("Noted.", marked=True)]},
        {"role": "user", "content": [text("Ana: Hi")]},
        {"role": "assistant", "content": [text("Hello", marked=True)]},
        {"role": "user", "content": [text("Now?")]},
    ]


def test_there_are_never_more_markers_than_the_api_takes() -> None:
    one = Segment(name="history", messages=(Message(role="user", content="x"),), stable=True)
    body = adapter.build_request(Request(segments=(one,) * 7), model="claude")
    marked = ["cache_control" in message["content"][-1] for message in body["messages"]]
    assert marked == [False] * 3 + [True] * 4


def test_options_are_mapped_and_extra_comes_last() -> None:
    options = Options(temperature=0.0, top_p=0.5, seed=3, stop=("END",), extra={"top_k": 4, "max_tokens": 9})
    body = adapter.build_request(four_segments(options=options), model="claude", stream=True)
    expected = {
        "temperature": 0.0,
        "top_p": 0.5,
        "stop_sequences": ["END"],
        "top_k": 4,
        "max_tokens": 9,
        "stream": True,
    }
    assert expected.items() <= body.items()
    assert "seed" not in body


@pytest.mark.parametrize(("asked", "sent"), [(None, 1024), (0, 0), (7, 7)])
def test_a_limit_is_always_sent(asked: int | None, sent: int) -> None:
    assert adapter.build_request(chat_request("Hi", max_tokens=asked), model="claude")["max_tokens"] == sent


def test_results_of_one_answers_calls_stand_in_one_message() -> None:
    calls = (ToolCall(id="a", name="f", arguments={"n": 1}), ToolCall(id="b", name="f"))
    messages = (
        Message(role="assistant", content="", tool_calls=calls),
        Message(role="tool", content="one", tool_call_id="a"),
        Message(role="tool", content="two", tool_call_id="b"),
    )
    request = Request(segments=(Segment(name="turn", messages=messages, stable=False),))
    asked, answered = adapter.build_request(request, model="claude")["messages"]
    assert asked["content"] == [
        {"type": "tool_use", "id": "a", "name": "f", "input": {"n": 1}},
        {"type": "tool_use", "id": "b", "name": "f", "input": {}},
    ]
    assert answered["role"] == "user"
    assert [block["tool_use_id"] for block in answered["content"]] == ["a", "b"]


def test_a_later_system_message_is_fenced_text_and_empty_text_is_left_out() -> None:
    messages = (
        Message(role="user", content="Hi"),
        Message(role="assistant", content=" "),
        Message(role="system", content="Note."),
    )
    request = Request(segments=(Segment(name="turn", messages=messages, stable=False),))
    body = adapter.build_request(request, model="claude")
    assert "system" not in body
    assert [message["content"] for message in body["messages"]] == [
        [text("Hi")],
        [text("<system>\nNote.\n</system>")],
    ]


def test_tools_are_translated() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    own = {"type": "web_search_20250305", "name": "web_search"}
    body = adapter.build_request(four_segments(tools=(tool, own)), model="claude")
    assert body["tools"] == [{"name": "f", "description": "d", "input_schema": {"type": "object"}}, own]


def test_usage_counts_the_whole_prompt() -> None:
    usage = adapter.parse_usage(
        {"input_tokens": 5, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 20, "output_tokens": 3}
    )
    assert usage.input_tokens == 125
    assert (usage.cached_tokens, usage.written_tokens, usage.output_tokens) == (100, 20, 3)


def test_a_reply_with_a_call_and_a_miss_reason() -> None:
    reply = adapter.parse_reply(
        {
            "content": [
                {"type": "thinking", "thinking": "hm"},
                {"type": "text", "text": "Wait."},
                {"type": "tool_use", "id": "a", "name": "f", "input": {"n": 1}},
            ],
            "stop_reason": "tool_use",
            "usage": {"input_tokens": 1, "output_tokens": 1},
            "diagnostics": {"cache_miss_reason": {"type": "tools_changed", "cache_missed_input_tokens": 9}},
        }
    )
    assert (reply.text, reply.finish_reason, reply.miss) == ("Wait.", "tool_calls", "tools_changed")
    assert reply.tool_calls == (ToolCall(id="a", name="f", arguments={"n": 1}),)


STREAM: list[dict[str, Any]] = [
    {
        "type": "message_start",
        "message": {"usage": {"input_tokens": 2, "cache_read_input_tokens": 8, "output_tokens": 1}},
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Wa"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "it"}},
    {"type": "content_block_stop", "index": 0},
    {
        "type": "content_block_start",
        "index": 1,
        "content_block": {"type": "tool_use", "id": "a", "name": "f", "input": {}},
    },
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"n"'}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": ": 1}"}},
    {
        "type": "content_block_start",
        "index": 2,
        "content_block": {"type": "tool_use", "id": "b", "name": "g", "input": {}},
    },
    {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use"},
        "usage": {"output_tokens": 30, "input_tokens": None},
    },
    {"type": "message_stop"},
]


def test_a_stream_gives_what_the_whole_reply_would() -> None:
    reader = adapter.Reader()
    assert "".join(reader.add(event) for event in STREAM) == "Wait"
    whole = reader.end()
    assert (whole.text, whole.finish_reason) == ("Wait", "tool_calls")
    assert [(c.id, c.name, c.arguments) for c in whole.tool_calls] == [("a", "f", {"n": 1}), ("b", "g", {})]
    assert (whole.usage.input_tokens, whole.usage.cached_tokens, whole.usage.output_tokens) == (10, 8, 30)


def test_a_stream_without_its_last_event_was_cut() -> None:
    reader = adapter.Reader()
    for event in STREAM[:-1]:
        reader.add(event)
    assert reader.end() is None


def test_a_missing_key_names_the_way_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="model='local'"):
        load("anthropic:claude", {})


def test_it_has_no_embeddings_and_says_so() -> None:
    provider = load("anthropic:claude", {"api_key": "k"})
    assert provider.capabilities.kv == "breakpoints"
    assert provider.capabilities.holds_prefix_s == 300
    with pytest.raises(ConfigError, match="embeddings"):
        provider.embed(["a"])
    with pytest.raises(ConfigError, match="embeddings"):
        provider.embed([])
