"""What `adapters/providers/llamacpp.py` adds to OpenAI's format: pure functions, no socket."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem import Memory
from agentmem.activation.slots import SlotStore
from agentmem.database import Database
from agentmem.provider import Generation, Request, load
from agentmem.testing import chat_request
from agentmem.types import Image, Message, Segment, TokenCount, ToolCall, Usage

adapter = importlib.import_module("agentmem.adapters.providers.llamacpp")
planning = importlib.import_module("agentmem.adapters.providers._llamacpp_slots")
sending = importlib.import_module("agentmem.adapters.providers._llamacpp_http")
files = importlib.import_module("agentmem.adapters.providers._llamacpp_files")
server = importlib.import_module("agentmem.adapters.providers._llamacpp_server")

NOWHERE = "http://127.0.0.1:9/v1/"


def test_a_request_asks_for_the_prefix_cache_and_maybe_a_slot() -> None:
    body = adapter.build_request(chat_request("Hi", cache_key="k", max_tokens=3), id_slot=2)
    assert body == {
        "model": "default",
        "messages": [{"role": "user", "content": "Hi"}],
        "cache_prompt": True,
        "id_slot": 2,
        "max_tokens": 3,
    }
    assert "id_slot" not in adapter.build_request(chat_request("Hi"))
    assert adapter.build_request(chat_request("Hi", extra={"cache_prompt": False}))["cache_prompt"] is False


def test_a_reply_tells_cached_tokens_and_the_time_to_read_the_prompt() -> None:
    reply = adapter.parse_reply(
        {
            "choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 1},
            "timings": {"cache_n": 15, "prompt_n": 5, "prompt_ms": 120.0},
        }
    )
    assert (reply.usage.input_tokens, reply.usage.cached_tokens, reply.usage.first_token_s) == (20, 15, 0.12)


def test_a_server_that_is_down_does_not_hinder_making_the_provider() -> None:
    provider: Any = load("llamacpp:", {"base_url": NOWHERE})
    assert provider.name == "llamacpp:default"
    assert provider.capabilities.context_tokens is None
    assert str(provider._sync_client().base_url) == "http://127.0.0.1:9"
    provider.close()


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ('data: {"a": 1}', {"a": 1}),
        ("data: [DONE]", None),
        (": keep-alive", None),
        ("", None),
    ],
)
def test_lines_of_a_stream(line: str, event: object) -> None:
    assert sending.event_of(line) == event


@pytest.mark.parametrize(
    "line", ['data: {"error": {"code": 400, "message": "no"}}', 'error: {"code": 400, "message": "no"}']
)
def test_errors_in_a_stream_are_raised(line: str) -> None:
    with pytest.raises(sending.ErrorEvent, match="no") as caught:
        sending.event_of(line)
    assert caught.value.status == 400


def planner_in(folder: Path) -> Any:
    asked = server.LlamaServer("llamacpp:m", folder, lambda _: {}, told={})
    return planning.SlotPlanner("llamacpp:m", asked, files.SlotFiles("llamacpp:m", folder))


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_what_a_slot_holds_is_not_known_after_two_requests_at_once(tmp_path: Path, first_to_end: int) -> None:
    planner = planner_in(tmp_path)
    process = server.Process("mark", 1, None, adapters=False)
    slots = SlotStore(Database(":memory:"), step=16, budget_bytes=1)
    turns = [files.Turn(chat_request("Hi"), slots.view(tenant)) for tenant in (b"a", b"b")]
    assert [planner._choose(turn, process, None, "") for turn in turns] == [True, False]
    turns[0].live = files.Live((1, 2), b"a", "")
    for turn in turns if first_to_end == 0 else turns[::-1]:
        planner.after(turn, Generation(text="", usage=Usage(input_tokens=3, output_tokens=1)))
        planner.done(turn)
    assert planner._live == {}


def test_where_pages_are_encrypted_it_is_said_that_slots_are_not_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"llamacpp": {"base_url": NOWHERE, "slot_dir": str(tmp_path / "slots")}}
    with Memory(tmp_path / "m", model="llamacpp:m", embedder="none", providers=settings, page_key="ab" * 32) as memory:
        assert not memory._engine.slots.announce(tmp_path / "slots", "name", [])
    assert "can't be encrypted" in caplog.text


def test_a_stream_may_be_ended_by_the_collector_while_its_planner_works(tmp_path: Path) -> None:
    planner = planner_in(tmp_path)
    slots = SlotStore(Database(":memory:"), step=16, budget_bytes=1).view(b"a")
    turns = [files.Turn(chat_request("Hi"), slots) for _ in range(2)]
    process = server.Process("mark", 1, None, adapters=False)

    def left() -> Iterator[None]:
        try:
            planner._choose(turns[0], process, None, "")
            yield
        finally:
            planner.done(turns[0])

    class Collecting(tuple[int, ...]):
        def __len__(self) -> int:  # asked for under the planner's lock
            gc.collect()
            return 0

    circle: list[Any] = [left()]
    next(circle[0])
    circle.append(circle)  # only the collector finds it
    planner._live[0] = files.Live(Collecting(), slots.tenant, "")
    del circle
    worker = threading.Thread(target=planner._choose, args=(turns[1], process, None, ""), daemon=True)
    worker.start()
    worker.join(10)
    assert not worker.is_alive()
    planner.done(turns[1])
    assert planner._busy == {0: 0}


# What a request holds beside text, and what is asked of the server.


def of(*messages: Message, **fields: Any) -> Request:
    return Request(segments=(Segment(name="turn", messages=messages, stable=False),), **fields)


PICTURE = Message(role="user", content="What is it?", images=(Image(data="aGk=", media_type="image/png"),))


def test_images_and_schemas_go_in_the_form_that_the_server_takes() -> None:
    whole = {"required": ["n"], "additionalProperties": False}
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, **whole}
    body = adapter.build_request(of(PICTURE, options=chat_request("", schema=schema).options))
    assert body["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
        {"type": "text", "text": "What is it?"},
    ]
    assert body["response_format"]["type"] == "json_schema"
    assert body["response_format"]["json_schema"]["schema"] == schema


def test_reasoning_goes_back_with_the_results_of_tools_to_its_own_model() -> None:
    call = {"id": "a", "function": {"name": "f", "arguments": "{}"}}
    message = {"content": None, "reasoning_content": "hm", "tool_calls": [call]}
    provider: Any = load("llamacpp:m", {"base_url": NOWHERE, "context_tokens": 9})
    whole = provider._parse({"choices": [{"message": message, "finish_reason": "tool_calls"}]})
    assert whole.text == ""
    said = Message(
        role="assistant",
        content="",
        tool_calls=(ToolCall(id="a", name="f"),),
        blocks=whole.blocks,
        blocks_of=provider.name,
    )
    assert provider._build(of(said), stream=False)["messages"][0]["reasoning_content"] == "hm"
    assert "reasoning_content" not in adapter.build_request(of(said), model="other")["messages"][0]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a provider whose real clients are answered by these replies, and the list of what they sent."""
    httpx = pytest.importorskip("httpx")
    made: list[Any] = []

    def make(replies: dict[str, Any], **settings: Any) -> tuple[Any, list[Any]]:
        seen: list[Any] = []

        def answer(request: Any) -> Any:
            seen.append((request.url.path, json.loads(request.content) if request.content else None))
            return httpx.Response(200, json=replies[request.url.path])

        def connect(self: Any, *, asynchronous: bool) -> Any:
            kind = httpx.AsyncClient if asynchronous else httpx.Client
            return kind(base_url="http://127.0.0.1:9", transport=httpx.MockTransport(answer))

        monkeypatch.setattr(adapter.LlamaCpp, "_connect", connect)
        made.append(load("llamacpp:m", {"base_url": NOWHERE, **settings}))
        return made[-1], seen

    yield make
    for provider in made:
        provider.close()


