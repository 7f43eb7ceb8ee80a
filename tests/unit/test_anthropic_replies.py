"""What `adapters/providers/anthropic.py` makes of whole and streamed replies: pure functions, no socket."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from agentmem.types import ToolCall

adapter = importlib.import_module("agentmem.adapters.providers.anthropic")

THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
HIDDEN = {"type": "redacted_thinking", "data": "eA=="}
CALL = {"type": "tool_use", "id": "a", "name": "f", "input": {"n": 1}}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def test_usage_counts_the_whole_prompt() -> None:
    usage = adapter.parse_usage(
        {"input_tokens": 5, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 20, "output_tokens": 3}
    )
    assert usage.input_tokens == 125
    assert (usage.cached_tokens, usage.written_tokens, usage.output_tokens) == (100, 20, 3)


def test_usage_tells_what_is_kept_for_an_hour() -> None:
    split = {"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 15}
    usage = adapter.parse_usage({"input_tokens": 1, "cache_creation_input_tokens": 20, "cache_creation": split})
    assert (usage.written_tokens, usage.written_long_tokens) == (20, 15)
    assert adapter.parse_usage({"cache_creation": split}).written_long_tokens == 0


def test_usage_that_makes_no_sense_is_none() -> None:
    usage = adapter.parse_usage({"input_tokens": float("nan"), "cache_read_input_tokens": -3, "output_tokens": "7"})
    assert (usage.input_tokens, usage.cached_tokens, usage.output_tokens) == (0, 0, 0)


def reply(*blocks: dict[str, Any], **fields: Any) -> Any:
    usage = {"input_tokens": 1, "output_tokens": 1}
    return adapter.parse_reply({"id": "msg_1", "content": blocks, "stop_reason": "tool_use", "usage": usage, **fields})


def test_what_the_vendor_wants_back_is_kept_where_a_tool_is_called() -> None:
    said = text("Wait.")
    assert reply(THOUGHT, HIDDEN, said, CALL).blocks == (THOUGHT, HIDDEN)
    assert reply(THOUGHT, said, HIDDEN, CALL).blocks == (THOUGHT, said, HIDDEN, CALL)
    assert reply(THOUGHT, text(""), HIDDEN, CALL).blocks == (THOUGHT, HIDDEN, CALL)
    assert reply(said, CALL).blocks == ()
    assert reply(THOUGHT, said, stop_reason="end_turn").blocks == ()


def test_the_answers_name_is_kept_for_the_next_diagnosis() -> None:
    assert reply(text("Hi")).id == "msg_1"
    assert reply(text("Hi"), diagnostics={"cache_miss_reason": None}).miss is None
    assert reply(text("Hi"), diagnostics={"cache_miss_reason": {"type": "unavailable"}}).miss == "unavailable"


def test_a_refusal_says_why() -> None:
    refused = reply(stop_reason="refusal", stop_details={"type": "refusal", "explanation": "I may not."})
    assert (refused.text, refused.finish_reason) == ("I may not.", "content_filter")
    assert reply(stop_reason="refusal", stop_details=None).text == ""
    assert reply(text("So"), stop_reason="model_context_window_exceeded").finish_reason == "length"


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"content": None},
        {"content": [{"text": "no type"}]},
        {"content": [{"type": "text"}]},
        {"content": [{"type": "tool_use", "id": "a"}]},
        {"content": "text"},
        {"usage": [1]},
        {"diagnostics": [1]},
        {"stop_reason": None},
    ],
)
def test_what_is_no_message_is_an_error(payload: dict[str, Any]) -> None:
    whole = {"content": [{"type": "text", "text": "Hi"}], "stop_reason": "end_turn", "usage": {}}
    assert adapter.parse_reply(whole).text == "Hi"
    with pytest.raises((AttributeError, LookupError, TypeError, ValueError)):
        adapter.parse_reply({**whole, **payload} if payload else {})


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
    assert (reply.text, reply.finish_reason) == ("Wait.", "tool_calls")
    assert reply.miss == "tools_changed (about 9 tokens missed)"
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


def streamed(*events: dict[str, Any], stopped: str = "end_turn", **delta: Any) -> tuple[list[str], Any]:
    start = {"type": "message_start", "message": {"id": "msg_1", "usage": {"input_tokens": 2}, "diagnostics": None}}
    end = {"type": "message_delta", "delta": {"stop_reason": stopped, **delta}, "usage": {"output_tokens": 3}}
    reader = adapter.Reader()
    pieces = [reader.add(event) for event in (start, *events, end, {"type": "message_stop"})]
    return [piece for piece in pieces if piece], reader.end()


def block(index: int, start: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": start},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def test_streamed_thoughts_are_whole_and_not_shown() -> None:
    events = [
        *block(
            0,
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "thinking_delta", "thinking": "h"},
            {"type": "thinking_delta", "thinking": "m"},
            {"type": "signature_delta", "signature": "c2ln"},
        ),
        *block(1, HIDDEN),
        *block(2, {"type": "text", "text": ""}, {"type": "text_delta", "text": "Wait."}),
        *block(3, {**CALL, "input": {}}, {"type": "input_json_delta", "partial_json": '{"n": 1}'}),
    ]
    pieces, whole = streamed(*events, stopped="tool_use")
    assert (pieces, whole.id) == (["Wait."], "msg_1")
    assert whole.blocks == (THOUGHT, HIDDEN)


def test_a_streamed_call_with_broken_arguments_keeps_them() -> None:
    _, whole = streamed(*block(0, {**CALL, "input": {}}, {"type": "input_json_delta", "partial_json": '{"n": '}))
    assert whole.tool_calls[0].arguments == {"_raw": '{"n": '}


def test_unknown_events_and_deltas_are_passed_over() -> None:
    odd = block(
        0, {"type": "text", "text": "A"}, {"type": "text_delta", "text": "b"}, {"type": "colour_delta", "hue": 3}
    )
    cited = {"type": "citations_delta", "citation": {"type": "char_location"}}
    pieces, whole = streamed({"type": "ping"}, *odd, {"type": "news"}, *block(1, {"type": "text", "text": ""}, cited))
    assert (pieces, whole.text) == (["A", "b"], "Ab")


def test_a_streamed_refusal_says_why_once() -> None:
    details = {"type": "refusal", "explanation": "I may not."}
    pieces, whole = streamed(stopped="refusal", stop_details=details)
    assert (pieces, whole.text, whole.finish_reason) == (["I may not."], "I may not.", "content_filter")
    begun = block(0, {"type": "text", "text": "So"})
    pieces, whole = streamed(*begun, stopped="refusal", stop_details=details)
    assert (pieces, whole.text) == (["So"], "So")


def test_a_part_that_never_began_is_an_error() -> None:
    with pytest.raises(LookupError):
        adapter.Reader().add({"type": "content_block_delta", "index": 4, "delta": {"type": "text_delta", "text": "x"}})


def test_a_stream_without_its_last_event_was_cut() -> None:
    reader = adapter.Reader()
    for event in STREAM[:-1]:
        reader.add(event)
    assert reader.end() is None
