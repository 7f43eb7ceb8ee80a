"""What `adapters/providers/openai.py` makes of requests and replies: pure functions, no socket."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel

from agentmem.cache_rules import rules_for
from agentmem.errors import ConfigError, InvalidInput, MissingDependency
from agentmem.provider import CachePlan, Mark, Options, Request, load
from agentmem.testing import chat_request
from agentmem.types import Image, Message, Segment, ToolCall

adapter = importlib.import_module("agentmem.adapters.providers._openai_chat")
fields = importlib.import_module("agentmem.adapters.providers._openai_fields")
hosts = importlib.import_module("agentmem.adapters.providers._openai_hosts")

OLD = hosts.Served(model="gpt-4o", name="openai:gpt-4o", host=hosts.OPENAI)
OTHER = hosts.Served(model="m", name="openai_compatible:m")
NEW = replace(OLD, model="gpt-5.6-sol", rules=rules_for("openai:gpt-5.6-sol"))
PICTURE = Image(url="https://example.org/cat.png")

CALL = ToolCall(id="c1", name="look_up", arguments={"city": "Zürich"})


def turn(*messages: Message, **fields: Any) -> Request:
    return Request(segments=(Segment(name="turn", messages=messages, stable=False),), **fields)


def reply(**message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": "stop"}], "usage": {}}


def test_segments_become_messages_in_order() -> None:
    body = adapter.build_request(chat_request("Hi", system="Be kind."), OLD)
    assert body == {
        "model": "gpt-4o",
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
    }


def test_options_are_mapped_and_extra_comes_last() -> None:
    options = Options(
        max_tokens=5, temperature=0.0, top_p=0.5, seed=0, stop=("END",), extra={"temperature": 0.3, "logprobs": True}
    )
    body = adapter.build_request(turn(Message(role="user", content="Hi"), options=options), OLD)
    expected = {
        "max_completion_tokens": 5,
        "temperature": 0.3,
        "top_p": 0.5,
        "seed": 0,
        "stop": ["END"],
        "logprobs": True,
    }
    assert expected.items() <= body.items()


def test_other_hosts_get_only_fields_that_every_server_knows() -> None:
    request = chat_request("Hi", cache_key="k", max_tokens=5)
    official = adapter.build_request(request, OLD)
    other = adapter.build_request(request, OTHER)
    opted_in = adapter.build_request(request, replace(OTHER, cache_fields=True))
    assert (official["prompt_cache_key"], official["max_completion_tokens"]) == ("k", 5)
    assert "prompt_cache_key" not in other
    assert other["max_tokens"] == 5
    assert opted_in["prompt_cache_key"] == "k"


def test_a_long_cache_key_is_shortened_to_what_the_host_takes() -> None:
    key = adapter.build_request(chat_request("Hi", cache_key="k" * 100), OLD)["prompt_cache_key"]
    assert len(key) == 64


def test_prefill_asks_for_one_token() -> None:
    assert adapter.build_request(chat_request("Hi", max_tokens=0), OLD)["max_completion_tokens"] == 1


def test_a_marked_model_gets_breakpoints_on_the_last_part_of_marked_messages() -> None:
    said = (
        Message(role="user", content="a"),
        Message(role="assistant", content="b"),
        Message(role="user", content="c"),
    )
    plan = CachePlan(marks=(Mark(messages=1, lifetime="12h"), Mark(messages=2)))
    body = adapter.build_request(turn(*said, cache=plan), NEW)
    assert body["prompt_cache_options"] == {"mode": "explicit"}
    marks = [message["content"][-1].get("prompt_cache_breakpoint") for message in body["messages"]]
    assert marks == [{"mode": "explicit", "ttl": "12h"}, {"mode": "explicit"}, None]
    assert "breakpoint" not in json.dumps(adapter.build_request(turn(*said, cache=plan), OLD))
    silent = adapter.build_request(turn(*said, cache=CachePlan()), NEW)
    assert "breakpoint" not in json.dumps(silent)
    assert silent["prompt_cache_options"] == {"mode": "explicit"}


def test_images_stand_before_the_text_also_where_user_messages_are_joined() -> None:
    said = (Message(role="user", content="core"), Message(role="user", content="What?", images=(PICTURE,)))
    shown = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    [joined] = adapter.build_request(turn(*said), OTHER)["messages"]
    assert joined["content"] == [{"type": "text", "text": "core"}, shown, {"type": "text", "text": "What?"}]
    with pytest.raises(InvalidInput, match="tool"):
        adapter.build_request(turn(Message(role="tool", content="x", images=(PICTURE,), tool_call_id="c")), OLD)


def test_a_schema_is_asked_for_by_name() -> None:
    asked = adapter.build_request(chat_request("Hi", schema={"type": "object"}), OTHER)["response_format"]
    assert asked == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": False},
    }


def test_a_refusal_is_text_and_says_what_it_is() -> None:
    whole = adapter.parse_reply(reply(content=None, refusal="I can't."))
    assert (whole.text, whole.finish_reason) == ("I can't.", "content_filter")
    reader = adapter.Reader()
    assert reader.add({"choices": [{"delta": {"refusal": "I can't."}, "finish_reason": "stop"}]}) == "I can't."
    assert reader.end() == replace(whole, usage=reader.end().usage)


@pytest.mark.parametrize("whole", [True, False])
def test_what_a_host_wants_back_with_results_is_kept_and_put_where_it_stood(whole: bool) -> None:
    signed = {"google": {"thought_signature": "s1"}}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}, "extra_content": signed}
    said = {"content": None, "reasoning_content": "thinking", "tool_calls": [call]}
    for host, beside in (("deepseek", {"reasoning_content": "thinking"}), ("gemini", {})):
        served = replace(OTHER, host=hosts.HOSTS[host])
        if whole:
            answer = adapter.parse_reply(reply(**said), served)
        else:
            reader = adapter.Reader(served)
            for delta in ({"reasoning_content": "thin"}, {"reasoning_content": "king"}):
                reader.add({"choices": [{"delta": delta}]})
            reader.add({"choices": [{"delta": {"tool_calls": [{"index": 0, **call}]}, "finish_reason": "tool_calls"}]})
            answer = reader.end()
        message = Message(
            role="assistant", content="", tool_calls=answer.tool_calls, blocks=answer.blocks, blocks_of=served.name
        )
        [sent] = adapter.build_request(turn(message), served)["messages"]
        assert ("extra_content" in sent["tool_calls"][0]) == (host == "gemini")
        assert {name: sent[name] for name in ("reasoning_content",) if name in sent} == beside
        [other] = adapter.build_request(turn(message), replace(served, name="openai_compatible:n"))["messages"]
        assert other.keys() == {"role", "content", "tool_calls"}
        assert "extra_content" not in other["tool_calls"][0]


def test_streams_ask_for_usage() -> None:
    body = adapter.build_request(chat_request("Hi"), OLD, stream=True)
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})


def test_calls_and_results_go_there_and_back() -> None:
    request = turn(
        Message(role="user", content="Weather?", name="Ana Maria"),
        Message(role="assistant", content="", tool_calls=(CALL,)),
        Message(role="tool", content="rain", tool_call_id="c1", name="look_up"),
    )
    user, asked, answered = adapter.build_request(request, OLD)["messages"]
    assert user["name"] == "Ana_Maria"
    assert answered == {"role": "tool", "content": "rain", "tool_call_id": "c1"}
    assert asked["content"] is None
    assert adapter.parse_reply(reply(**asked)).tool_calls == (CALL,)


def test_other_hosts_get_a_users_name_in_the_text() -> None:
    message = Message(role="user", content="Hi", name="Ana")
    sent = adapter.build_request(turn(message), OTHER)["messages"]
    assert sent == [{"role": "user", "content": "Ana: Hi"}]


@pytest.mark.parametrize("raw", ['{"city": "Zür', "[1]", "nonsense"])
def test_broken_arguments_are_kept_and_go_back_unchanged(raw: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": raw}}
    parsed = adapter.parse_reply(reply(content=None, tool_calls=[call])).tool_calls
    assert parsed[0].arguments == {"_raw": raw}
    again = adapter.build_request(turn(Message(role="assistant", content="", tool_calls=parsed)), OLD)
    assert again["messages"][0]["tool_calls"] == [call]


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}},
        {"name": "f", "description": "d", "parameters": {"type": "object"}},
        {"name": "f", "description": "d", "input_schema": {"type": "object"}},
    ],
)
def test_tools_may_be_given_in_any_spelling(tool: dict[str, Any]) -> None:
    request = turn(Message(role="user", content="Hi"), tools=(tool,))
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert adapter.build_request(request, OLD)["tools"] == [{"type": "function", "function": function}]


def test_a_tool_without_a_name_is_refused() -> None:
    with pytest.raises(InvalidInput, match="name"):
        adapter.build_request(turn(Message(role="user", content="Hi"), tools=({"description": "d"},)), OLD)


@pytest.mark.parametrize(
    ("payload", "cached", "written"),
    [
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2}}}, 4, 2),
        ({"usage": {"prompt_tokens": 9, "prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 5}}, 4, 0),
        ({"usage": {"prompt_tokens": 9}, "timings": {"cache_n": 4, "prompt_n": 5}}, 4, 0),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": None}}, 0, 0),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 99}}}, 9, 0),
    ],
)
def test_cached_tokens_are_found_wherever_a_vendor_puts_them(
    payload: dict[str, Any], cached: int, written: int
) -> None:
    usage = fields.parse_usage(payload)
    assert (usage.input_tokens, usage.cached_tokens, usage.written_tokens) == (9, cached, written)


@pytest.mark.parametrize(
    ("told", "seconds"), [(250, 0.25), (None, None), ("soon", None), (float("nan"), None), (-1, None)]
)
def test_a_servers_own_time_to_the_first_token_is_taken_if_it_is_one(told: Any, seconds: float | None) -> None:
    assert fields.parse_usage({"timings": {"prompt_ms": told}}).first_token_s == seconds


def test_a_streamed_call_is_put_together_from_its_fragments() -> None:
    reader = adapter.Reader()
    text = json.dumps(CALL.arguments)
    parts: list[dict[str, Any]] = [{"index": 0, "id": "c1", "function": {"name": "look_up", "arguments": ""}}]
    parts += [{"index": 0, "function": {"arguments": letter}} for letter in text]
    for part in parts:
        assert reader.add({"choices": [{"delta": {"tool_calls": [part]}}]}) == ""
    assert reader.end() is None  # cut so far
    reader.add({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})
    reader.add({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    whole = reader.end()
    assert whole.tool_calls == (CALL,)
    assert (whole.usage.input_tokens, whole.usage.output_tokens, whole.finish_reason) == (3, 2, "tool_calls")


def test_a_missing_key_names_the_way_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match="model='local'"):
        load("openai:gpt-4o", {})
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-env")
    provider = load("openai/gpt-4o", {})
    assert provider.name == "openai:gpt-4o"
    assert "sk-from-env" not in repr(provider)
    provider.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_keys": "x"}, "api_keys"),
        ({"timeout_s": "soon"}, "timeout_s"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"max_retries": -1}, "max_retries"),
        ({"api_key": 5}, "api_key"),
        ({"max_retries": True}, "max_retries"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("openai:gpt-4o", {"api_key": "k", **settings})


def test_settings_may_come_as_text_from_the_environment() -> None:
    provider: Any = load("openai:gpt-4o", {"api_key": "k", "timeout_s": "7.5", "max_retries": "0", "cache_fields": "1"})
    assert (provider._timeout_s, provider._max_retries, provider._values["cache_fields"]) == (7.5, 0, True)


@pytest.mark.parametrize("host", ["https://notopenai.com/v1", "https://openai.com.example.org/v1"])
def test_a_host_that_only_looks_like_openais_gets_no_cache_fields(host: str) -> None:
    provider: Any = load("openai:m", {"api_key": "k", "base_url": host})
    assert "prompt_cache_key" not in provider._build(chat_request("Hi", cache_key="k"), stream=False)


def test_facts_follow_the_host() -> None:
    official = load("openai:gpt-4o", {"api_key": "k", "base_url": "https://api.openai.com/v1"})
    near = load("openai:m", {"base_url": "http://127.0.0.1:1/v1"})
    assert official.capabilities.holds_prefix_s == 86400
    assert near.capabilities.holds_prefix_s is None
    assert official.count_tokens("hello world") == 2


def test_a_compatible_server_needs_an_address_and_never_gets_openais_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.delenv("OPENAI_COMPATIBLE_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match="base_url"):
        load("openai_compatible:m", {})
    provider: Any = load("openai_compatible:m", {"base_url": "http://127.0.0.1:1/v1"})
    assert provider.name == "openai_compatible:m"
    assert provider._sync_client().api_key == "none"
    provider.close()


@pytest.mark.parametrize(
    ("scheme", "package"),
    [
        ("openai", "openai"),
        ("openai_compatible", "openai"),
        ("anthropic", "anthropic"),
        ("ollama", "ollama"),
        ("llamacpp", "httpx"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=f"pip install {package}"):
        load(f"{scheme}:m", {"base_url": "http://127.0.0.1:1"})


@pytest.mark.parametrize("scheme", ["openai", "anthropic", "ollama", "openai_compatible"])
def test_a_scheme_alone_asks_for_a_model(scheme: str) -> None:
    with pytest.raises(ConfigError, match=f"'{scheme}:<model>"):
        load(scheme, {"base_url": "http://127.0.0.1:1"})


def test_other_servers_get_alternating_roles_and_openai_gets_what_was_laid_out() -> None:
    said = (Message(role="user", content="core"), Message(role="user", content="question"))
    segments = tuple(Segment(name="turn", messages=(message,), stable=False) for message in said)
    theirs = adapter.build_request(Request(segments=segments), OTHER)["messages"]
    assert theirs == [{"role": "user", "content": "core\n\nquestion"}]
    assert len(adapter.build_request(Request(segments=segments), OLD)["messages"]) == 2


STRICT: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "string", "default": "x"}}},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}], "title": "A"}}},
    {"type": "object", "properties": {"a": {"type": "array", "items": {"type": ["integer", "null"]}}}},
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/B"}}, "$defs": {"B": {"enum": ["x", "y"]}}},
]
LOOSE: list[dict[str, Any]] = [
    {"type": "object"},
    {"type": "array", "items": {"type": "string"}},
    {"anyOf": [{"type": "object", "properties": {}}]},
    {"type": "object", "properties": {"a": {}}},
    {"type": "object", "properties": {"a": {"type": "object", "additionalProperties": {"type": "string"}}}},
    {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}},
    {"type": "object", "properties": {"a": {"type": "array"}}},
    {"type": "object", "properties": {"a": {"type": "string", "format": "uri"}}},
    {"type": "object", "properties": {"a": {"allOf": [{"type": "string"}]}}},
    {"type": "object", "properties": {"a": {"type": ["object", "null"]}}},
    {"type": "object", "properties": {"a": True}},
]


@pytest.mark.parametrize("schema", STRICT)
def test_schemas_of_the_strict_subset_are_followed_strictly(schema: dict[str, Any]) -> None:
    strict = fields.strict_schema(schema)
    assert strict["required"] == list(schema["properties"])
    assert strict["additionalProperties"] is False
    assert "default" not in json.dumps(strict)
    assert fields.strict_schema(strict) == strict


@pytest.mark.parametrize("schema", LOOSE)
def test_schemas_that_need_more_are_sent_as_they_are(schema: dict[str, Any]) -> None:
    assert fields.strict_schema(schema) is None
    assert fields.named_schema(schema)["schema"] == schema


def test_the_sdks_own_strict_schema_of_a_class_is_ours() -> None:
    from openai.lib._pydantic import to_strict_json_schema

    class Person(BaseModel):
        name: str
        age: int | None = None
        pets: list[str]

    assert fields.strict_schema(Person.model_json_schema()) == to_strict_json_schema(Person)


@pytest.mark.parametrize(
    ("model", "thinks", "may", "images", "schemas"),
    [
        ("gpt-4o", False, False, True, True),
        ("gpt-4.1-mini", False, False, True, True),
        ("gpt-3.5-turbo", False, False, False, False),
        ("gpt-4-turbo", False, False, True, False),
        ("gpt-4o-2024-05-13", False, False, True, False),
        ("o3", True, True, True, True),
        ("gpt-5-mini", True, True, True, True),
        ("gpt-5-chat-latest", False, False, True, True),
        ("gpt-5.1", False, True, True, True),
        ("gpt-5.1-codex", True, True, True, True),
        ("gpt-5.4", False, True, True, True),
        ("gpt-5.4-pro", True, True, True, True),
        ("gpt-5.6-sol", True, True, True, True),
        ("gpt-6-astra", True, True, True, True),
    ],
)
def test_what_a_model_of_openai_can_do(model: str, thinks: bool, may: bool, images: bool, schemas: bool) -> None:
    assert (hosts.reasons(model), hosts.may_reason(model)) == (thinks, may)
    assert (hosts.sees(model), hosts.follows_schemas(model)) == (images, schemas)


def test_capabilities_follow_the_model() -> None:
    new = load("openai:gpt-5.6-sol", {"api_key": "k", "base_url": "https://api.openai.com/v1"}).capabilities
    old = load("openai:gpt-4o", {"api_key": "k", "base_url": "https://api.openai.com/v1"}).capabilities
    off = load("openai:gpt-5.6-sol", {"api_key": "k", "base_url": "https://api.openai.com/v1", "cache_fields": False})
    assert (new.kv, new.images, new.schemas, new.exact_tokens) == ("breakpoints", True, True, True)
    assert new.cache is not None
    assert new.cache.marked
    assert (old.kv, old.context_tokens) == ("auto", 128_000)
    assert (off.capabilities.kv, off.capabilities.cache) == ("auto", None)


def test_the_api_follows_the_host_the_setting_and_the_request() -> None:
    def body(settings: dict[str, Any], **options: Any) -> dict[str, Any]:
        provider: Any = load("openai:gpt-4o", {"api_key": "k", **settings})
        built: dict[str, Any] = provider._build(chat_request("Hi", **options), stream=False)
        return built

    assert "input" in body({})
    assert "messages" in body({}, stop=("END",))
    assert "messages" in body({"api": "chat"})
    assert "messages" in body({"base_url": "http://127.0.0.1:1/v1"})
    assert "input" in body({"base_url": "http://127.0.0.1:1/v1", "host": "openai"})
    assert "input" in body({"base_url": "http://127.0.0.1:1/v1", "api": "responses"})
    with pytest.raises(ConfigError, match="api"):
        body({"api": "completions"})
    with pytest.raises(ConfigError, match="host"):
        body({"host": "nowhere"})
