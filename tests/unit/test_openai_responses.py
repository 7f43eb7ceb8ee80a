"""What `_openai_responses.py` makes of requests, replies and streams: pure functions, no socket."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from typing import Any

import pytest

from agentmem.cache_rules import rules_for
from agentmem.errors import InvalidInput, RateLimited, Rejected, Unavailable
from agentmem.provider import CachePlan, Mark, Options, Request
from agentmem.testing import chat_request
from agentmem.types import Image, Message, Segment, ToolCall

adapter = importlib.import_module("agentmem.adapters.providers._openai_responses")
hosts = importlib.import_module("agentmem.adapters.providers._openai_hosts")

CALL = ToolCall(id="c1", name="look_up", arguments={"city": "Zürich"})
TOOL = {"name": "look_up", "description": "d", "parameters": {"type": "object", "properties": {}}}
PICTURE = Image(data="aGk=", media_type="image/png")
MARK = {"mode": "explicit"}


def served(model: str = "gpt-5.6-sol", **facts: Any) -> Any:
    name = f"openai:{model}"
    return hosts.Served(model=model, name=name, host=hosts.OPENAI, rules=rules_for(name), **facts)


def turn(*messages: Message, **fields: Any) -> Request:
    return Request(segments=(Segment(name="turn", messages=messages, stable=False),), **fields)


def conversation(**fields: Any) -> Request:
    """System, core, a history that ends with the model's words, and a new turn."""
    said = [("system", "system", "Be kind."), ("core", "user", "facts"), ("history", "user", "Hi")]
    segments = [Segment(name=n, messages=(Message(role=r, content=t),), stable=True) for n, r, t in said]  # type: ignore[arg-type]
    answered = Message(role="assistant", content="Hello.")
    segments[2] = segments[2].model_copy(update={"messages": (*segments[2].messages, answered)})
    segments.append(Segment(name="turn", messages=(Message(role="user", content="Now?"),), stable=False))
    return Request(segments=tuple(segments), cache_key="k", **fields)


def marked(body: dict[str, Any]) -> dict[int, Any]:
    """The breakpoints of a body, by the position of their item."""
    found = {}
    for at, item in enumerate(body["input"]):
        parts = item.get("content") or item.get("output")
        for part in parts if isinstance(parts, list) else ():
            if "prompt_cache_breakpoint" in part:
                found[at] = part["prompt_cache_breakpoint"]
    return found


def test_the_conversation_is_sent_whole_and_nothing_is_stored() -> None:
    body = adapter.build_request(conversation(), served("gpt-4o"))
    assert body == {
        "model": "gpt-4o",
        "store": False,
        "prompt_cache_key": "k",
        "input": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "facts"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Now?"},
        ],
    }


def test_without_a_plan_the_end_of_every_stable_segment_is_marked_for_the_shortest_time() -> None:
    body = adapter.build_request(conversation(), served())
    assert body["prompt_cache_options"] == {"mode": "explicit"}
    assert marked(body) == {0: MARK, 1: MARK, 2: MARK}  # the history's last item can't hold one: the one before it does
    assert body["input"][3] == {"role": "assistant", "content": "Hello."}


def test_a_plan_says_what_is_marked_and_for_how_long() -> None:
    plan = CachePlan(marks=(Mark(messages=1, lifetime="12h"), Mark(messages=3, lifetime="30m")))
    body = adapter.build_request(conversation(cache=plan), served())
    assert marked(body) == {0: {**MARK, "ttl": "12h"}, 2: {**MARK, "ttl": "30m"}}


def test_a_plan_without_marks_has_nothing_written() -> None:
    body = adapter.build_request(conversation(cache=CachePlan()), served())
    assert body["prompt_cache_options"] == {"mode": "explicit"}
    assert marked(body) == {}


def test_marks_that_meet_are_one_for_the_longer_time_and_only_the_latest_four_are_sent() -> None:
    both = CachePlan(marks=(Mark(messages=3, lifetime="12h"), Mark(messages=4, lifetime="30m")))
    assert marked(adapter.build_request(conversation(cache=both), served())) == {2: {**MARK, "ttl": "12h"}}
    said = tuple(Message(role="user", content=str(n)) for n in range(6))
    six = turn(*said, cache=CachePlan(marks=tuple(Mark(messages=n + 1) for n in range(6))))
    assert sorted(marked(adapter.build_request(six, served()))) == [2, 3, 4, 5]


