"""Hosted providers for real: needs AGENTMEM_LIVE=1, keys and the internet; costs a few cents; never runs in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from agentmem.provider import Provider, load
from agentmem.testing import ProviderSuite

pytestmark = pytest.mark.live


def hosted(name: str, variable: str) -> Iterator[Provider]:
    if not os.environ.get("AGENTMEM_LIVE") or not os.environ.get(variable):
        pytest.skip(f"needs AGENTMEM_LIVE=1 and {variable}")
    provider = load(name, {})
    yield provider
    provider.close()


class Hosted(ProviderSuite):
    deterministic = False
    prefix_words = 3000  # above every model's least cacheable length
    max_tokens = 64


class TestOpenAI(Hosted):
    @pytest.fixture
    def provider(self) -> Iterator[Provider]:
        yield from hosted(os.environ.get("AGENTMEM_LIVE_OPENAI", "openai:gpt-4.1-mini"), "OPENAI_API_KEY")


class TestAnthropic(Hosted):
    @pytest.fixture
    def provider(self) -> Iterator[Provider]:
        yield from hosted(os.environ.get("AGENTMEM_LIVE_ANTHROPIC", "anthropic:claude-haiku-4-5"), "ANTHROPIC_API_KEY")


class TestOllama(Hosted):
    reports_cached = False

    @pytest.fixture
    def provider(self) -> Iterator[Provider]:
        yield from hosted(os.environ.get("AGENTMEM_LIVE_OLLAMA", "ollama:llama3.2"), "OLLAMA_HOST")
