"""The conformance suite for providers: what every adapter must do, ours and those of third parties.

Knows the contracts and nothing of any real provider. pytest is only needed to run it.
"""

# ruff: noqa: D102 - the names of the suite's tests say what they claim
from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeVar

from ..errors import ConfigError
from ..provider import Generation, LoraRef, Provider, Request, split_name
from ..types import Usage
from .doubles import chat_request, last

__all__ = ["ProviderSuite"]

T = TypeVar("T")


class ProviderSuite:
    """What every provider must do. Subclass it as ``Test...`` and give a pytest fixture ``provider``, fresh per test.

    Turn the class variables off where the model behind the fixture can't show something.
    """

    #: The same request at temperature 0 gives the same text.
    deterministic = True
    #: A repeated long prompt is reported as cached (only asked where ``kv`` is not "none").
    reports_cached = True
    #: Words of the long system text that is to be cached.
    prefix_words = 200
    #: Tokens asked for in an answer.
    max_tokens = 12

    def request(self, text: str = "Say hello to me.", *, system: str | None = None, **options: Any) -> Request:
        """A small request that any chat model can answer, as repeatable as the provider allows."""
        chosen = {"max_tokens": self.max_tokens, "temperature": 0.0, "seed": 7, **options}
        return chat_request(text, system=system, cache_key="suite", **chosen)

    def test_keeps_to_the_protocol(self, provider: Provider) -> None:
        assert isinstance(provider, Provider)
        scheme, model = split_name(provider.name)
        assert scheme, provider.name
        assert model, f"name {provider.name!r} is not 'scheme:model'"
        for face in ("generate", "stream", "embed"):
            sync, other = getattr(provider, face), getattr(provider, f"a{face}")
            assert list(inspect.signature(sync).parameters) == list(inspect.signature(other).parameters)

    def test_generate_returns_text_and_usage(self, provider: Provider) -> None:
        reply = provider.generate(self.request())
        assert isinstance(reply, Generation)
        assert reply.text.strip()
        assert reply.finish_reason
        self._check_usage(reply.usage)

    def test_stream_gives_the_text_of_generate(self, provider: Provider) -> None:
        provider.generate(self.request())  # some engines give other low bits while their cache is cold
        pieces = list(provider.stream(self.request()))
        whole = last(pieces)
        assert pieces[-1] is whole
        assert "".join(piece for piece in pieces if isinstance(piece, str)) == whole.text
        self._check_usage(whole.usage)
        assert whole.usage.first_token_s is None or 0 <= whole.usage.first_token_s <= whole.usage.total_s
        if self.deterministic:
            assert whole.text == provider.generate(self.request()).text

    def test_async_gives_the_text_of_sync(self, provider: Provider) -> None:
        provider.generate(self.request())
        expected = provider.generate(self.request())

        async def both() -> tuple[Generation, list[str | Generation]]:
            reply = await provider.agenerate(self.request())
            return reply, [piece async for piece in provider.astream(self.request())]

        reply, pieces = self._run(provider, both)
        self._check_usage(reply.usage)
        assert "".join(piece for piece in pieces if isinstance(piece, str)) == last(pieces).text
        if self.deterministic:
            assert reply.text == expected.text == last(pieces).text

    def test_a_repeated_prefix_is_cached(self, provider: Provider) -> None:
        system = " ".join(f"Rule {n} stands." for n in range(self.prefix_words // 3))
        first = provider.generate(self.request("What is rule one?", system=system)).usage
        second = provider.generate(self.request("What is rule two?", system=system)).usage
        self._check_usage(first)
        self._check_usage(second)
        if provider.capabilities.kv == "none":
            assert (first.cached_tokens, second.cached_tokens) == (0, 0)
        elif self.reports_cached:
            assert second.cached_tokens > second.input_tokens // 2

    def test_max_tokens_zero_generates_no_text(self, provider: Provider) -> None:
        reply = provider.generate(self.request(max_tokens=0))
        assert reply.text == ""
        assert reply.usage.input_tokens > 0
        pieces = list(provider.stream(self.request(max_tokens=0)))
        assert [type(piece) for piece in pieces] == [Generation]

    def test_max_tokens_limits_the_answer(self, provider: Provider) -> None:
        assert provider.generate(self.request(max_tokens=2)).usage.output_tokens <= 2

    def test_stop_texts_end_the_answer_before_them(self, provider: Provider) -> None:
        if not self.deterministic:
            return
        provider.generate(self.request())
        whole = provider.generate(self.request()).text
        words = whole.split()
        stop = words[1] if len(words) > 1 else words[0]
        cut = provider.generate(self.request(stop=(stop,))).text
        assert stop not in cut
        assert whole.startswith(cut.rstrip())

    def test_a_stream_may_be_left_early(self, provider: Provider) -> None:
        stream = provider.stream(self.request())
        with closing(stream):  # type: ignore[type-var]
            assert isinstance(next(stream), str)

        async def leave() -> None:
            pieces = provider.astream(self.request())
            async for _ in pieces:
                break
            await pieces.aclose()  # type: ignore[attr-defined]

        assert provider.generate(self.request()).text
        self._run(provider, leave)

    def test_threads_may_share_it(self, provider: Provider) -> None:
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda n: provider.generate(self.request(f"Count to {n}.")), range(4)))
        assert all(reply.text for reply in replies)

    def test_capabilities_are_the_truth(self, provider: Provider) -> None:
        import pytest

        can = provider.capabilities
        if not can.embeds:
            with pytest.raises(ConfigError):
                provider.embed(["a"])
            with pytest.raises(ConfigError):
                self._run(provider, lambda: provider.aembed(["a"]))
        if not can.trains:
            with pytest.raises(ConfigError):
                provider.tensors()
        if not can.loras:
            lora = LoraRef(name="none", digest="00", path="/nowhere")
            with pytest.raises(ConfigError):
                provider.generate(replace(self.request(), loras=(lora,)))

    def test_embeddings_are_rows_of_one_length(self, provider: Provider) -> None:
        if not provider.capabilities.embeds:
            return
        import numpy as np

        texts = ["a red apple", "the sea at night", "a red apple"]
        rows = provider.embed(texts)
        assert rows.shape[0] == len(texts)
        assert rows.dtype == np.float32
        assert np.isfinite(rows).all()
        assert np.allclose(rows[0], rows[2], atol=1e-3)
        assert not np.allclose(rows[0], rows[1], atol=1e-3)
        assert np.allclose(self._run(provider, lambda: provider.aembed(texts)), rows, atol=1e-3)
        assert provider.embed([]).shape[0] == 0

    def test_tokens_are_counted(self, provider: Provider) -> None:
        assert provider.count_tokens("") == 0
        assert 0 < provider.count_tokens("one two") < provider.count_tokens("one two " * 50)

    def test_close_may_be_called_again(self, provider: Provider) -> None:
        provider.generate(self.request())
        provider.close()
        provider.close()

    def _check_usage(self, usage: Usage) -> None:
        assert usage.input_tokens > 0
        assert 0 <= usage.cached_tokens <= usage.input_tokens
        assert 0 <= usage.written_tokens <= usage.input_tokens
        assert usage.output_tokens >= 0
        assert usage.total_s >= 0

    def _run(self, provider: Provider, work: Callable[[], Awaitable[T]]) -> T:
        """Run in a new event loop; a provider that has ``aclose`` gets its connections of that loop closed there."""

        async def inside() -> T:
            try:
                return await work()
            finally:
                if (aclose := getattr(provider, "aclose", None)) is not None:
                    await aclose()

        return asyncio.run(inside())
