"""What `adapters/providers/ollama.py` makes of requests and replies: pure functions, no socket."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest

from agentmem.provider import Options, Request, load
from agentmem.testing import chat_request
from agentmem.types import Message, Segment, ToolCall

adapter = importlib.import_module("agentmem.adapters.providers.ollama")


def turn(*messages: Message, **fields: Any) -> Request:
    return Request(segments=(Segment(name="turn", messages=messages, stable=False),), **fields)


def test_a_request_keeps_the_model_loaded_and_its_options_constant() -> None:
    first = adapter.build_request(chat_request("Hi", system="S"), model="llama3.2", options={"num_ctx": 4096})
    assert first == {
        "model": "llama3.2",
        "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}],
        "stream": False,
        "keep_alive": "5m",
        "options": {"num_ctx": 4096},
    }


def test_sampling_options_and_extra_are_put_where_ollama_wants_them() -> None:
    extra = {"top_k": 4, "think": False, "format": "json", "keep_alive": "1h", "options": {"min_p": 0.1}}
    options = Options(max_tokens=0, temperature=0.0, top_p=0.5, seed=1, stop=("END",), extra=extra)
    body = adapter.build_request(turn(Message(role="user", content="Hi"), options=options), model="m")
    assert body["options"] == {
        "temperature": 0.0,
        "top_p": 0.5,
        "seed": 1,
        "num_predict": 1,
        "stop": ["END"],
        "min_p": 0.1,
        "top_k": 4,
    }
    assert (body["think"], body["format"], body["keep_alive"]) == (False, "json", "1h")


def test_a_model_that_stays_for_ever_is_told_so_by_a_number() -> None:
    request = chat_request("Hi", system="S")
    assert adapter.build_request(request, model="m", keep_alive="-1")["keep_alive"] == -1
    chosen = replace(request, options=Options(extra={"keep_alive": "600"}))
    assert adapter.build_request(chosen, model="m")["keep_alive"] == 600


def test_a_result_names_its_tool_and_a_user_is_named_in_the_text() -> None:
    request = turn(
        Message(role="user", content="Weather?", name="Ana"),
        Message(role="assistant", content="", tool_calls=(ToolCall(id="x", name="look_up", arguments={"n": 1}),)),
        Message(role="tool", content="rain", tool_call_id="x"),
    )
    user, asked, answered = adapter.build_request(request, model="m")["messages"]
    assert user["content"] == "Ana: Weather?"
    assert asked["tool_calls"] == [{"function": {"name": "look_up", "arguments": {"n": 1}}}]
    assert answered == {"role": "tool", "content": "rain", "tool_name": "look_up"}


def test_usage_is_the_whole_prompt_and_the_time_to_read_it() -> None:
    usage = adapter.parse_usage(
        {"prompt_eval_count": 26, "eval_count": 9, "load_duration": 500_000_000, "prompt_eval_duration": 250_000_000}
    )
    assert (usage.input_tokens, usage.cached_tokens, usage.output_tokens) == (26, 0, 9)
    assert usage.first_token_s == 0.75


def test_a_stream_gives_what_the_whole_reply_would() -> None:
    call = {"function": {"name": "f", "arguments": {"n": 1}}}
    reader = adapter.Reader()
    assert reader.add({"message": {"content": "Wa"}, "done": False}) == "Wa"
    assert reader.add({"message": {"content": "it", "tool_calls": [call]}, "done": False}) == "it"
    assert reader.end() is None
    reader.add(
        {"message": {"content": ""}, "done": True, "done_reason": "stop", "prompt_eval_count": 5, "eval_count": 2}
    )
    whole = reader.end()
    assert (whole.text, whole.finish_reason, whole.usage.input_tokens) == ("Wait", "tool_calls", 5)
    assert (whole.tool_calls[0].name, whole.tool_calls[0].arguments) == ("f", {"n": 1})
    assert whole.tool_calls[0].id


def test_settings_and_host_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "10.0.0.5:4321")
    provider: Any = load("ollama:llama3.2:3b", {"num_ctx": "4096", "options": '{"min_p": 0.1}'})
    assert provider._options == {"min_p": 0.1, "num_ctx": 4096}
    assert provider.name == "ollama:llama3.2:3b"
    assert provider.capabilities.context_tokens == 4096
    assert provider.capabilities.holds_prefix_s == 300
    assert str(provider._sync_client()._client.base_url).rstrip("/") == "http://10.0.0.5:4321"
    provider.close()