def test_only_the_breakpoints_differ_between_requests_of_one_prefix() -> None:
    def bare(body: dict[str, Any]) -> str:
        for item in body["input"]:
            for part in item["content"] if isinstance(item["content"], list) else ():
                part.pop("prompt_cache_breakpoint", None)
        return json.dumps(body["input"])

    plans = [None, CachePlan(), CachePlan(marks=(Mark(messages=2),)), CachePlan(marks=(Mark(messages=5),))]
    assert len({bare(adapter.build_request(conversation(cache=plan), served())) for plan in plans}) == 1


def test_an_older_model_is_sent_no_field_of_the_newer_cache() -> None:
    plan = CachePlan(marks=(Mark(messages=1),), previous="resp_1", diagnose=True)
    text = json.dumps(adapter.build_request(conversation(cache=plan), served("gpt-5.1")))
    assert "prompt_cache_key" in text
    assert "prompt_cache_options" not in text
    assert "breakpoint" not in text


def test_cache_fields_may_be_turned_off() -> None:
    assert "prompt_cache" not in json.dumps(adapter.build_request(conversation(), served(cache_fields=False)))


def test_a_diagnosis_is_asked_for_where_the_plan_asks() -> None:
    asked = adapter.build_request(conversation(cache=CachePlan(previous="resp_1", diagnose=True)), served())
    not_asked = adapter.build_request(conversation(cache=CachePlan(previous="resp_1")), served())
    assert asked["prompt_cache_options"]["comparison_response_id"] == "resp_1"
    assert "comparison_response_id" not in not_asked["prompt_cache_options"]


def test_prefill_prewarms_where_the_host_can_and_else_asks_for_the_least_answer() -> None:
    prefill = Options(max_tokens=0)
    new = adapter.build_request(conversation(options=prefill), served())
    old = adapter.build_request(conversation(options=prefill), served("gpt-4o"))
    assert new["prompt_cache_options"] == {"mode": "explicit", "prewarm": True}
    assert "max_output_tokens" not in new
    assert old["max_output_tokens"] == 16


def test_options_are_sent_where_the_model_takes_them() -> None:
    options = Options(max_tokens=50, temperature=0.2, top_p=0.5, seed=3, extra={"metadata": {"a": "b"}})
    old = adapter.build_request(conversation(options=options), served("gpt-4o"))
    expected = {"max_output_tokens": 50, "temperature": 0.2, "top_p": 0.5, "metadata": {"a": "b"}}
    assert expected.items() <= old.items()
    assert "seed" not in old
    reasoning = adapter.build_request(conversation(options=options), served())
    assert not {"temperature", "top_p"} & reasoning.keys()
    calm = replace(options, extra={"reasoning": {"effort": "none"}})
    assert adapter.build_request(conversation(options=calm), served())["temperature"] == 0.2


def test_chat_completions_words_for_reasoning_and_verbosity_are_understood() -> None:
    told = {"reasoning_effort": "none", "verbosity": "low", "reasoning": {"summary": "auto"}}
    body = adapter.build_request(chat_request("Hi", schema={"type": "object"}, temperature=0.1, extra=told), served())
    assert body["reasoning"] == {"effort": "none", "summary": "auto"}
    assert (body["text"]["verbosity"], body["text"]["format"]["type"], body["temperature"]) == (
        "low",
        "json_schema",
        0.1,
    )
    assert not {"reasoning_effort", "verbosity"} & body.keys()


def test_stop_texts_are_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="api = 'chat'"):
        adapter.build_request(conversation(options=Options(stop=("END",))), served())


def test_tools_calls_and_results_are_items() -> None:
    request = turn(
        Message(role="user", content="Weather?", name="Ana"),
        Message(role="assistant", content="I look.", tool_calls=(CALL,)),
        Message(role="tool", content="rain", tool_call_id="c1", images=(PICTURE,)),
        tools=(TOOL,),
    )
    body = adapter.build_request(request, served("gpt-4o"))
    shown = {"type": "input_image", "detail": "auto", "image_url": "data:image/png;base64,aGk="}
    assert body["input"] == [
        {"role": "user", "content": "Ana: Weather?"},
        {"role": "assistant", "content": "I look."},
        {"type": "function_call", "call_id": "c1", "name": "look_up", "arguments": '{"city":"Zürich"}'},
        {"type": "function_call_output", "call_id": "c1", "output": [shown, {"type": "input_text", "text": "rain"}]},
    ]
    assert body["tools"] == [{"type": "function", "strict": False, **TOOL}]
    assert "include" not in body
    assert adapter.build_request(request, served("o3"))["include"] == ["reasoning.encrypted_content"]


