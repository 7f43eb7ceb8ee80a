"""What `adapters/providers/anthropic.py` makes of requests and replies: pure functions, no socket."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest

from agentmem.errors import ConfigError, InvalidInput
from agentmem.provider import CachePlan, Mark, Options, Request, load
from agentmem.testing import chat_request
from agentmem.types import Image, Message, Segment, TokenCount, ToolCall

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


# Plans for the cache.

TOOL = {"name": "f", "input_schema": {"type": "object"}}


def planned(*marks: Mark, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = adapter.build_request(four_segments(cache=CachePlan(marks=marks), **fields), model="claude")
    return body


def controls(body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The marked blocks in the order of the prompt: their text or name, and the marker."""
    blocks = [*body.get("tools", ()), *body.get("system", ()), *(b for m in body["messages"] for b in m["content"])]
    return [(b.get("text") or b["name"], b["cache_control"]) for b in blocks if "cache_control" in b]


def test_a_plans_marks_stand_on_the_last_block_of_their_prefix() -> None:
    marks = (
        Mark(messages=0, lifetime="1h"),
        Mark(messages=1, lifetime="1h"),
        Mark(messages=3),
        Mark(messages=5, lifetime="5m"),
    )
    hour = {"type": "ephemeral", "ttl": "1h"}
    assert controls(planned(*marks, tools=(TOOL,))) == [
        ("f", hour),
        ("Be kind.", hour),
        ("Noted.", MARK),
        ("Hello", MARK),
    ]


def test_a_plan_without_marks_marks_nothing() -> None:
    assert controls(planned()) == []
    assert controls(planned(Mark(messages=0))) == []  # no tools stand there


def test_a_longer_lifetime_behind_a_shorter_is_asked_for_as_the_shorter() -> None:
    body = planned(Mark(messages=1, lifetime="5m"), Mark(messages=3, lifetime="1h"))
    assert controls(body) == [("Be kind.", MARK), ("Noted.", MARK)]


def test_what_the_caller_marks_himself_counts_among_the_four() -> None:
    marks = [Mark(messages=n) for n in (1, 2, 3, 4)]
    top = planned(*marks, options=Options(extra={"cache_control": MARK}))
    assert [what for what, _ in controls(top)] == ["Facts.", "Noted.", "Ana: Hi"]
    tool = planned(*marks, tools=({**TOOL, "cache_control": MARK},))
    assert [what for what, _ in controls(tool)] == ["f", "Facts.", "Noted.", "Ana: Hi"]
    assert len(controls(planned(*marks, Mark(messages=5)))) == 4


def test_two_marks_on_one_block_are_one() -> None:
    assert len(controls(planned(Mark(messages=3, lifetime="1h"), Mark(messages=3)))) == 1


def test_a_mark_behind_the_last_message_is_refused() -> None:
    with pytest.raises(InvalidInput, match="9 messages"):
        planned(Mark(messages=9))


def test_a_diagnosis_is_asked_for_from_the_first_request_on() -> None:
    def asked(plan: CachePlan) -> Any:
        return adapter.build_request(four_segments(cache=plan), model="claude").get("diagnostics")

    assert asked(CachePlan(previous="msg_1")) is None
    assert asked(CachePlan(diagnose=True)) == {"previous_message_id": None}
    assert asked(CachePlan(diagnose=True, previous="msg_1")) == {"previous_message_id": "msg_1"}


def test_filling_the_cache_goes_without_what_is_refused_beside_it() -> None:
    extra = {
        "thinking": {"type": "enabled", "budget_tokens": 2048},
        "tool_choice": {"type": "any"},
        "output_config": {"effort": "low"},
    }
    options = Options(max_tokens=0, schema={"type": "object"}, extra=extra)
    body = adapter.build_request(four_segments(options=options), model="claude", stream=True)
    assert body.keys() == {"model", "max_tokens", "messages", "system", "output_config"}
    assert body["output_config"] == {"effort": "low"}
    free = Options(max_tokens=0, schema={"type": "object"}, extra={"tool_choice": {"type": "auto"}})
    body = adapter.build_request(four_segments(options=free), model="claude")
    assert body["tool_choice"] == {"type": "auto"}
    assert "output_config" not in body


# What a request holds beside text.


