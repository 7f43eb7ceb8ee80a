"""The anthropic and ollama adapters, through the real SDKs, against the host that keeps the vendors' rules."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from agentmem.provider import CachePlan, Generation, Mark, Options, Request, load
from agentmem.testing import FakeClock, HostServer, ProviderSuite
from agentmem.types import Image, Message, Segment, TokenCount

MODEL = "claude-sonnet-4-6"
WEATHER = {
    "name": "get_weather",
    "description": "weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
#: Above the model's minimum of 1,024 tokens each.
RULES = "Answer in one short sentence. " + " ".join(f"Rule {n}: say {n} twice." for n in range(220))
FACTS = " ".join(f"Fact {n}: house {n} has {n + 2} doors." for n in range(160))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def host(clock: FakeClock) -> Iterator[HostServer]:
    with HostServer(clock=clock) as server:
        yield server


@pytest.fixture
def provider(host: HostServer) -> Iterator[Any]:
    with contextlib.closing(load(f"anthropic:{MODEL}", {"base_url": host.anthropic_url, "api_key": "k"})) as one:
        yield one


def asked(turn: str = "Now?", *, rules: str = RULES, plan: CachePlan | None = None, **options: Any) -> Request:
    exchange = (Message(role="user", content=FACTS), Message(role="assistant", content="Noted."))
    segments = (
        Segment(name="system", messages=(Message(role="system", content=rules),), stable=True),
        Segment(name="core", messages=exchange, stable=True),
        Segment(name="turn", messages=(Message(role="user", content=turn),), stable=False),
    )
    return Request(segments=segments, options=Options(**options), tools=(WEATHER,), cache=plan)


def whole(provider: Any, request: Request) -> Generation:
    reply: Generation = provider.generate(request)
    return reply


def streamed(provider: Any, request: Request) -> Generation:
    *_, last = provider.stream(request)
    assert isinstance(last, Generation)
    return last


def awaited(provider: Any, request: Request) -> Generation:
    async def inside() -> Generation:
        try:
            reply: Generation = await provider.agenerate(request)
            return reply
        finally:
            await provider.aclose()

    return asyncio.run(inside())


ANSWERS = [whole, streamed, awaited]
Answer = Callable[[Any, Request], Generation]


@pytest.mark.parametrize("answer", ANSWERS)
def test_each_lifetime_is_written_read_and_expires_by_itself(
    host: HostServer, provider: Any, clock: FakeClock, answer: Answer
) -> None:
    plan = CachePlan(marks=(Mark(messages=1, lifetime="1h"), Mark(messages=3, lifetime="5m")))
    first = answer(provider, asked(plan=plan)).usage
    assert (first.cached_tokens, first.written_long_tokens > 1024) == (0, True)
    assert first.written_tokens - first.written_long_tokens > 1024
    assert first.input_tokens > first.written_tokens
    provider = load(provider.name, {"base_url": host.anthropic_url, "api_key": "k"})
    with contextlib.closing(provider):
        second = whole(provider, asked("And now?", plan=plan)).usage
        assert (second.cached_tokens, second.written_tokens) == (first.written_tokens, 0)
        clock.advance(400)  # five minutes are over, the hour is not
        third = whole(provider, asked("And then?", plan=plan)).usage
    assert third.cached_tokens == first.written_long_tokens
    assert (third.written_tokens, third.written_long_tokens) == (first.written_tokens - first.written_long_tokens, 0)
    for told, noted in zip((first, second, third), host.requests, strict=True):
        assert noted.usage is not None
        assert told.input_tokens == noted.usage.input_tokens
        assert told.written_long_tokens == noted.usage.written_long_tokens


def test_a_plan_without_marks_pays_for_no_writing(provider: Any) -> None:
    for _ in range(2):
        usage = whole(provider, asked(plan=CachePlan())).usage
        assert (usage.cached_tokens, usage.written_tokens) == (0, 0)


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_vendor_says_what_changed(provider: Any, answer: Answer) -> None:
    plan = CachePlan(marks=(Mark(messages=3),), diagnose=True)
    first = whole(provider, asked(plan=plan))
    assert (first.miss, bool(first.id)) == (None, True)
    same = whole(provider, asked("And now?", plan=replace(plan, previous=first.id)))
    assert same.miss is None
    other = answer(provider, asked("And then?", rules=RULES + " Be kind.", plan=replace(plan, previous=same.id)))
    assert other.miss is not None
    assert other.miss.startswith("system_changed (about ")


def test_a_cache_is_filled_without_what_is_refused_beside_it(host: HostServer, provider: Any) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    extra = {"tool_choice": {"type": "any"}}
    filled = whole(provider, asked(max_tokens=0, schema=schema, extra={**extra, "thinking": {"type": "adaptive"}}))
    assert (filled.text, filled.usage.output_tokens) == ("", 0)
    assert filled.usage.written_tokens > 2048
    plain = whole(provider, asked("And now?"))
    assert plain.usage.cached_tokens == filled.usage.written_tokens
    assert [request.status for request in host.requests] == [200, 200]


def thinks_and_calls(body: Mapping[str, Any]) -> Any:
    """A model that thinks and asks for two tools, then answers."""
    results = [b for m in body["messages"] if isinstance(m["content"], list) for b in m["content"]]
    if any(block["type"] == "tool_result" for block in results) or any(m["role"] == "tool" for m in body["messages"]):
        return "Fog in both."
    calls = [{"name": "get_weather", "arguments": {"city": city}} for city in ("Paris", "Oslo")]
    return {"text": "Let me see.", "thinking": "Two cities.", "tool_calls": calls}


def followed(reply: Generation, of: str) -> tuple[Message, ...]:
    said = Message(role="assistant", content=reply.text, tool_calls=reply.tool_calls, blocks=reply.blocks, blocks_of=of)
    return (said, *(Message(role="tool", content="fog", tool_call_id=call.id) for call in reply.tool_calls))


@pytest.mark.parametrize("answer", ANSWERS)
def test_thoughts_and_results_go_back_as_the_api_wants_them(host: HostServer, provider: Any, answer: Answer) -> None:
    host.reply = thinks_and_calls
    request = asked("Weather in Paris and Oslo?", extra={"thinking": {"type": "enabled", "budget_tokens": 2048}})
    reply = whole(provider, request) if answer is awaited else answer(provider, request)
    assert [call.arguments for call in reply.tool_calls] == [{"city": "Paris"}, {"city": "Oslo"}]
    assert (reply.text, reply.finish_reason) == ("Let me see.", "tool_calls")
    *stable, turn = request.segments
    after = turn.model_copy(update={"messages": (*turn.messages, *followed(reply, provider.name))})
    end = answer(provider, replace(request, segments=(*stable, after)))
    assert end.text == "Fog in both."
    said, results = host.requests[-1].body["messages"][-2:]
    assert [block["type"] for block in said["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert said["content"][0]["signature"]
    assert [block["type"] for block in results["content"]] == ["tool_result", "tool_result"]


def test_images_and_schemas_are_taken_and_a_request_is_counted_as_it_is_read(host: HostServer, provider: Any) -> None:
    picture = Message(role="user", content="What?", images=(Image(data="aGk=", media_type="image/png"),))
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}, "required": ["n"]}
    request = Request(
        segments=(Segment(name="turn", messages=(picture,), stable=False),),
        options=Options(schema=schema, temperature=0.5, max_tokens=9),
        tools=(WEATHER,),
    )
    counted = provider.count_request(request)
    assert counted == TokenCount(tokens=whole(provider, request).usage.input_tokens, exact=True)
    assert [noted.status for noted in host.requests] == [200, 200]

    async def later() -> TokenCount:
        try:
            count: TokenCount = await provider.acount_request(request)
            return count
        finally:
            await provider.aclose()

    assert asyncio.run(later()) == counted


@pytest.mark.parametrize("answer", ANSWERS)
def test_ollama_gets_thoughts_and_results_back_too(host: HostServer, answer: Answer) -> None:
    host.reply = thinks_and_calls
    with contextlib.closing(load("ollama:m", {"base_url": host.ollama_url})) as provider:
        question = Message(role="user", content="Weather in Paris and Oslo?")
        first = Request(segments=(Segment(name="turn", messages=(question,), stable=False),), tools=(WEATHER,))
        reply = whole(provider, first) if answer is awaited else answer(provider, first)
        assert reply.blocks == ({"thinking": "Two cities."},)
        messages = (question, *followed(reply, provider.name))
        end = answer(provider, replace(first, segments=(Segment(name="turn", messages=messages, stable=False),)))
    assert end.text == "Fog in both."
    assert end.usage.input_tokens > reply.usage.input_tokens
    said, *results = host.requests[-1].body["messages"][1:]
    assert said["thinking"] == "Two cities."
    assert [result["tool_name"] for result in results] == ["get_weather", "get_weather"]


def test_ollama_answers_by_a_schema_within_one_window(host: HostServer) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    with contextlib.closing(load("ollama:m", {"base_url": host.ollama_url, "num_ctx": 8192})) as provider:
        assert provider.capabilities.context_tokens == 8192
        for text in ("One?", "Two?"):
            request = asked(text, schema=schema)
            provider.generate(request)
    bodies = [noted.body for noted in host.requests if noted.path == "/api/chat"]
    assert [body["format"] for body in bodies] == [schema, schema]
    assert [body["options"] for body in bodies] == [{"num_ctx": 8192}] * 2
    assert bodies[0]["messages"][:-1] == bodies[1]["messages"][:-1]


class TestAnthropic(ProviderSuite):
    """The conformance suite, with a model whose cache is only where it is marked."""

    prefix_words = 1200  # above the model's minimum

    @pytest.fixture
    def provider(self, host: HostServer) -> Iterator[Any]:
        host.reply = "Hello to you and to all of yours."
        with contextlib.closing(load(f"anthropic:{MODEL}", {"base_url": host.anthropic_url, "api_key": "k"})) as one:
            yield one


class TestOllama(ProviderSuite):
    """The conformance suite, with a server that tells no cached tokens."""

    reports_cached = False

    @pytest.fixture
    def provider(self, host: HostServer) -> Iterator[Any]:
        host.reply = "Hello to you and to all of yours."
        with contextlib.closing(load("ollama:m", {"base_url": host.ollama_url})) as one:
            yield one