def test_an_image_stands_before_the_text_and_only_where_it_is_read() -> None:
    body = adapter.build_request(turn(Message(role="user", content="What?", images=(PICTURE,))), served())
    assert [part["type"] for part in body["input"][0]["content"]] == ["input_image", "input_text"]
    with pytest.raises(InvalidInput, match="assistant"):
        adapter.build_request(turn(Message(role="assistant", content="x", images=(PICTURE,))), served())
    with pytest.raises(InvalidInput, match="url"):
        adapter.build_request(turn(Message(role="user", content="x", images=(Image(),))), served())


THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
CALLED = {
    "id": "resp_1",
    "status": "completed",
    "output": [
        {**THOUGHT, "status": None},
        {
            "type": "message",
            "role": "assistant",
            "phase": "commentary",
            "content": [{"type": "output_text", "text": "I look."}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "look_up", "arguments": '{"city": "Zürich"}'},
    ],
    "usage": {"input_tokens": 10, "output_tokens": 5},
}


def test_reasoning_goes_back_to_the_model_that_wrote_it_where_it_stood() -> None:
    answer = adapter.parse_reply(CALLED)
    assert (answer.text, answer.tool_calls, answer.finish_reason, answer.id) == (
        "I look.",
        (CALL,),
        "tool_calls",
        "resp_1",
    )
    said = Message(
        role="assistant",
        content=answer.text,
        tool_calls=answer.tool_calls,
        blocks=answer.blocks,
        blocks_of="openai:gpt-5.6-sol",
    )
    result = Message(role="tool", content="rain", tool_call_id="c1")
    items = adapter.build_request(turn(said, result), served())["input"]
    assert items[:2] == [THOUGHT, {"role": "assistant", "content": "I look.", "phase": "commentary"}]
    assert [item["type"] for item in items[2:]] == ["function_call", "function_call_output"]
    other = adapter.build_request(turn(said, result), served("gpt-4o"))["input"]
    assert [item.get("type", "message") for item in other] == ["message", "function_call", "function_call_output"]


def test_blocks_hold_none_of_the_models_words_and_no_call_that_was_dropped_comes_back() -> None:
    answer = adapter.parse_reply(CALLED)
    assert "I look" not in json.dumps(answer.blocks)
    assert "Zürich" not in json.dumps(answer.blocks)
    forgotten = Message(role="assistant", content="I look.", blocks=answer.blocks, blocks_of="openai:gpt-5.6-sol")
    assert adapter.build_request(turn(forgotten), served())["input"] == [{"role": "assistant", "content": "I look."}]


def test_plain_answers_leave_no_blocks() -> None:
    said = {"type": "message", "content": [{"type": "output_text", "text": "Hi"}]}
    assert adapter.parse_reply({"output": [THOUGHT, said], "usage": {}}).blocks == ()


@pytest.mark.parametrize(
    ("part", "more", "finish"),
    [
        ({"type": "output_text", "text": "x"}, {}, "stop"),
        ({"type": "output_text", "text": "x"}, {"incomplete_details": {"reason": "max_output_tokens"}}, "length"),
        ({"type": "output_text", "text": "x"}, {"incomplete_details": {"reason": "content_filter"}}, "content_filter"),
        ({"type": "output_text", "text": "x"}, {"status": "cancelled"}, "cancelled"),
        ({"type": "refusal", "refusal": "x"}, {}, "content_filter"),
    ],
)
def test_how_an_answer_ended_is_told_in_the_usual_words(part: Any, more: dict[str, Any], finish: str) -> None:
    answer = adapter.parse_reply({"output": [{"type": "message", "content": [part]}], **more})
    assert (answer.text, answer.finish_reason) == ("x", finish)


def test_usage_tells_what_was_read_and_written_and_for_how_long() -> None:
    details = {
        "cached_tokens": 1024,
        "cache_write_tokens": 500,
        "cache_write_tokens_details": {"ttl_30m_tokens": 200, "ttl_12h_tokens": 300},
    }
    usage = adapter.parse_reply(
        {"output": [], "usage": {"input_tokens": 2000, "input_tokens_details": details, "output_tokens": 7}}
    ).usage
    assert (usage.input_tokens, usage.cached_tokens, usage.written_tokens) == (2000, 1024, 500)
    assert (usage.written_long_tokens, usage.output_tokens) == (300, 7)


@pytest.mark.parametrize(
    ("diagnosis", "miss"),
    [
        (None, None),
        ({"type": "cache_hit"}, None),
        ({"type": "unavailable"}, None),
        ({"type": "comparison_response_not_found"}, "comparison_response_not_found"),
        (
            {"type": "cache_miss", "reason": "tools_changed", "cache_missed_tokens": 1500},
            "tools_changed (1500 tokens missed)",
        ),
        ({"type": "cache_miss", "reason": "input_changed"}, "input_changed"),
    ],
)
def test_the_hosts_reason_for_a_miss_is_kept(diagnosis: Any, miss: str | None) -> None:
    assert adapter.parse_reply({"output": [], "prompt_cache_diagnostics": diagnosis}).miss == miss


@pytest.mark.parametrize(
    ("code", "kind"),
    [("server_error", Unavailable), ("rate_limit_exceeded", RateLimited), ("invalid_prompt", Rejected)],
)
def test_a_failed_response_is_the_error_it_tells_of(code: str, kind: type[Exception]) -> None:
    failed = {"id": "r", "status": "failed", "error": {"code": code, "message": "no luck"}, "output": []}
    with pytest.raises(kind, match=r"openai:gpt-5\.6-sol answered \d+: no luck"):
        adapter.parse_reply(failed, served())
    reader = adapter.Reader()
    reader.add({"type": "response.failed", "response": failed})
    with pytest.raises(kind, match="no luck"):
        reader.end()


def test_an_error_event_ends_a_stream() -> None:
    with pytest.raises(Unavailable, match="overloaded"):
        adapter.Reader().add({"type": "error", "code": "server_error", "message": "overloaded"})


def streamed(*, whole: bool) -> list[dict[str, Any]]:
    output = CALLED["output"]
    assert isinstance(output, list)
    events: list[dict[str, Any]] = [{"type": "response.created", "response": {"id": "resp_1", "output": []}}]
    events += [{"type": "response.output_text.delta", "delta": piece} for piece in ("I ", "look.")]
    events += [
        {"type": "response.output_item.done", "output_index": at, "item": item} for at, item in enumerate(output)
    ]
    ended = CALLED if whole else {**CALLED, "output": []}
    return [*events, {"type": "response.completed", "response": ended}]


@pytest.mark.parametrize("whole", [True, False])
def test_a_stream_gives_what_the_whole_reply_gives(whole: bool) -> None:
    reader = adapter.Reader(served())
    assert [piece for event in streamed(whole=whole) if (piece := reader.add(event))] == ["I ", "look."]
    assert reader.end() == adapter.parse_reply(CALLED, served())


def test_a_stream_without_its_last_event_was_cut() -> None:
    reader = adapter.Reader()
    for event in streamed(whole=True)[:-1]:
        reader.add(event)
    assert reader.end() is None


def test_a_schema_is_followed_strictly_where_it_can_be() -> None:
    schema = {"title": "A fact!", "type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
    options = Options(schema=schema)
    text = adapter.build_request(chat_request("Hi", schema=options.schema), served())["text"]["format"]
    assert (text["type"], text["name"], text["strict"]) == ("json_schema", "A_fact", True)
    assert (list(text["schema"]["properties"]), text["schema"]["required"]) == (["b", "a"], ["b", "a"])
    brief = chat_request("Hi", schema=schema, extra={"text": {"verbosity": "low"}})
    assert adapter.build_request(brief, served())["text"] == {"format": text, "verbosity": "low"}


def test_a_request_is_counted_as_it_would_be_sent() -> None:
    request = replace(chat_request("Hi", system="Be kind."), tools=(TOOL,), cache_key="k")
    body = adapter.build_count(request, served("gpt-4o"))
    sent = adapter.build_request(request, served("gpt-4o"))
    assert body == {name: sent[name] for name in ("model", "input", "tools")}