def test_images_stand_before_the_text_and_in_a_tools_result() -> None:
    held, linked = Image(data="aGk=", media_type="image/png"), Image(url="https://example.com/a.png")
    messages = (
        Message(role="user", content="What is it?", images=(held, linked)),
        Message(role="assistant", content="", tool_calls=(ToolCall(id="a", name="f"),)),
        Message(role="tool", content="a cat", tool_call_id="a", images=(held,)),
    )
    request = Request(segments=(Segment(name="turn", messages=messages, stable=False),))
    asked, _, answered = adapter.build_request(request, model="claude")["messages"]
    first = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    second = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    assert asked["content"] == [first, second, text("What is it?")]
    assert answered["content"] == [{"type": "tool_result", "tool_use_id": "a", "content": [first, text("a cat")]}]


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_images_of_others_are_refused(role: Any) -> None:
    said = Message(role=role, content="Look.", images=(Image(url="https://example.com/a.png"),))
    with pytest.raises(InvalidInput, match=role):
        adapter.build_request(Request(segments=(Segment(name="turn", messages=(said,), stable=False),)), model="claude")


def test_a_schema_is_the_form_of_the_answer_and_keeps_the_effort() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    options = Options(schema=schema, extra={"output_config": {"effort": "low"}})
    body = adapter.build_request(four_segments(options=options), model="claude")
    assert body["output_config"] == {"effort": "low", "format": {"type": "json_schema", "schema": schema}}


def test_a_schema_is_written_as_the_api_takes_it() -> None:
    provider: Any = load("anthropic:claude", {"api_key": "k"})
    body = provider._build(
        chat_request("Hi", schema={"type": "object", "properties": {"n": {"type": "integer"}}}), stream=False
    )
    assert body["output_config"]["format"]["schema"]["additionalProperties"] is False
    with pytest.raises(InvalidInput, match="schema"):
        provider._build(chat_request("Hi", schema={"properties": {}}), stream=False)


def test_the_limit_leaves_room_for_an_answer_behind_the_thoughts() -> None:
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 4096}}
    assert adapter.build_request(chat_request("Hi", extra=thinking), model="claude")["max_tokens"] == 4096 + 1024
    assert (
        adapter.build_request(chat_request("Hi", extra=thinking, max_tokens=5000), model="claude")["max_tokens"] == 5000
    )


THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
HIDDEN = {"type": "redacted_thinking", "data": "eA=="}
CALL = {"type": "tool_use", "id": "a", "name": "f", "input": {"n": 1}}


def after_a_call(blocks: tuple[dict[str, Any], ...], of: str = "anthropic:claude") -> Any:
    call = ToolCall(id="a", name="f", arguments={"n": 1})
    said = Message(role="assistant", content="Wait.", tool_calls=(call,), blocks=blocks, blocks_of=of)
    result = Message(role="tool", content="one", tool_call_id="a")
    request = Request(segments=(Segment(name="turn", messages=(said, result), stable=False),))
    return adapter.build_request(request, model="claude")["messages"][0]["content"]


def test_thoughts_go_back_before_what_they_led_to_but_only_to_their_own_model() -> None:
    assert after_a_call((THOUGHT, HIDDEN)) == [THOUGHT, HIDDEN, text("Wait."), CALL]
    assert after_a_call((THOUGHT, HIDDEN), of="anthropic:other") == [text("Wait."), CALL]


def test_thoughts_between_the_parts_go_back_in_their_places() -> None:
    whole = (THOUGHT, text("Wait."), HIDDEN, CALL)
    assert after_a_call(whole) == list(whole)
    unanswered = {**CALL, "id": "b"}
    assert after_a_call((*whole, unanswered)) == list(whole)


def test_a_marker_never_stands_on_a_thought() -> None:
    said = Message(
        role="assistant",
        content="",
        tool_calls=(ToolCall(id="a", name="f"),),
        blocks=(text("x"), THOUGHT),
        blocks_of="anthropic:claude",
    )
    request = Request(segments=(Segment(name="history", messages=(said,), stable=True),))
    assert controls(adapter.build_request(request, model="claude")) == [("x", MARK)]
    assert "cache_control" not in said.blocks[0]


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


def test_tools_in_the_vendors_own_form_go_as_they_are() -> None:
    tool = {"name": "f", "input_schema": {"type": "object"}, "strict": True, "defer_loading": False}
    assert adapter.build_request(four_segments(tools=(tool,)), model="claude")["tools"] == [tool]


