"""What `adapters/providers/ollama.py` makes of requests and replies: pure functions, no socket."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from agentmem.errors import InvalidInput
from agentmem.provider import Options, Request, load
from agentmem.testing import chat_request
from agentmem.types import Image, Message, Segment, ToolCall

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
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    provider: Any = load("ollama:llama3.2:3b", {"num_ctx": "4096", "options": '{"min_p": 0.1}'})
    assert provider._options == {"min_p": 0.1, "num_ctx": 4096}
    assert provider.name == "ollama:llama3.2:3b"
    assert provider.capabilities.context_tokens == 4096
    assert provider.capabilities.holds_prefix_s is None
    assert str(provider._sync_client()._client.base_url).rstrip("/") == "http://127.0.0.1:9"
    provider.close()


def test_images_go_beside_the_text_and_an_address_is_refused() -> None:
    held = Message(role="user", content="What is it?", images=(Image(data="aGk=", media_type="image/png"),))
    assert adapter.build_request(turn(held), model="m")["messages"] == [
        {"role": "user", "content": "What is it?", "images": ["aGk="]}
    ]
    linked = Message(role="user", content="And it?", images=(Image(url="https://example.com/a.png"),))
    with pytest.raises(InvalidInput, match=r"example\.com/a\.png"):
        adapter.build_request(turn(linked), model="m")


def test_a_schema_is_the_format_of_the_answer() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    options = Options(schema=schema, extra={"format": "json"})
    assert (
        adapter.build_request(turn(Message(role="user", content="Hi"), options=options), model="m")["format"] == schema
    )


def test_the_same_tools_and_arguments_are_the_same_bytes_in_any_order() -> None:
    def body(tools: tuple[dict[str, Any], ...], arguments: dict[str, Any]) -> str:
        asked = Message(role="assistant", content="", tool_calls=(ToolCall(id="x", name="f", arguments=arguments),))
        return json.dumps(adapter.build_request(turn(asked, tools=tools), model="m"))

    f, g = {"name": "f", "parameters": {"type": "object", "title": "F"}}, {"name": "g"}
    turned = {"name": "f", "parameters": {"title": "F", "type": "object"}}
    assert body((f, g), {"a": 1, "b": 2}) == body((g, turned), {"b": 2, "a": 1})


CALL = {"function": {"name": "f", "arguments": {"n": 1}}}


def test_thoughts_go_back_with_the_results_of_tools_to_their_own_model() -> None:
    whole = adapter.parse_reply({"message": {"content": "", "thinking": "hm", "tool_calls": [CALL]}, "done": True})
    assert whole.blocks == ({"thinking": "hm"},)
    said = Message(role="assistant", content="", tool_calls=whole.tool_calls, blocks=whole.blocks, blocks_of="ollama:m")
    assert adapter.build_request(turn(said), model="m")["messages"][0]["thinking"] == "hm"
    assert "thinking" not in adapter.build_request(turn(said), model="other")["messages"][0]
    assert adapter.parse_reply({"message": {"content": "Hi", "thinking": "hm"}}).blocks == ()


def test_streamed_thoughts_are_whole_and_not_shown() -> None:
    reader = adapter.Reader()
    pieces = [reader.add({"message": {"content": "", "thinking": part}, "done": False}) for part in "hm"]
    reader.add({"message": {"content": "", "tool_calls": [CALL]}, "done": True})
    assert (pieces, reader.end().blocks) == (["", ""], ({"thinking": "hm"},))


@pytest.mark.parametrize("count", [None, float("nan"), -1, "9"])
def test_a_count_that_the_server_leaves_out_is_unknown_and_not_none(count: Any) -> None:
    whole = adapter.parse_reply(
        {"message": {"content": "Hi"}, "prompt_eval_count": count, "prompt_eval_duration": count}
    )
    assert (whole.counted, whole.prompt_s, whole.usage.first_token_s) == (False, 0.0, None)


@pytest.mark.parametrize(
    "payload",
    [{}, {"message": None}, {"message": "Hi"}, {"message": {"tool_calls": [{}]}}, {"message": {"tool_calls": 3}}],
)
def test_what_is_no_chat_is_an_error(payload: dict[str, Any]) -> None:
    with pytest.raises((AttributeError, LookupError, TypeError, ValueError)):
        adapter.parse_reply(payload)


# What the server says of the model, and what is really sent.

Answers = dict[str, Any]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Any, list[Any]]]]:
    """Makes a provider whose real client is answered by these replies, and the list of what it sent."""
    httpx, ollama = pytest.importorskip("httpx"), pytest.importorskip("ollama")
    made: list[Any] = []

    def make(replies: Answers, **settings: Any) -> tuple[Any, list[Any]]:
        seen: list[Any] = []

        def answer(request: Any) -> Any:
            seen.append((request.url.path, json.loads(request.content) if request.content else None))
            return httpx.Response(200, json=replies[request.url.path])

        def connect(self: Any, *, asynchronous: bool) -> Any:
            return ollama.Client(host="http://127.0.0.1:9", transport=httpx.MockTransport(answer))

        monkeypatch.setattr(adapter.Ollama, "_connect", connect)
        made.append(load("ollama:m", {"base_url": "http://127.0.0.1:9", **settings}))
        return made[-1], seen

    yield make
    for provider in made:
        provider.close()


def show(length: int = 131072, parameters: str = "", **fields: Any) -> Answers:
    shown = {"model_info": {"llama.context_length": length, "llama.block_count": 2}, "parameters": parameters, **fields}
    return {"/api/show": shown, "/api/ps": {"models": []}}


@pytest.mark.parametrize(
    ("replies", "settings", "window"),
    [
        (show(), {}, None),  # the server chooses by its memory
        (show(2048), {}, 2048),
        (show(parameters="stop  x\nnum_ctx    8192"), {}, 8192),
        (show(4000, parameters="num_ctx 8192"), {}, 4000),
        (show(), {"num_ctx": 16384}, 16384),
        ({**show(), "/api/ps": {"models": [{"model": "m:latest", "context_length": 32768}]}}, {}, 32768),
        # Another program's window: a request of ours loads the model anew, with that of its own file.
        (
            {**show(parameters="num_ctx 8192"), "/api/ps": {"models": [{"model": "m", "context_length": 32768}]}},
            {},
            8192,
        ),
        ({"/api/show": {"error": "no"}}, {"num_ctx": 16384}, 16384),
    ],
)
def test_the_window_is_the_one_that_prompts_are_cut_to(
    served: Any, replies: Answers, settings: dict[str, Any], window: int | None
) -> None:
    assert served(replies, **settings)[0].capabilities.context_tokens == window


def test_what_the_model_can_is_asked_of_the_server(served: Any) -> None:
    seeing = served(show(capabilities=["completion", "tools", "vision"]))[0].capabilities
    assert (seeing.chat, seeing.tools, seeing.images, seeing.schemas) == (True, True, True, True)
    plain = served(show(capabilities=["completion"]))[0].capabilities
    assert (plain.tools, plain.images) == (False, False)
    assert not plain.exact_tokens
    assert plain.cache is not None
    assert not plain.cache.priced


def test_nothing_is_asked_where_the_window_is_told(served: Any) -> None:
    provider, seen = served({}, context_tokens=4096, images=True)
    assert (provider.capabilities.images, seen) == (True, [])


def test_a_nested_schema_and_an_image_reach_the_server_as_they_are(served: Any) -> None:
    said = {"message": {"role": "assistant", "content": "Hi"}, "done": True, "eval_count": 1}
    provider, seen = served({"/api/chat": said}, context_tokens=4096, images=True)
    nested = {"type": "object", "properties": {"at": {"type": "object", "properties": {"day": {"type": "string"}}}}}
    path = "/etc/hosts"  # base64 by its letters, and the name of a file
    picture = Message(role="user", content="What?", images=(Image(data=path, media_type="image/png"),))
    reply = provider.generate(turn(picture, tools=({"name": "f", "parameters": nested},)))
    [(_, body)] = seen
    assert body["tools"][0]["function"]["parameters"] == nested
    assert body["messages"][0]["images"] == [path]
    assert reply.usage.input_tokens > 0  # not counted by the server: estimated
    assert reply.usage.estimated_cached_tokens is None