def props(**fields: Any) -> dict[str, Any]:
    return {"/props": {"default_generation_settings": {"n_ctx": 2048}, **fields}}


@pytest.mark.parametrize(
    ("replies", "settings", "expected"),
    [
        (props(), {}, (2048, False, True)),
        (props(modalities={"vision": True}), {}, (2048, True, True)),
        (props(modalities={"vision": True}), {"images": False}, (2048, False, True)),
        (props(chat_template_caps={"supports_tools": False}), {}, (2048, False, False)),
        (props(chat_template_caps={"supports_tools": True}), {}, (2048, False, True)),
        (props(chat_template_caps=3), {}, (None, False, True)),
        ({"/props": []}, {"images": True}, (None, True, True)),
        ({"/props": {"default_generation_settings": {"n_ctx": "much"}}}, {}, (None, False, True)),
    ],
)
def test_what_the_server_says_of_itself_is_believed_as_far_as_it_makes_sense(
    served: Any, replies: dict[str, Any], settings: dict[str, Any], expected: tuple[int | None, bool, bool]
) -> None:
    able = served(replies, **settings)[0].capabilities
    assert (able.context_tokens, able.images, able.tools) == expected
    assert able.exact_tokens
    assert able.schemas
    assert not able.cache.priced


def test_a_whole_request_is_counted_as_the_server_will_read_it(served: Any) -> None:
    replies = {"/apply-template": {"prompt": "<s>Hi"}, "/tokenize": {"tokens": [1, 2, 3]}}
    provider, seen = served(replies, context_tokens=9, images=True)
    request = chat_request("Hi", max_tokens=5, temperature=0.0)
    assert provider.count_request(request) == TokenCount(tokens=3, exact=True)
    assert seen == [
        ("/apply-template", {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}),
        ("/tokenize", {"content": "<s>Hi", "add_special": True, "parse_special": True}),
    ]
    assert asyncio.run(provider.acount_request(request)) == TokenCount(tokens=3, exact=True)
    seeing = provider.count_request(of(PICTURE))
    assert seeing.tokens > 3
    assert not seeing.exact


def test_the_stable_prefix_of_a_turn_with_an_image_holds_no_part_of_it(tmp_path: Path) -> None:
    asked = server.LlamaServer("llamacpp:m", tmp_path, adapter.build_request, told={})
    system = Segment(name="system", messages=(Message(role="system", content="Be kind."),), stable=True)
    steps = asked.prefix(Request(segments=(system, *of(PICTURE).segments)))
    rendering = next(steps)
    assert rendering.path == "/apply-template"
    assert "image" not in json.dumps(rendering.body)
    prompt = "".join(f"{message['role']}:{message['content']};" for message in rendering.body["messages"])
    assert steps.send({"prompt": prompt}).body["content"] == "system:Be kind.;user:"