def test_the_same_tools_and_arguments_are_the_same_bytes_in_any_order() -> None:
    def body(*tools: dict[str, Any], arguments: dict[str, Any]) -> str:
        asked = Message(role="assistant", content="", tool_calls=(ToolCall(id="a", name="f", arguments=arguments),))
        answered = Message(role="tool", content="one", tool_call_id="a")
        turn = Segment(name="turn", messages=(asked, answered), stable=False)
        return json.dumps(adapter.build_request(Request(segments=(turn,), tools=tools), model="claude"))

    f, g = {"name": "f", "parameters": {"type": "object", "title": "F"}}, {"name": "g"}
    turned = {"name": "f", "parameters": {"title": "F", "type": "object"}}
    assert body(f, g, arguments={"x": 1, "y": {"b": 1, "a": 2}}) == body(
        g, turned, arguments={"y": {"a": 2, "b": 1}, "x": 1}
    )


def test_a_missing_key_names_the_way_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="model='local'"):
        load("anthropic:claude", {})


def test_it_has_no_embeddings_and_says_so() -> None:
    provider = load("anthropic:claude", {"api_key": "k"})
    assert provider.capabilities.kv == "breakpoints"
    assert provider.capabilities.holds_prefix_s == 3600  # a plan may ask for an hour
    with pytest.raises(ConfigError, match="embeddings"):
        provider.embed(["a"])
    with pytest.raises(ConfigError, match="embeddings"):
        provider.embed([])


@pytest.mark.parametrize(
    ("model", "settings", "kv", "can", "window"),
    [
        ("claude-sonnet-4-5", {}, "breakpoints", True, 200_000),
        ("claude-sonnet-4-5", {"base_url": "http://127.0.0.1:9"}, "breakpoints", True, 200_000),
        ("smollm2", {"base_url": "http://127.0.0.1:9"}, "auto", False, None),
        ("smollm2", {"base_url": "http://127.0.0.1:9", "schemas": True, "images": "true"}, "auto", True, None),
        ("claude-sonnet-4-5", {"context_tokens": 5000}, "breakpoints", True, 5000),
    ],
)
def test_capabilities_are_those_of_the_model_and_its_host(
    model: str, settings: dict[str, Any], kv: str, can: bool, window: int | None
) -> None:
    able = load(f"anthropic:{model}", {"api_key": "k", **settings}).capabilities
    assert (able.kv, able.images, able.schemas, able.context_tokens) == (kv, can, can, window)
    assert (able.cache is not None) == (kv == "breakpoints")
    assert not able.exact_tokens


@pytest.mark.parametrize(
    ("settings", "asks"),
    [
        ({}, True),
        ({"base_url": "http://127.0.0.1:9"}, True),
        ({"base_url": "https://gateway.example.com"}, False),  # it may refuse fields that it does not know
        ({"base_url": "https://gateway.example.com", "diagnostics": True}, True),
        ({"diagnostics": False}, False),
    ],
)
def test_a_diagnosis_is_asked_for_where_the_field_is_known(settings: dict[str, Any], asks: bool) -> None:
    rules = load("anthropic:claude-sonnet-4-6", {"api_key": "k", **settings}).capabilities.cache
    assert rules is not None
    assert rules.diagnoses == asks


def test_a_whole_request_is_counted_by_the_vendor() -> None:
    anthropic, httpx2 = pytest.importorskip("anthropic"), pytest.importorskip("httpx2")
    seen: list[tuple[str, dict[str, Any]]] = []

    def answer(request: Any) -> Any:
        seen.append((request.url.path, json.loads(request.content)))
        return httpx2.Response(200, json={"input_tokens": 2095})

    provider: Any = load("anthropic:claude", {"api_key": "k"})
    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    provider._connect = lambda asynchronous: anthropic.Anthropic(api_key="k", http_client=http, max_retries=0)
    asked = four_segments(tools=(TOOL,), options=Options(max_tokens=5, temperature=0.5))
    assert provider.count_request(asked) == TokenCount(tokens=2095, exact=True)
    [(path, body)] = seen
    assert path == "/v1/messages/count_tokens"
    assert body.keys() == {"model", "messages", "system", "tools"}
