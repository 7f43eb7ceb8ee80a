"""The public doubles behave as they say, and the conformance suite passes and fails where it should."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from agentmem.errors import ConfigError, Rejected, Unavailable
from agentmem.provider import Capabilities, Generation, Options, Provider, Request
from agentmem.testing import FakeClock, ProviderSuite, ScriptedProvider, chat_request
from agentmem.types import Message, Segment, ToolCall, Usage


class TestScripted(ProviderSuite):
    @pytest.fixture
    def provider(self) -> Provider:
        return ScriptedProvider("one two three four")


class TestScriptedEmbeds(ProviderSuite):
    @pytest.fixture
    def provider(self) -> Provider:
        can = Capabilities(chat=True, embeds=True, kv="breakpoints", tools=True)
        return ScriptedProvider("one two three four", capabilities=can)


class TestScriptedWithoutCache(ProviderSuite):
    @pytest.fixture
    def provider(self) -> Provider:
        return ScriptedProvider("one two three four", capabilities=Capabilities(chat=True))


def test_the_suite_fails_a_provider_that_streams_something_else() -> None:
    class Wrong(ScriptedProvider):
        def stream(self, request: Request) -> Iterator[str | Generation]:
            yield "other"
            yield Generation(text="text", usage=Usage(input_tokens=1), finish_reason="stop")

    with pytest.raises(AssertionError):
        ProviderSuite().test_stream_gives_the_text_of_generate(Wrong())


def test_the_suite_fails_a_provider_that_claims_more_cached_tokens_than_it_read() -> None:
    class Wrong(ScriptedProvider):
        def _use(self, request: Request) -> Usage:
            return Usage(input_tokens=5, cached_tokens=6)

    with pytest.raises(AssertionError):
        ProviderSuite().test_generate_returns_text_and_usage(Wrong())


def test_the_suite_fails_a_provider_that_lies_about_embeddings() -> None:
    class Wrong(ScriptedProvider):
        def embed(self, texts: Sequence[str]) -> Any:
            return []

    with pytest.raises(pytest.fail.Exception):
        ProviderSuite().test_capabilities_are_the_truth(Wrong())


def test_replies_come_in_order_and_then_are_refused() -> None:
    call = ToolCall(id="1", name="f")
    scripted = Generation(text="", usage=Usage(), tool_calls=(call,), finish_reason="tool_calls")
    provider = ScriptedProvider(["a b", lambda request: request.segments[-1].messages[-1].content, scripted])
    assert provider.generate(chat_request("x")).text == "a b"
    assert provider.generate(chat_request("echo this")).text == "echo this"
    third = provider.generate(chat_request("x"))
    assert (third.tool_calls, third.finish_reason) == ((call,), "tool_calls")
    with pytest.raises(Rejected, match="request 4"):
        provider.generate(chat_request("x"))
    assert [request.segments[-1].messages[-1].content for request in provider.requests] == ["x", "echo this", "x", "x"]


def test_an_error_may_be_the_answer_or_break_a_stream_off() -> None:
    provider = ScriptedProvider([Unavailable("down"), ["half ", Unavailable("cut")]])
    with pytest.raises(Unavailable, match="down"):
        provider.generate(chat_request("x"))
    pieces = provider.stream(chat_request("x"))
    assert next(pieces) == "half "
    with pytest.raises(Unavailable, match="cut"):
        next(pieces)


def test_the_prefix_cache_is_real() -> None:
    def request(question: str, key: str = "a") -> Request:
        return chat_request(question, system="these are five stable words", cache_key=key)

    provider = ScriptedProvider()
    first = provider.generate(request("who is it")).usage
    second = provider.generate(request("who was it")).usage
    other = provider.generate(request("who was it", key="b")).usage
    assert (first.input_tokens, first.cached_tokens) == (10, 0)
    assert (second.cached_tokens, second.written_tokens) == (8, 2)  # tags count as words; "who" is shared too
    assert other.cached_tokens == 0


def test_with_breakpoints_only_stable_segments_are_kept() -> None:
    provider = ScriptedProvider(capabilities=Capabilities(chat=True, kv="breakpoints"))
    request = chat_request("who is it", system="these are five stable words")
    provider.generate(request)
    assert provider.generate(request).usage.cached_tokens == 6


@pytest.mark.parametrize(
    ("options", "text", "finish"),
    [
        (Options(max_tokens=2), "one  two", "length"),
        (Options(stop=(" th",)), "one  two", "stop"),
        (Options(max_tokens=0), "", "length"),
        (Options(), "one  two three\n", "stop"),
    ],
)
def test_limits_and_stops_are_honoured_and_white_space_is_kept(options: Options, text: str, finish: str) -> None:
    segment = Segment(name="turn", messages=(Message(role="user", content="x"),), stable=False)
    provider = ScriptedProvider("one  two three\n")
    request = Request(segments=(segment,), options=options)
    *pieces, whole = provider.stream(request)
    assert isinstance(whole, Generation)
    assert "".join(str(piece) for piece in pieces) == whole.text == text
    assert whole.finish_reason == finish


def test_the_scripted_provider_gives_no_weights() -> None:
    with pytest.raises(ConfigError, match="local"):
        ScriptedProvider().tensors()


def test_the_clock_moves_only_when_told() -> None:
    clock = FakeClock(1000.0)
    assert (clock(), clock()) == (1000.0, 1000.0)
    clock.advance(60)
    assert clock() == 1060.0
    assert clock.datetime().timestamp() == 1060.0


def test_importing_it_loads_nothing_heavy_and_the_hash_embedder_is_there() -> None:
    code = (
        "import sys, agentmem.testing as t\n"
        "assert not {'numpy', 'pytest', 'httpx'} & set(sys.modules)\n"
        "assert t.HashEmbedder().name == 'hash'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
